"""The turns of a batch of rollouts, as tensors for the advantages and as records to read."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .trajectory import Turn
from .turns import turn_spans


class TurnBatch:
    """
    The turns of one process's B rollouts, read off the parent's output.

    Args:
        output (`dict`): what TRL's `_generate_and_score_completions` returns.
        called (list of list of tuple of `str`, *optional*): names of the tools that each turn of each rollout called.

    Attributes:
        turn_index (`torch.Tensor` of shape (B, T)), starts (B, K), num_turns (B,): as of [`turn_spans`].
        prompts, completions, sequences (list of list of `int`): token ids; the last are the first two together.
        boundaries (list of list of `int`): context lengths before each turn.
        gain, belief, advantages (`torch.Tensor` of shape (B, K) or `None`): set once scored; NaN where there is none.
        gains, beliefs (`torch.Tensor` of shape (N, K) or `None`), counts (N,): gains, beliefs and turn counts of the
            global batch of N rollouts, likewise.
    """

    def __init__(self, output: dict[str, Any], called: Sequence[Sequence[tuple[str, ...]]] = ()):
        completion_mask = output["completion_mask"]
        lengths = completion_mask.sum(dim=1)
        sampled_mask = output.get("tool_mask")
        self.turn_index, self.starts, self.num_turns = turn_spans(
            completion_mask if sampled_mask is None else sampled_mask, lengths
        )
        self.prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        self.completions = [
            ids[:length] for ids, length in zip(output["completion_ids"].tolist(), lengths.tolist(), strict=True)
        ]
        starts = self.starts.tolist()
        self.positions = [row[:n] for row, n in zip(starts, self.num_turns.tolist(), strict=True)]
        self.sequences = [prompt + ids for prompt, ids in zip(self.prompts, self.completions, strict=True)]
        self.boundaries = [
            [len(prompt) + start for start in row] for prompt, row in zip(self.prompts, self.positions, strict=True)
        ]
        self.called = called or [()] * len(self.sequences)
        self.gain: torch.Tensor | None = None
        self.belief: torch.Tensor | None = None
        self.advantages: torch.Tensor | None = None
        self.gains: torch.Tensor | None = None
        self.beliefs: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def turns_of(self, i: int, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
        """Decoded turns of rollout i with their beliefs and gains."""
        ids, starts = self.completions[i], self.positions[i]
        sampled = (self.turn_index[i][:, None] == torch.arange(len(starts), device=self.turn_index.device)).sum(dim=0)
        turns = []
        for k, (start, length) in enumerate(zip(starts, sampled.tolist(), strict=True)):
            behind = starts[k + 1] if k + 1 < len(starts) else len(ids)
            turns.append(
                Turn(
                    text=tokenizer.decode(ids[start : start + length]),
                    observation=tokenizer.decode(ids[start + length : behind]) if behind > start + length else "",
                    num_tokens=length,
                    belief=number_or_none(self.belief[i, k].item()) if self.belief is not None else None,
                    info_gain=number_or_none(self.gain[i, k].item())
                    if self.gain is not None and k + 1 < len(starts)
                    else None,
                )
            )
        return turns


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value
