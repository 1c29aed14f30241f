"""Records of a generation batch: one trajectory per rollout, for training, evaluation and the sandbox alike."""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .rollout.written_calls import find_calls
from .step import Step
from .trajectory import Call, Trajectory, Turn

TURN_COLUMNS = ("belief", "info_gain", "turn_advantage")

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def trajectories_of(
    step: Step,
    tokenizer: PreTrainedTokenizerBase,
    reward_names: Sequence[str] = (),
    rollout_advantages: torch.Tensor | None = None,
) -> list[Trajectory]:
    """
    The record of each rollout of this rank.

    Args:
        step ([`Step`]): the batch, as far as it has come: beliefs, gains and advantages are recorded if there are any.
        tokenizer (`PreTrainedTokenizerBase`): decodes prompts, turns and observations.
        reward_names (list of `str`, *optional*): of the reward functions; without them no outcome is recorded.
        rollout_advantages (`torch.Tensor` of shape (B,), *optional*): GRPO's, recorded where turns have none.
    """
    size, has_answers = len(step.rows), step.answer_column in step.rows[0]
    turn_advantages = None if step.global_advantages is None else step.local(step.global_advantages).tolist()
    outcomes = step.local(step.global_outcome).tolist() if reward_names else [None] * size
    rewards = step.local(step.global_rewards).tolist() if reward_names else [()] * size
    # The rollouts of a group share their prompt, and many a query its results.
    decode = lru_cache(maxsize=None)(lambda ids: tokenizer.decode(list(ids)))
    trajectories = []
    for i, turns in enumerate(_turns_of(step, decode)):
        for k, turn in enumerate(turns):
            if turn_advantages is not None:
                turn.advantage = turn_advantages[i][k]
            elif rollout_advantages is not None:
                turn.advantage = float(rollout_advantages[i])
        trajectories.append(
            Trajectory(
                prompt=decode(tuple(step.prompt_ids[i])),
                turns=turns,
                answers=list(step.answers[i]) if has_answers else [],
                outcome=_number_or_none(outcomes[i]),
                rewards={name: _number_or_none(x) for name, x in zip(reward_names, rewards[i], strict=True)},
                step=step.optimizer_step,
                group=(step.rank * size + i) // step.num_generations if step.training else 0,
                stop_reason=step.round_log.stops[i] if step.round_log.stops else None,
                question=question_of(step.rows[i]),
                data_set=step.rows[i].get("dataset"),
                seconds=None if step.seconds is None else step.seconds / size,
            )
        )
    return trajectories


def _turns_of(step: Step, decode: Callable[[tuple[int, ...]], str]) -> Iterator[list[Turn]]:
    """The turns of every rollout with their beliefs and gains."""
    nothing = [[None] * step.starts.shape[1]] * len(step.completion_ids)
    beliefs = nothing if step.beliefs is None else step.beliefs.tolist()
    gains = nothing if step.gains is None else step.gains.tolist()
    calls, alias_beliefs = step.round_log.calls, _alias_beliefs(step)
    for i, (ids, starts, index) in enumerate(
        zip(step.completion_ids, step.turn_starts, step.turn_index.tolist(), strict=True)
    ):
        turns, lengths = [], Counter(index)
        for k, (start, end) in enumerate(pairwise([*starts, len(ids)])):
            sampled_end = start + lengths[k]
            text = decode(tuple(ids[start:sampled_end]))
            turns.append(
                Turn(
                    text=text,
                    observation=decode(tuple(ids[sampled_end:end])) if end > sampled_end else "",
                    num_tokens=lengths[k],
                    belief=_number_or_none(beliefs[i][k]),
                    info_gain=_number_or_none(gains[i][k]),
                    # An observation that leaves no room is followed by a turn without tokens, which nobody sampled.
                    calls=[*calls[i], []][k] if calls else _calls_in(text),
                    observation_tokens=end - sampled_end,
                    alias_beliefs=alias_beliefs.get((i, k), []),
                )
            )
        yield turns


def question_of(row: Mapping[str, Any]) -> str:
    """The last user message of a row's prompt, as plain text."""
    prompt = row.get("prompt") or ""
    if not isinstance(prompt, str):
        prompt = next((message.get("content") for message in reversed(prompt) if message.get("role") == "user"), None)
    return prompt if isinstance(prompt, str) else ""


def _alias_beliefs(step: Step) -> dict[tuple[int, int], list[float | None]]:
    """The beliefs in each of the answers, by rollout and turn."""
    tables = step.belief_batch.log_probs if step.belief_batch is not None else []
    return {
        (i, turn): [_number_or_none(x) for x in row]
        for i, (table, turns) in enumerate(zip(tables, step.scored_turns, strict=False))
        for turn, row in zip(turns, table.exp().tolist(), strict=True)
    }


def _calls_in(text: str) -> list[Call]:
    """The calls that a turn's text holds, where no loop of ours has read them."""
    return [
        Call(call.name or "unknown", call.arguments if isinstance(call.arguments, dict) else str(call.arguments or ""))
        for call in find_calls(_THOUGHT.sub("", text), {})
    ]


def completion_columns(step: Step) -> dict[str, list[str]]:
    """Columns for TRL's table of completions: values of each rollout's turns as text, empty where there are none."""
    columns = dict.fromkeys(TURN_COLUMNS, [""] * len(step.global_outcome))
    if step.global_advantages is None or step.global_beliefs is None or step.global_gains is None:
        return columns
    is_turn = torch.arange(step.global_advantages.shape[1]) < step.global_num_turns[:, None]
    advantages = step.global_advantages.masked_fill(~is_turn, torch.nan)
    tables = zip(columns, (step.global_beliefs, step.global_gains, advantages), strict=True)
    return {name: [" ".join(f"{x:+.3f}" for x in row if x == x) for row in table.tolist()] for name, table in tables}


def _number_or_none(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or value != value else value


def replace_logged_advantages(logged: deque[float], step: Step) -> None:
    """Replace the scalar advantages that the parent has just logged by the mean over the turns of each rollout."""
    assert step.global_advantages is not None
    means = (step.global_advantages.sum(dim=1) / step.global_num_turns).tolist()
    for _ in means:
        logged.pop()
    logged.extend(means)
