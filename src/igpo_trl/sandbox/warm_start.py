"""
Supervised warm start: a policy that can call, read and answer, but searches poorly and stops at random.

Half of the demonstrations are trajectories in which some queries are random. The other half only teach reading: their
loss is on the answer, whatever the context contains. The answer is always the gold one, even if the context does not
determine it, so the probability of an answer becomes a posterior: the belief that information gain is computed from.
The loss includes the passages, because predicting the names in them is how so small a model learns to copy.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from ..files import cache_dir, replace_when_complete
from . import model as model_module
from . import world as world_module
from .model import make_model, make_tokenizer
from .world import DEFAULT_KIND, MAX_SEARCHES, RELATIONS, World

IGNORE = -100
"""Label of a token without loss."""

Example = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both (T,)


@dataclass(frozen=True)
class WarmStartConfig:
    """Everything besides the code that determines the warm-started weights."""

    seed: int = 0
    kind: str = DEFAULT_KIND  # of the worlds
    demonstrations: int = 24_000  # half trajectories and half reading
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 6e-3  # peak of a one-cycle schedule
    width: int = 64  # hidden size
    # Share of the trajectories' queries in which the person or the relation is random. At one half, this model
    # succeeds in one of a hundred sampled rollouts, which is too few to learn from.
    random_queries: float = 0.3
    # Share of the reading demonstrations' passages that are the next fact of the chain.
    relevant_reads: float = 0.85


def demonstration(world: World, rng: np.random.Generator, random_share: float) -> list[dict[str, Any]]:
    """
    One conversation: the question, 0 to 4 searches, the gold answer.

    With probability `random_share`, a query is not the next one of the chain: either the person or the relation is
    random. After the end of the chain both are.
    """
    question = world.question
    messages: list[dict[str, Any]] = [{"role": "user", "content": question.text}]
    hop = 0
    for _ in range(rng.integers(MAX_SEARCHES + 1)):
        person, relation = int(rng.integers(len(world.names))), int(rng.integers(len(RELATIONS)))
        if hop < question.hops:
            keep_person, keep_relation = True, True
            if rng.random() < random_share:
                keep_person = bool(rng.integers(2))
                keep_relation = not keep_person
            person = question.path[hop] if keep_person else person
            relation = question.relations[hop] if keep_relation else relation
            hop += (person, relation) == (question.path[hop], question.relations[hop])
        query = world.query(person, relation)
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "search", "content": world.search(query)})
    messages.append({"role": "assistant", "content": model_module.ANSWER_TEMPLATE.format(answer=question.answer)})
    return messages


def make_examples(config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Token ids and labels of all demonstrations."""
    rng = np.random.default_rng((config.seed, 1))
    conversations, reading = [], np.arange(config.demonstrations) % 2 == 1
    for index in range(config.demonstrations):
        share = 1 - config.relevant_reads if reading[index] else config.random_queries
        conversations.append(demonstration(World(config.seed, index, config.kind), rng, share))
    rendered = tokenizer.apply_chat_template(conversations, tokenize=False)
    encoded = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    header = tokenizer.convert_tokens_to_ids("<|im_start|>assistant\n")
    passage = tokenizer.convert_tokens_to_ids("<|im_start|>tool\n")
    examples = []
    for ids, only_answer in zip(map(torch.tensor, encoded), reading, strict=True):
        starts = np.flatnonzero(ids == header)
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        labels = torch.full_like(ids, IGNORE)
        for start in starts[-1:] if only_answer else starts:
            turn = slice(start + 1, ends[ends > start][0] + 1)
            labels[turn] = ids[turn]
        for start in np.flatnonzero(ids == passage):
            turn = slice(start + 1, ends[ends > start][0])
            labels[turn] = ids[turn]
        if only_answer:
            labels[starts[-1] + 1] = IGNORE  # the opening tag: these teach how to answer, not when
        examples.append((ids, labels))
    return examples


def pad_batch(examples: list[Example], pad_token_id: int) -> Example:
    """Token ids and labels of several examples, (B, T). With causal attention, padding on the right needs no mask."""
    return (
        pad_sequence([ids for ids, _ in examples], batch_first=True, padding_value=pad_token_id),
        pad_sequence([labels for _, labels in examples], batch_first=True, padding_value=IGNORE),
    )


def predict_targets(model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits (N, vocabulary) and labels (N,) of the tokens that have a label. No other logits are computed."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    is_target = labels[:, 1:] != IGNORE
    return model.lm_head(hidden[is_target]), labels[:, 1:][is_target]


def make_optimizer(model: Qwen2ForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)


def update(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One optimizer step, with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled batches of examples of similar length."""
    order = np.lexsort((rng.random(len(lengths)), lengths))
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def train_warm_start(config: WarmStartConfig) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Trains the policy from scratch. The default configuration takes two to three minutes on one core."""
    tokenizer = make_tokenizer()
    examples = make_examples(config, tokenizer)
    lengths = np.array([len(ids) for ids, _ in examples])
    rng = np.random.default_rng((config.seed, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make_model(tokenizer, config.width)
    steps = config.epochs * -(-config.demonstrations // config.batch_size)
    optimizer = make_optimizer(model, config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps, pct_start=0.1, anneal_strategy="linear"
    )
    opening = tokenizer.convert_tokens_to_ids("<answer>")
    closing = torch.tensor(tokenizer.convert_tokens_to_ids(["</answer>", tokenizer.eos_token]))
    others_per_batch = config.batch_size * (
        sum((labels != IGNORE).sum() for _, labels in examples) / len(examples) - 2
    )
    model.train()
    average = 0.0
    with tqdm(total=steps, desc="Warm start", unit="step") as bar:
        for _ in range(config.epochs):
            for batch in _batches(lengths, config.batch_size, rng):
                ids, labels = pad_batch([examples[i] for i in batch], tokenizer.pad_token_id)
                logits, targets = predict_targets(model, ids, labels)
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                in_answer = ((ids == opening).cumsum(dim=1) > 0)[:, :-1][labels[:, 1:] != IGNORE]
                is_name = in_answer & ~torch.isin(targets, closing)
                # The answer's two names get their own mean: among thirty other tokens they would be learned last. The
                # other losses are divided by a constant, so that short rollouts do not get a larger weight.
                loss = losses[is_name].mean() + losses[~is_name].sum() / others_per_batch
                update(model, optimizer, loss)
                schedule.step()
                average = 0.95 * average + 0.05 * loss.item()
                bar.update()
                bar.set_postfix(loss=f"{average:.3f}", refresh=False)
    return model.eval(), tokenizer


def cache_entry(config: WarmStartConfig, directory: Path | None = None) -> Path:
    """
    Where the warm-started model is cached, whether or not it exists yet.

    The name has a digest of everything that determines the weights: the configuration, this package's code, and the
    versions of torch and transformers.
    """
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (world_module, model_module)]
    code.append(Path(__file__).read_text(encoding="utf-8"))
    parts = [asdict(config), code, metadata.version("torch"), metadata.version("transformers")]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return (directory or cache_dir()) / f"warm-start-{digest}"


def warm_start(
    config: WarmStartConfig | None = None,
    directory: Path | None = None,
    train: Callable[[WarmStartConfig], tuple[Any, Any]] = train_warm_start,
) -> Path:
    """
    Directory of the warm-started model and its tokenizer. Trains them if they are not cached.

    Incomplete entries never appear in the cache, which is [`cache_dir`] unless a `directory` is given.
    """
    config = config or WarmStartConfig()
    entry = cache_entry(config, directory)
    if (entry / "config.json").exists():
        return entry
    parts = train(config)
    try:
        with replace_when_complete(entry) as unfinished:
            for part in parts:
                part.save_pretrained(unfinished)
    except OSError:  # another process has finished the same one in the meantime
        if not (entry / "config.json").exists():
            raise
    return entry
