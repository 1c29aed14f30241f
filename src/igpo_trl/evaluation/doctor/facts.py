"""What the diagnosis reads of a run: a few numbers of each rollout, the trainer's log and its options."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...rewards import extract_answer
from ...trajectory import Trajectory, load_run
from ..scores import as_evidence, echoes, has_answer, is_searchable
from ..settings import OPTIONS_FILE

#: Share of the steps that counts as the end of a run, and as its beginning.
WINDOW = 0.25
#: Rollouts that the end of a run has at least, if there are as many.
FEW = 128
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Facts:
    """
    The numbers of one rollout.

    Attributes:
        step (`int`): at which it was sampled.
        group: what the rollouts that it was compared with have in common.
        question (`str`): its question, or its prompt.
        outcome (`float` or `None`): as recorded.
        stop (`str` or `None`): why it ended.
        beliefs, advantages (list of `float` or `None`): of each turn, as recorded.
        sampled, observed (list of `int`): tokens of each turn, and of the observation after it.
        searches (`int`): turns that are followed by an observation.
        stated (`int` or `None`): the first turn whose observation states an answer; `None` if none does.
        searchable (`bool`): whether it makes sense to look for the answer in a text.
        queries, repeated, with_answer (`int`): tool calls; those that the rollout had made before; those that contain
            an answer which nothing before them states.
        echoed (`bool` or `None`): whether the answer shares words with the right one, and all of them are in the
            question; `None` where the question is not known.
        malformed (`int`): its tool calls that cannot be read.
    """

    step: int
    group: Any
    question: str
    outcome: float | None
    stop: str | None
    beliefs: list[float | None]
    advantages: list[float | None]
    sampled: list[int]
    observed: list[int]
    searches: int
    stated: int | None
    searchable: bool
    queries: int
    repeated: int
    with_answer: int
    echoed: bool | None = None
    malformed: int = 0

    @classmethod
    def of(cls, trajectory: Trajectory) -> "Facts":
        """The facts of a record."""
        turns, answers = trajectory.turns, trajectory.answers
        searchable = bool(answers) and is_searchable(answers)
        question = trajectory.question or trajectory.prompt
        known = searchable and has_answer([question], answers)
        stated, asked, repeated, with_answer = None, set[str](), 0, 0
        for k, turn in enumerate(turns):
            for call in turn.calls:
                text = json.dumps(call.arguments, ensure_ascii=False, sort_keys=True, default=str)
                repeated += (key := f"{call.name} {text.casefold()}") in asked
                asked.add(key)
                with_answer += searchable and not known and stated is None and has_answer([text], answers)
            if searchable and stated is None and has_answer([as_evidence(turn.observation)], answers):
                stated = k
        return cls(
            step=trajectory.step,
            group=(trajectory.step, trajectory.group, trajectory.prompt),
            question=question,
            outcome=trajectory.outcome,
            stop=trajectory.stop_reason,
            beliefs=trajectory.beliefs,
            advantages=[turn.advantage for turn in turns],
            sampled=[turn.num_tokens for turn in turns],
            observed=[turn.observation_tokens for turn in turns],
            searches=sum(bool(turn.observation) for turn in turns),
            stated=stated,
            searchable=searchable,
            queries=sum(len(turn.calls) for turn in turns),
            repeated=repeated,
            with_answer=with_answer,
            echoed=echoes(extract_answer(turns[-1].text), answers, question) if trajectory.question else None,
            malformed=sum(call.error == "malformed" for turn in turns for call in turn.calls),
        )

    @property
    def turns(self) -> int:
        """Its turns."""
        return len(self.beliefs)

    @property
    def rises(self) -> list[tuple[float, float]]:
        """The belief before and after each turn that has both."""
        return [(a, b) for a, b in pairwise(self.beliefs) if a is not None and b is not None]

    @property
    def answered(self) -> bool:
        """Whether it ended by itself, with an answer."""
        return self.stop in ("answered", "stop_tool")

    @property
    def last_belief(self) -> float | None:
        """The belief before the last turn."""
        return self.beliefs[-1]


@dataclass(frozen=True)
class RunFacts:
    """
    What is known of a run.

    Attributes:
        rollouts (list of [`Facts`]): in the order of their steps.
        log (list of `dict`): the trainer's log history; empty if there is none.
        options (`dict`): of the training, as far as they are known.
    """

    rollouts: Sequence[Facts]
    log: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        trajectories: Iterable[Trajectory],
        log: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> "RunFacts":
        """The facts of records."""
        return cls([Facts.of(each) for each in trajectories], log, options or {})

    @classmethod
    def load(cls, run: str | Path) -> "RunFacts":
        """
        The facts of a run on disk: its records, the newest `trainer_state.json`, and `igpo.yaml`.

        Raises:
            FileNotFoundError, ValueError: As [`load_run`].
        """
        run = Path(run)
        return cls.of(load_run(run), _log_of(run), _options(run / OPTIONS_FILE))

    @cached_property
    def steps(self) -> tuple[int, int]:
        """The first and the last step that there are rollouts of."""
        return self.rollouts[0].step, self.rollouts[-1].step

    @cached_property
    def last_steps(self) -> tuple[int, int]:
        """The steps that count as the end of the run: a quarter of them, or more if these have few rollouts."""
        first, last = self.steps
        quarter = last + 1 - max(1, int(WINDOW * (last - first + 1)))
        return min(quarter, self.rollouts[-min(FEW, len(self.rollouts))].step), last

    @cached_property
    def recent(self) -> list[Facts]:
        """The rollouts at the end of the run."""
        return [each for each in self.rollouts if each.step >= self.last_steps[0]]

    @cached_property
    def early(self) -> list[Facts]:
        """The rollouts at its beginning, as many steps as a quarter; none if these already belong to its end."""
        (first, last), (recent, _) = self.steps, self.last_steps
        return [each for each in self.rollouts if each.step < min(recent, first + int(WINDOW * (last - first + 1)))]

    def logged(self, name: str, *, recent: bool = True) -> list[float]:
        """The values of a metric in the log, at the end of the run or in all of it."""
        since = self.last_steps[0] if recent else 0
        return [float(line[name]) for line in self.log if name in line and line.get("step", 0) > since]


def _log_of(run: Path) -> list[dict[str, Any]]:
    """The log history of a run, or of its last checkpoint if that is newer; none if it has neither."""
    checkpoints = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    files = [folder / STATE_FILE for folder in (run, *checkpoints[-1:])]
    states = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    newest: dict[str, Any] = max(states, key=lambda state: state.get("global_step") or 0, default={})
    return list(newest.get("log_history", []))


def _options(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    import yaml

    options = yaml.safe_load(file.read_text(encoding="utf-8"))
    return options if isinstance(options, dict) else {}
