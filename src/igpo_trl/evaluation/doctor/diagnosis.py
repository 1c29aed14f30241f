"""`igpo doctor`: names what goes wrong in a run, with the evidence and what to change."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import beliefs, credit, form, searching  # noqa: F401  # whose signatures are checked
from .facts import RunFacts
from .signatures import SIGNATURES, Finding, NotCheckedError


@dataclass(frozen=True)
class Diagnosis:
    """
    What was found in a run.

    Attributes:
        findings (list of [`Finding`]): the signatures that it shows.
        healthy (list of `str`): those that it does not show.
        not_checked (`dict[str, str]`): those that could not be checked, with what is missing.
        rollouts (`int`): rollouts that were read.
        steps (tuple of `int`): the first and the last step that they are from.
    """

    findings: list[Finding]
    healthy: list[str]
    not_checked: dict[str, str]
    rollouts: int
    steps: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def diagnose(run: RunFacts | str | Path) -> Diagnosis:
    """
    Checks a run for every signature.

    Args:
        run ([`RunFacts`] or `str` or `Path`): The run, or where it is on disk.

    Returns:
        [`Diagnosis`]: What was found.

    Raises:
        FileNotFoundError, ValueError: As [`load_run`].
    """
    facts = run if isinstance(run, RunFacts) else RunFacts.load(run)
    findings, healthy, not_checked = [], [], {}
    for signature in SIGNATURES:
        try:
            seen = signature.check(facts)
        except NotCheckedError as error:
            not_checked[signature.name] = str(error)
            continue
        if seen is None:
            healthy.append(signature.name)
        else:
            evidence, numbers = seen
            findings.append(Finding(signature.name, evidence, signature.change, numbers, facts.last_steps))
    return Diagnosis(findings, healthy, not_checked, len(facts.rollouts), facts.steps)
