"""A policy of a few million parameters, made from a corpus and questions in minutes, that searches before it answers.

It stands in for a real language model where there is no GPU and no model hub: to develop, to test, and to watch real
rollouts over real passages. It knows how to call the search tool and how to give an answer; it knows next to nothing
else, and most of its answers are wrong.
"""

import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from ..data import hold_out, load_questions
from ..search import BM25Index, Passage, SearchTool
from ..search.passages import read_passages

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM_PROMPT = "Search, then answer inside <answer> and </answer>."
"""What the model is told; short, because every token costs time on a CPU."""

ANSWER_TEMPLATE = "<answer> {answer} </answer>"
"""Form of its answers; the spaces give a word the same token here as in a passage."""

END, PAD = "<|im_end|>", "<|endoftext|>"
_SPECIAL = (PAD, "<|im_start|>", END)
_MARKERS = (
    *("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<answer>", "</answer>"),
)
_NAME = re.compile(r"[A-Z0-9][\w'’.&-]*(?:\s+(?:(?:of|the|and|de|in|for)\s+){0,2}[A-Z0-9][\w'’.&-]*)*")
_QUESTION_WORDS = frozenset(
    "What Which Who Whose Whom When Where Why How In On At Of For Are Is Was Were Did Do Does The A An".split()
)

Messages = list[dict[str, Any]]
IGNORE = -100
HEAD = 64  # dimensions of an attention head


def make_tiny_model(
    directory: str | Path,
    corpus: str | Path,
    questions: str | Path,
    *,
    minutes: float = 5.0,
    max_steps: int | None = None,
    k: int = 2,
    max_words: int = 40,
    eval_questions: int = 100,
    vocab_size: int = 6144,
    hidden_size: int = 192,
    num_layers: int = 3,
    batch_size: int = 8,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, float]:
    """
    Makes a tokenizer and a small Qwen2 model, teaches it to search and answer, and saves both.

    The tokenizer is a byte-level BPE of the corpus, with Qwen2.5's chat template. The model then learns from
    conversations made up from the questions and from sentences of the corpus with a name left out: a search for a
    name or some words of it, what the BM25 index really returns, perhaps a search for a title found there, the gold
    answer. The loss is on the assistant's tokens alone.

    Args:
        directory (`str` or `Path`):
            Where to save; must not exist or be empty.
        corpus (`str` or `Path`):
            Passages, JSONL or JSONL.gz with `id`, `title` and `text`.
        questions (`str` or `Path`):
            Questions, a file that `load_questions` reads.
        minutes (`float`, *optional*, defaults to `5.0`):
            Time for training the model; the learning rate falls to zero at its end.
        max_steps (`int`, *optional*):
            Stop after this many optimizer steps if the time is not over before.
        k (`int`, *optional*, defaults to `2`):
            Passages per search.
        max_words (`int`, *optional*, defaults to `40`):
            Longest passage, in words.
        eval_questions (`int`, *optional*, defaults to `100`):
            Questions left out of training, see [`hold_out`].
        vocab_size, hidden_size, num_layers (`int`, *optional*):
            Size of the model; the defaults give 2.5 million parameters. Heads have 64 dimensions.
        batch_size (`int`, *optional*, defaults to `8`):
            Conversations per step.
        learning_rate (`float`, *optional*, defaults to `1.5e-3`):
            Its peak.
        seed (`int`, *optional*, defaults to `0`):
            Seed of weights and conversations. Two runs differ all the same where the machine's speed does.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `parameters`, `steps`, the last `loss`, and `valid_search_share`: the share of sampled rollouts on questions
        that were left out (all, if none were) whose first turn is a valid call of the search tool.

    Raises:
        FileExistsError: The directory holds something already.
        FileNotFoundError: A file does not exist.
        ValueError: A file is malformed (the message names the line).
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty. Choose another directory or remove it.")
    if hidden_size % HEAD or hidden_size < 2 * HEAD:
        raise ValueError(f"got hidden_size={hidden_size}, expected a multiple of {HEAD} (one head), at least two.")
    if num_layers < 2:
        raise ValueError(f"got num_layers={num_layers}, expected at least 2.")
    dataset = load_questions(questions, system_prompt=SYSTEM_PROMPT)
    dataset, held_out = hold_out(dataset, min(eval_questions, len(dataset) // 2))
    passages = list(read_passages(corpus))
    index = BM25Index.build([_record(p) for p in passages], show_progress=show_progress)
    tool = SearchTool(index, k=k, max_words=max_words)

    tokenizer = make_tokenizer(passages, dataset, tool, vocab_size)
    torch.manual_seed(seed)
    model = make_model(tokenizer, hidden_size, num_layers)
    rng = random.Random(seed)
    conversations = make_conversations(dataset, passages, tool, rng)
    parameters = sum(p.numel() for p in model.parameters())
    steps, loss = train(
        model, tokenizer, conversations, tool, minutes, max_steps, batch_size, learning_rate, show_progress, rng
    )
    share = valid_search_share(model, tokenizer, held_out if len(held_out) else dataset, tool)

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as unfinished:
        target = Path(unfinished) / "model"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        if directory.exists():
            directory.rmdir()
        shutil.move(target, directory)
    return {"parameters": parameters, "steps": steps, "loss": loss, "valid_search_share": share}


def _record(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def make_tokenizer(
    passages: list[Passage], questions: "Dataset", tool: Callable[[str], str], vocab_size: int = 6144
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of passages, questions and the text around them, with Qwen2.5's chat template."""
    from trl.chat_template_utils import add_response_schema, qwen2_5_chat_template

    core = Tokenizer(models.BPE())
    # `AutoTokenizer` splits the words of every Qwen2 model as Qwen2 does, whatever was saved with it.
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    core.normalizer, core.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=qwen2_5_chat_template,
    )
    prompts = questions["prompt"][:]
    frame = tokenizer.apply_chat_template(prompts[0], tools=[tool], tokenize=False)

    def texts() -> Iterator[str]:
        yield from [frame] * 50  # its words are in every prompt, so they are to be single tokens
        yield from (f"{passage.title}\n{passage.text}" for passage in passages)
        yield from (prompt[-1]["content"] for prompt in prompts)

    core.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(_SPECIAL) - len(_MARKERS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in _MARKERS])
    # Wrapped anew, so that what the wrapper reads off the tokenizer is that of the trained one.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=qwen2_5_chat_template,
    )
    return add_response_schema(tokenizer)


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_layers: int = 3) -> Qwen2ForCausalLM:
    """
    A small Qwen2 with full attention in float32; weights from torch's global generator.

    It can copy from the start, see `_wire_copying`.
    """
    heads = hidden_size // HEAD
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _wire_copying(model)
    return model


@torch.no_grad()
def _wire_copying(model: Qwen2ForCausalLM) -> None:
    """
    Sets one head in each of the first two layers so that the model continues a text that it has seen in its context.

    This is the induction circuit of Olsson et al. (arXiv 2209.11895). A model of this size would not find it in the
    minutes that there are, and without it cannot search for a name in the question nor answer with one in a passage.

    Layer 1 attends to the token before, by position alone: for frequencies f of RoPE and biases k = (1, 0) and
    q = (cos f, -sin f), the score of the token d places back is the sum of cos(f (d - 1)), largest at d = 1. It writes
    what it read to a subspace of its own. Layer 2 looks there for its own token, through the rotations that are slow
    enough not to depend on the distance, and so finds the token that followed; its embedding is the prediction.
    """
    config, (first, second) = model.config, (layer.self_attn for layer in model.model.layers[:2])
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.1)
    directions = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))[0].T
    read, write = directions[:HEAD], directions[HEAD : 2 * HEAD]
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    slow = (frequency < 2e-3).nonzero().flatten()
    slow = torch.cat([slow, slow + HEAD // 2])  # the two coordinates of a rotation are half a head apart

    for attention in (first, second):
        attention.q_proj.weight[:HEAD] = 0
        attention.k_proj.weight[:HEAD] = 0
        attention.v_proj.weight[:HEAD] = read
    first.k_proj.bias[:HEAD] = 60**0.5 * torch.cat([torch.ones(HEAD // 2), torch.zeros(HEAD // 2)])
    first.q_proj.bias[:HEAD] = 60**0.5 * torch.cat([frequency.cos(), -frequency.sin()])
    first.o_proj.weight[:, :HEAD] = 0.1 * write.T
    second.q_proj.weight[slow] = 8**0.5 * read[: len(slow)]
    second.k_proj.weight[slow] = 8**0.5 * write[: len(slow)]
    second.o_proj.weight[:, :HEAD] = 1.5 * read.T


# Conversations


def make_conversations(
    questions: "Dataset", passages: list[Passage], tool: Callable[[str], str], rng: random.Random
) -> Iterator[Messages]:
    """Conversations without end: by turns one of a real question and one of a sentence with a name left out."""
    rows = list(questions)
    rng.shuffle(rows)
    while True:
        for row in rows:
            yield _conversation(row["prompt"], row["answers"][0], row["supporting_titles"], tool, rng)
            cloze = None
            while cloze is None:
                passage = rng.choice(passages)
                cloze = _cloze(passage, rng)
            prompt = [row["prompt"][0], {"role": "user", "content": cloze[0]}]
            yield _conversation(prompt, cloze[1], [passage.title], tool, rng)


def _conversation(
    prompt: Messages, answer: str, titles: list[str], tool: Callable[[str], str], rng: random.Random
) -> Messages:
    """The question, a search for words of it, perhaps one for a title in what came back, the answer."""
    messages = list(prompt)
    query = _query(prompt[-1]["content"], rng)
    observation = tool(query)
    messages += _call(query, observation)
    # A title that leads on: mentioned in the text, but not the title of a passage that was shown.
    shown = re.findall(r"^\[\d+\] (.+)$", observation, flags=re.MULTILINE)
    mentioned = [title for title in titles if title in observation and title not in shown]
    found = mentioned or shown
    if found and rng.random() < (0.9 if mentioned else 0.4):
        query = _spaced(rng.choice(found))
        messages += _call(query, tool(query))
    messages.append({"role": "assistant", "content": ANSWER_TEMPLATE.format(answer=answer)})
    return messages


def _call(query: str, observation: str) -> Messages:
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": observation},
    ]


def _names(text: str) -> list[str]:
    """Runs of capitalised words, without a question word in front."""
    names = []
    for name in _NAME.findall(text):
        words = name.split()
        while words and words[0] in _QUESTION_WORDS:
            words.pop(0)
        if words:
            names.append(" ".join(words).rstrip(".'’"))
    return [name for name in names if len(name) > 2]


def _query(question: str, rng: random.Random) -> str:
    """A name in the question, or a short run of its words."""
    names = _names(question)
    if names and rng.random() < 0.7:
        return _spaced(rng.choice(names))
    words = question.rstrip(" ?").split()
    length = min(len(words), rng.randint(3, 7))
    start = rng.randint(0, len(words) - length)
    return _spaced(" ".join(words[start : start + length]))


def _spaced(words: str) -> str:
    """With a space in front, words are the tokens that they are in the middle of a text, and can be copied."""
    return f" {words}"


def _cloze(passage: Passage, rng: random.Random) -> tuple[str, str] | None:
    """A question and its answer: a sentence of the passage in which a name is replaced by "what", if there is one."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", passage.text) if 5 <= len(s.split()) <= 25]
    if not sentences:
        return None
    sentence = rng.choice(sentences[:2])
    names = [name for name in _names(sentence) if name not in passage.title and len(name.split()) <= 4]
    if not names:
        return None
    name = rng.choice(names)
    return f"{passage.title}: {sentence.replace(name, 'what', 1).rstrip('.')}?", name


# Training


def encode(
    tokenizer: PreTrainedTokenizerFast, conversations: list[Messages], tool: Callable[[str], str]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids and labels (-100 outside the assistant's turns), lists of one (T,) tensor per conversation."""
    from trl.chat_template_utils import qwen2_5_training_chat_template

    encoded = tokenizer.apply_chat_template(
        conversations,
        tools=[tool],
        chat_template=qwen2_5_training_chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = [torch.tensor(row) for row in encoded["input_ids"]]
    labels = [
        row.masked_fill(~torch.tensor(mask).bool(), IGNORE)
        for row, mask in zip(ids, encoded["assistant_masks"], strict=True)
    ]
    return ids, labels


def _batches(
    tokenizer: PreTrainedTokenizerFast,
    conversations: Iterator[Messages],
    tool: Callable[[str], str],
    batch_size: int,
    rng: random.Random,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels (B, T) without end, conversations of about equal length together."""
    while True:
        ids, labels = encode(tokenizer, [next(conversations) for _ in range(16 * batch_size)], tool)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            # Padded on the right, where causal attention never looks: no mask is needed.
            yield (
                pad_sequence([ids[i] for i in chunk], batch_first=True, padding_value=tokenizer.pad_token_id),
                pad_sequence([labels[i] for i in chunk], batch_first=True, padding_value=IGNORE),
            )


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Iterator[Messages],
    tool: Callable[[str], str],
    minutes: float,
    max_steps: int | None,
    batch_size: int,
    learning_rate: float,
    show_progress: bool,
    rng: random.Random,
) -> tuple[int, float]:
    """Supervised training until the time or the steps are over; gives the steps and the running mean of the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    batches = _batches(tokenizer, conversations, tool, batch_size, rng)
    bfloat16 = getattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: False
    )()  # twice as fast where there is hardware
    started, steps, average = time.monotonic(), 0, float("nan")
    model.train()
    with tqdm(total=100, desc="Warm start", unit="%", disable=not show_progress) as bar:
        while True:
            done = (time.monotonic() - started) / (60 * minutes)
            if max_steps is not None:
                done = max(done, steps / max_steps)
            if done >= 1:
                break
            # Up over the first twentieth, then down to zero.
            optimizer.param_groups[0]["lr"] = learning_rate * min(20 * done + 0.02, (1 - done) / 0.95)
            ids, labels = next(batches)
            chosen = labels[:, 1:] != IGNORE
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                logits = model.lm_head(hidden[chosen])
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            average = loss.item() if steps == 1 else 0.95 * average + 0.05 * loss.item()
            bar.update(int(100 * done) - bar.n)
            bar.set_postfix(step=steps, loss=f"{average:.3f}", refresh=False)
        bar.update(100 - bar.n)
    model.eval()
    return steps, average


@torch.no_grad()
def valid_search_share(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: "Dataset",
    tool: Callable[[str], str],
    rollouts: int = 64,
) -> float:
    """Share of first turns, sampled at temperature 1, that are a call of the search tool with a query."""
    from trl.chat_template_utils import parse_response

    rows = questions.select(range(min(rollouts, len(questions))))
    prompts = rows["prompt"][:]
    inputs = tokenizer.apply_chat_template(
        prompts, tools=[tool], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    width = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
    valid = 0
    for prompt, row in zip(inputs["input_ids"].tolist(), output[:, width:].tolist(), strict=True):
        ids = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
        calls = parse_response(tokenizer, ids, prefix=prompt, tools=[tool]).get("tool_calls") or []
        functions = [call["function"] for call in calls]
        valid += any(f["name"] == "search" and str(f["arguments"].get("query", "")).strip() for f in functions)
    return valid / len(prompts)
