"""What signatures are made of: what a run that goes wrong looks like in its numbers, and what to change."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .facts import Facts, RunFacts

#: Rollouts that a signature needs, because fewer show it by chance.
FEWEST = 32


class NotCheckedError(Exception):
    """What a signature reads is not there; the message says what is missing."""


@dataclass(frozen=True)
class Finding:
    """
    A signature that a run shows.

    Attributes:
        name (`str`): of the signature.
        evidence (`str`): what was seen.
        change (`str`): what to change, with the names of options.
        numbers (`dict[str, float]`): the evidence as numbers.
        steps (tuple of `int`): the first and the last step that they are from.
    """

    name: str
    evidence: str
    change: str
    numbers: dict[str, float]
    steps: tuple[int, int] = (0, 0)


Seen = tuple[str, dict[str, float]] | None


@dataclass(frozen=True)
class Signature:
    """A signature: `check` returns evidence and numbers if a run shows it, else `None`."""

    name: str
    check: Callable[[RunFacts], Seen]
    change: str = field(repr=False)


SIGNATURES: list[Signature] = []


def signature(change: str) -> Callable[[Callable[[RunFacts], Seen]], Callable[[RunFacts], Seen]]:
    def register(check: Callable[[RunFacts], Seen]) -> Callable[[RunFacts], Seen]:
        SIGNATURES.append(Signature(check.__name__, check, change))
        return check

    return register


def enough(values: Sequence[Any], what: str, fewest: int = FEWEST) -> Sequence[Any]:
    if len(values) < fewest:
        raise NotCheckedError(f"{len(values)} {what}, needs {fewest}")
    return values


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def share_of(flags: Sequence[bool]) -> float:
    return mean([float(flag) for flag in flags])


def z_score(values: Sequence[float], others: Sequence[float] = (0.0,)) -> float:
    """Difference of two means in units of its standard error; the sign is that of the first less the second."""
    variance = float(np.var(values) / len(values) + np.var(others) / len(others))
    return (mean(values) - mean(others)) / max(variance, 1e-18) ** 0.5


def scored(rollouts: Sequence[Facts]) -> list[Facts]:
    """The rollouts with a belief before their first and their last turn."""
    return [each for each in rollouts if each.beliefs[0] is not None and each.last_belief is not None]


def rises_of(rollouts: Sequence[Facts]) -> list[tuple[float, float]]:
    return [pair for each in rollouts for pair in each.rises]


def groups_of(rollouts: Sequence[Facts]) -> list[list[Facts]]:
    groups = defaultdict(list)
    for each in rollouts:
        groups[each.group].append(each)
    return [group for group in groups.values() if len(group) > 1]
