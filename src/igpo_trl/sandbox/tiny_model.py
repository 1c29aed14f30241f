"""
A policy of a few million parameters, made from a corpus and questions in minutes, that searches before it answers.

It replaces a real language model where there is no GPU and no model hub: for development, for tests, and to watch real
rollouts over real passages. It can call the search tool and give an answer, and knows little else. Most of its answers
are wrong.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM, Qwen2Tokenizer

from ..data import hold_out, load_questions
from ..files import check_writable, replace_when_complete
from ..search import BM25Index, Passage, SearchTool
from ..search.passages import read_passages
from ..warm_start.encoding import TraceEncoder
from ..warm_start.fitting import fit
from .conversations import make_conversations
from .model import END, PAD, make_qwen2, wrap_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM_PROMPT = "Search, then answer inside <answer> and </answer>."
"""System prompt of the model. It is short because every token costs time on a CPU."""

_SPECIAL = (PAD, "<|im_start|>", END)
_MARKERS = (
    *("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>", "<answer>", "</answer>"),
)
_HEAD_SIZE = 64  # dimensions of an attention head
_CONVERSATIONS = 4096  # about as many as are used in the default time on one core
_EPOCHS = 10_000  # the time or the steps end training


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

    The tokenizer is a byte-level BPE of the corpus, with Qwen2.5's chat template. The model learns from conversations
    made from the questions and from sentences of the corpus with a name left out: a search for a name or some words of
    the question, the result of the BM25 index, sometimes a search for a title in that result, and the gold answer. The
    loss is on the assistant's tokens only.

    Training ends after `minutes`, or earlier after `max_steps`; the learning rate falls from its peak to zero until
    then. So the number of steps depends on the machine's speed, whatever the `seed`. At most half of the questions are
    held out, see [`hold_out`]. The default sizes give 2.5 million parameters.

    Returns:
        `dict`: `parameters`, `steps`, the final `loss` (running mean), and `valid_search_share`: the share of sampled
        rollouts on held-out questions (on all, if none are held out) whose first turn is a valid call of the search
        tool.

    Raises:
        FileExistsError: The directory is not empty.
        FileNotFoundError: A file does not exist.
        ValueError: A file is malformed (the message names the line), or a size is unsuitable.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not empty. Choose another directory or remove it.")
    check_writable(directory.parent, "the model's directory")  # not only after minutes of training
    if hidden_size % _HEAD_SIZE or hidden_size < 2 * _HEAD_SIZE:
        raise ValueError(f"got hidden_size={hidden_size}, expected a multiple of {_HEAD_SIZE}, at least two of it.")
    if num_layers < 2:
        raise ValueError(f"got num_layers={num_layers}, expected at least 2.")
    dataset = load_questions(questions, system_prompt=SYSTEM_PROMPT)
    dataset, held_out = hold_out(dataset, min(eval_questions, len(dataset) // 2))
    passages = list(read_passages(corpus))
    records = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in passages]
    tool = SearchTool(BM25Index.build(records, show_progress=show_progress), k=k, max_words=max_words)

    tokenizer = learn_tokenizer(passages, dataset, tool, vocab_size)
    torch.manual_seed(seed)
    model = make_copying_model(tokenizer, hidden_size, num_layers)
    conversations = make_conversations(dataset, passages, tool, random.Random(seed))
    number = _CONVERSATIONS if max_steps is None else min(_CONVERSATIONS, max_steps * batch_size)
    encoder = TraceEncoder(tokenizer, [tool])
    progress = tqdm(range(number), "Conversations", unit="", disable=not show_progress)
    examples = [encoder.encode(next(conversations)) for _ in progress]
    with tempfile.TemporaryDirectory() as work:
        model, trained = fit(
            model,
            tokenizer,
            examples,
            Path(work),
            epochs=_EPOCHS,
            max_steps=max_steps,
            minutes=minutes,
            micro_batch_size=batch_size,
            batch_size=batch_size,
            show_progress=show_progress,
            learning_rate=learning_rate,
            adam_beta2=0.98,
            weight_decay=0.01,
            save_strategy="no",
            seed=seed,
        )
    model.eval()
    share = _valid_search_share(model, tokenizer, held_out if len(held_out) else dataset, tool)
    with replace_when_complete(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    stats = {"parameters": model.num_parameters(), "steps": trained["steps"], "loss": trained["loss"]}
    return stats | {"valid_search_share": share}


def learn_tokenizer(
    passages: list[Passage], questions: "Dataset", tool: Callable[[str], str], vocab_size: int = 6144
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of passages, questions and the text around them, with Qwen2.5's chat template."""
    from trl.chat_template_utils import add_response_schema, qwen2_5_chat_template

    core = Tokenizer(models.BPE())
    # `AutoTokenizer` splits the words of every Qwen2 model as Qwen2 does, whatever pre-tokenizer was saved with it.
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    core.normalizer, core.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    core.decoder = decoders.ByteLevel()

    prompts = questions["prompt"][:]
    frame = wrap_tokenizer(core, qwen2_5_chat_template).apply_chat_template(prompts[0], tools=[tool], tokenize=False)

    def texts() -> Iterator[str]:
        yield from [frame] * 50  # its words are in every prompt, so they should become single tokens
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
    # A new wrapper, because it copies properties of the trained tokenizer.
    return add_response_schema(wrap_tokenizer(core, qwen2_5_chat_template))


def make_copying_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_layers: int = 3
) -> Qwen2ForCausalLM:
    """
    A small Qwen2 with full attention in float32, which can copy text without any training, see `_wire_copying`.

    The weights are drawn from torch's global generator.
    """
    model = make_qwen2(
        tokenizer,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 5 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // _HEAD_SIZE,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    _wire_copying(model)
    return model


@torch.no_grad()
def _wire_copying(model: Qwen2ForCausalLM) -> None:
    """
    Sets one head in each of the first two layers so that the model continues text that is already in its context.

    This is the induction circuit of Olsson et al. (arXiv 2209.11895). A model of this size does not find it in minutes
    of training, and without it cannot search for a name in the question or answer with a name in a passage.

    Layer 1 attends to the previous token, by position alone: for frequencies f of RoPE and biases k = (1, 0) and
    q = (cos f, -sin f), the score of the token d places back is the sum of cos(f (d - 1)), largest at d = 1. It writes
    what it reads to a separate subspace. Layer 2 compares its own token with that subspace, through the rotations that
    are too slow to depend on the distance, and so finds the token that followed; its embedding is the prediction.
    """
    config, (first, second) = model.config, (layer.self_attn for layer in model.model.layers[:2])
    size, half = _HEAD_SIZE, _HEAD_SIZE // 2
    model.model.embed_tokens.weight.normal_(0, 0.1)
    directions = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size))[0].T
    read, write = directions[:size], directions[size : 2 * size]
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    slow = (frequency < 2e-3).nonzero().flatten()
    slow = torch.cat([slow, slow + half])  # the two coordinates of a rotation are half a head apart

    for attention in (first, second):
        attention.q_proj.weight[:size] = 0
        attention.k_proj.weight[:size] = 0
        attention.v_proj.weight[:size] = read
    first.k_proj.bias[:size] = 60**0.5 * torch.cat([torch.ones(half), torch.zeros(half)])
    first.q_proj.bias[:size] = 60**0.5 * torch.cat([frequency.cos(), -frequency.sin()])
    first.o_proj.weight[:, :size] = 0.1 * write.T
    second.q_proj.weight[slow] = 8**0.5 * read[: len(slow)]
    second.k_proj.weight[slow] = 8**0.5 * write[: len(slow)]
    second.o_proj.weight[:, :size] = 1.5 * read.T


@torch.no_grad()
def _valid_search_share(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: "Dataset", tool: Callable[[str], str]
) -> float:
    """Share of first turns, sampled for up to 64 questions, that are a valid call of the search tool."""
    from trl.chat_template_utils import parse_response

    inputs = tokenizer.apply_chat_template(
        questions["prompt"][:64],
        tools=[tool],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    width = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)

    def is_search(call: dict[str, Any]) -> bool:
        function = call["function"]
        return function["name"] == "search" and bool(str(function["arguments"].get("query", "")).strip())

    valid = 0
    for prompt, row in zip(inputs["input_ids"].tolist(), output[:, width:].tolist(), strict=True):
        ids = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
        calls = parse_response(tokenizer, ids, prefix=prompt, tools=[tool]).get("tool_calls") or []
        valid += any(map(is_search, calls))
    return valid / len(output)
