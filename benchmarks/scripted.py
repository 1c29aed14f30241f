"""Rollouts of wanted lengths for benchmarks: as a batch of random tokens, and as a script that trainers sample."""

import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import tiny  # noqa: E402

WIDEST = 4096  # tokens of a completion
COMMON = 150  # tokens that all prompts begin with: system prompt and tools


class Rollout(NamedTuple):
    """Lengths in tokens. An observation follows every turn but the last."""

    prompt: int
    sampled: tuple[int, ...]
    observed: tuple[int, ...]

    @property
    def mask(self) -> list[int]:
        """1 on the sampled tokens of the completion."""
        turns = zip(self.sampled, (*self.observed, 0), strict=True)
        return [value for sampled, observed in turns for value in [1] * sampled + [0] * observed]


def equal_rollouts(number: int) -> list[Rollout]:
    """Prompts of 205 tokens and completions of 460 on average, a fifth of them sampled; one rollout in 16 differs."""
    rng, rollouts = random.Random(0), []
    for i in range(number):
        searches = 2 if i % 16 != 9 else 3
        turns = tuple(rng.randint(20, 42) for _ in range(searches + 1))
        rollouts.append(Rollout(205, turns, tuple(rng.randint(110, 258) for _ in range(searches))))
    return rollouts


def mixed_rollouts(number: int) -> list[Rollout]:
    """2 to 8 turns, all equally frequent."""
    rng, rollouts = random.Random(0), []
    counts = [2 + round(6 * i / max(1, number - 1)) for i in range(number)]
    rng.shuffle(counts)
    for i, count in enumerate(counts):
        prompt = rng.randint(200, 400) if i % 2 == 0 else rollouts[-1].prompt  # groups of two
        sampled, room = tuple(rng.randint(20, 60) for _ in range(count)), WIDEST
        observed = []
        for turn in range(count - 1):
            room = WIDEST - sum(sampled) - sum(observed) - 100 * (count - 2 - turn)
            observed.append(min(rng.randint(100, 600), room))
        rollouts.append(Rollout(prompt, sampled, tuple(observed)))
    return rollouts


def recorded_rollouts(path: Path, tokenizer: Any, number: int) -> list[Rollout]:
    """The lengths of recorded trajectories."""
    rollouts = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()[:number]):
        prompt = len(tokenizer.encode(record["prompt"], add_special_tokens=False))
        observed = [len(tokenizer.encode(t["observation"], add_special_tokens=False)) for t in record["turns"][:-1]]
        rollouts.append(Rollout(prompt, tuple(max(1, t["num_tokens"]) for t in record["turns"]), tuple(observed)))
    return rollouts


def describe(rollouts: Sequence[Rollout]) -> str:
    masks = [rollout.mask for rollout in rollouts]
    turns, prompts = [len(r.sampled) for r in rollouts], [r.prompt for r in rollouts]
    completion = sum(map(len, masks))
    return (
        f"{len(rollouts)} rollouts of {min(turns)} to {max(turns)} turns, prompts of {min(prompts)} to {max(prompts)} "
        f"tokens, completions of {min(map(len, masks))} to {max(map(len, masks))} (mean "
        f"{completion / len(masks):.0f}), {sum(map(sum, masks)) / completion:.0%} sampled"
    )


def make_batch(rollouts: Sequence[Rollout], vocab_size: int, device: str, per_token: bool) -> dict[str, Any]:
    """The generation batch of these rollouts with random tokens and one system prompt, padded as TRL pads."""
    generator = torch.Generator().manual_seed(0)
    number, masks = len(rollouts), [rollout.mask for rollout in rollouts]
    left, right = max(rollout.prompt for rollout in rollouts), max(map(len, masks))
    prompt_mask = torch.stack([(torch.arange(left) >= left - r.prompt).long() for r in rollouts])
    completion_mask = torch.stack([(torch.arange(right) < len(mask)).long() for mask in masks])
    tool_mask = torch.stack([torch.tensor(mask + [0] * (right - len(mask))) for mask in masks])
    ids = torch.randint(5, vocab_size - 1, (number, left + right), generator=generator)
    for row, rollout in zip(ids, rollouts, strict=True):
        length = min(COMMON, rollout.prompt - 1)
        row[left - rollout.prompt :][:length] = ids[0, left - rollouts[0].prompt :][:length]
    advantages = torch.randn(number, 1, generator=generator) * tool_mask
    batch = {
        "prompt_ids": ids[:, :left] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, left:] * completion_mask,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": advantages if per_token else advantages[:, 0],  # the first token is sampled
        "num_items_in_batch": tool_mask.sum().float(),
    }
    return {name: value.to(device) for name, value in batch.items()}


WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government night point home water room mother area"
).split()
MARK = "rollout {} turn {}"


class Script:
    """
    What every rollout says and reads, in tokens of the wanted number.

    Every call names its rollout and turn, by which the next turn of a context is found. A short batch comes first, to
    which one-off costs belong.
    """

    def __init__(self, rollouts: Sequence[Rollout], group: int, latency: float, now: Callable[[], float]):
        def search(query: str) -> str:
            """
            Searches.

            Args:
                query: What to look for.
            """
            started = now()
            if latency:
                time.sleep(latency)
            rollout, turn = map(int, re.findall(MARK.format(r"(\d+)", r"(\d+)"), query)[0])
            length = self.batches[self.batch][rollout].observed[turn]
            text = self._filler(length - self._around_observation)
            self.calls.append((started, now()))
            return text

        self.search, self.calls = search, []  # when calls began and ended, in any thread
        small = tiny.make_tokenizer()
        chat = [{"role": "user", "content": "Where was author 1 born? turn"}]
        corpus = [small.apply_chat_template(chat, tools=[search], tokenize=False, add_generation_prompt=True)]
        corpus += [tiny.call(MARK.format(i, i)) for i in range(100)] + [" " + " ".join(WORDS)] * 50
        self.tokenizer = small.train_new_from_iterator(corpus, vocab_size=1500, show_progress=False)
        self.tokenizer.add_tokens([tiny.AddedToken(marker, normalized=False) for marker in tiny.MARKERS])
        self.tokenizer.chat_template, self.tokenizer.padding_side = small.chat_template, "left"
        self._around_observation = 14  # the template's tokens
        short = [Rollout(210, (24, 24), (40,))] * len(rollouts)
        self.batches, self.batch = [short, list(rollouts)], -1
        self.prompts = [
            self._prompt(i, batch[i].prompt) for batch in self.batches for i in range(0, len(batch), group)
        ]
        self._turns = [
            [[self._turn(i, k, rollout) for k in range(len(rollout.sampled))] for i, rollout in enumerate(batch)]
            for batch in self.batches
        ]

    def next_turn(self, row: int, context: torch.Tensor) -> list[int]:
        said = re.findall(MARK.format(r"(\d+)", r"(\d+)"), self.tokenizer.decode(context))
        rollout, turn = (int(said[-1][0]), int(said[-1][1]) + 1) if said else (row, 0)
        return self._turns[self.batch][rollout][turn]

    def _filler(self, length: int) -> str:
        return "".join(" " + WORDS[i % len(WORDS)] for i in range(max(0, length)))

    def _prompt(self, number: int, length: int) -> list[dict[str, str]]:
        def render(filler: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": f"Where was author {number} born?{filler}"}]

        options = {"tools": [self.search], "tokenize": False, "add_generation_prompt": True}
        around = len(self.tokenizer.encode(self.tokenizer.apply_chat_template(render(""), **options)))
        return render(self._filler(length - around))

    def _turn(self, number: int, turn: int, rollout: Rollout) -> list[int]:
        def render(filler: str) -> list[int]:
            if turn + 1 < len(rollout.sampled):
                text = tiny.call(MARK.format(number, turn) + filler)
            else:
                text = f"So it was{filler} <answer>Paris</answer>"
            return [*self.tokenizer.encode(text), self.tokenizer.eos_token_id]

        return render(self._filler(rollout.sampled[turn] - len(render(""))))


def scripted(trainer: Any, script: Script, taken: list[Any]) -> None:
    """Make a trainer sample the script, and keep the tokens of its rollouts."""
    generate, generate_rollouts = trainer.model.generate, trainer._generate

    def say(input_ids: torch.Tensor, **options: Any) -> Any:
        turns, width = [script.next_turn(row, ids) for row, ids in enumerate(input_ids)], input_ids.shape[1]

        def only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = ids.shape[1] - width
            said = [turn[min(place, len(turn) - 1)] for turn in turns]
            return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(said)[:, None].to(scores.device), 0.0)

        return generate(input_ids=input_ids, logits_processor=[only], **options)

    def counted_rollouts(prompts: Any) -> Any:
        script.batch += 1
        script.calls.clear()
        result = generate_rollouts(prompts)
        taken.append([[list(ids) for ids in part] for part in result[:3]])
        return result

    trainer.model.generate, trainer._generate = say, counted_rollouts
