"""Rollouts as the page reads them: each text once, and no more rollouts than a browser opens at once."""

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from ...files import encodable
from ...trajectory import Trajectory, Turn
from ..text import pieces, plain_text
from .figures import Groups, figures
from .measures import Question, grade_of, group_of, outcome_of, question_of
from .questions import Runs

MAX_ROLLOUTS = 5000


class Interned:
    """A list of values in which equal ones have one place."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        return self.places.setdefault(value, len(self.places))


def page_data(runs: Runs, max_rollouts: int = MAX_ROLLOUTS) -> dict[str, Any]:
    """
    Everything that a page shows, as plain values for JSON.

    Args:
        runs (mapping of `str` to sequence of [`Trajectory`]): One or two runs by their names, none empty.
        max_rollouts (`int`, *optional*, defaults to `5000`): How many rollouts can be read on the page. Of more, whole
            groups are taken evenly from all steps, and for up to half of the places those of the questions that the
            page lists. The figures are those of all rollouts.
    """
    if len(runs) not in (1, 2) or not all(runs.values()):
        raise ValueError(f"expected one or two runs with rollouts, got {[*map(len, runs.values())]} rollouts.")
    about, texts, questions, groups = figures(runs), Interned(), Interned(), Interned()
    lists = [about["questions"][kind] for kind in ("lost", "gained")]
    listed = [entry["question"] for pair in zip_longest(*lists) for entry in pair if entry]
    rollouts = []
    for i, run in enumerate(runs.values()):
        places = {id(rollout): place for place, rollout in enumerate(run)}
        for rollout in _chosen(run, max_rollouts // len(runs), listed):
            question = questions((*question_of(rollout), tuple(map(encodable, rollout.answers))))
            record = {
                "run": i,
                "place": places[id(rollout)],
                "question": question,
                "group": groups((i, *group_of(rollout))),
                "step": rollout.step,
                "outcome": outcome_of(rollout),
                "grade": grade_of(rollout),
                "rewards": rollout.rewards,
                "stop": rollout.stop_reason,
                "seconds": rollout.seconds,
                "turns": [_turn(turn, texts) for turn in rollout.turns],
            }
            rollouts.append({name: value for name, value in record.items() if value is not None})
    place_of = {Question(*key[:2]): place for key, place in reversed(questions.places.items())}
    for entries in lists:
        entries[:] = [
            {**entry, "question": place_of[entry["question"]]} for entry in entries if entry["question"] in place_of
        ]
    return {
        "runs": [{"name": name, "rollouts": len(run)} for name, run in runs.items()],
        "figures": about,
        "questions": [[encodable(text), data_set, answers] for data_set, text, answers in questions.places],
        "texts": list(texts.places),
        "rollouts": rollouts,
    }


def _chosen(run: Sequence[Trajectory], count: int, listed: Sequence[Question]) -> list[Trajectory]:
    """Whole groups in their order: for up to half of the places those of listed questions, others evenly."""
    if len(run) <= count:
        return list(run)
    groups = Groups.of(run).groups
    rank = {question: place for place, question in enumerate(listed)}
    of_lists = sorted(
        (group for group in groups if question_of(group[0]) in rank), key=lambda g: rank[question_of(g[0])]
    )
    kept, size = [], 0
    for group in of_lists:
        if size + len(group) <= count / 2:
            kept.append(group)
            size += len(group)
    chosen = {id(group) for group in kept}
    others = [group for group in groups if id(group) not in chosen]
    stride = max(1.0, sum(map(len, others)) / (count - size))
    kept += [others[int(i * stride)] for i in range(int(len(others) / stride))]
    ids = {id(rollout) for group in kept for rollout in group}
    return [rollout for rollout in run if id(rollout) in ids][:count]


def _turn(turn: Turn, texts: Interned) -> list[Any]:
    """`[pieces, observations, tokens, belief, gain, advantage, beliefs of aliases, errors]`, without an empty end."""
    values = [
        [[piece.kind, piece.text] for piece in pieces(turn.text)],
        [texts(text) for part in turn.observation.split("\n\n") if (text := _paragraph(part))],
        turn.num_tokens,
        *map(_short, (turn.belief, turn.info_gain, turn.advantage)),
        [*map(_short, turn.alias_beliefs)],
        [call.error for call in turn.calls if call.error is not None],
    ]
    while values and values[-1] in (None, []):
        values.pop()
    return values


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _paragraph(text: str) -> str:
    """A result without markers of the chat template; its lines stay lines, so that a title stands apart."""
    return "\n".join(filter(None, map(plain_text, text.splitlines())))


def to_json(data: Any) -> str:
    """JSON that stands in a `<script>` element of a page: no text in it can end the element or open a comment."""
    try:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinity, which the reward of somebody's own function may be
        text = json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":"))
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate becomes its escape
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
