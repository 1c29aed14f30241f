"""The record of one rollout: what the policy did, what it saw, and what it believed after each turn.

This is all that training, evaluation and viewing share: it needs neither torch nor TRL. On disk it is JSON Lines, one
rollout a line, in the `trajectories` folder of a run: `rank0.jsonl`, `rank0.1.jsonl` and so on for each process.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from .files import replace_when_complete

logger = logging.getLogger(__name__)

#: Version of the records that are written. Version 1 had neither `version` nor the fields that came with version 2.
VERSION = 2
#: Bytes after which the records of a process continue in another file.
MAX_FILE_BYTES = 64 << 20
TRAJECTORIES, RUN_FILE, VERDICTS_FILE = "trajectories", "run.json", "verdicts.jsonl"
#: The error of a call that could have run, had no limit ended the rollout before.
NOT_RUN = "not_run"

_RANK_FILE = re.compile(r"rank(\d+)(?:\.(\d+))?\.jsonl")


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWERED = "answered"
    """The policy ended its turn without calling a tool, or gave an answer before any call."""
    TURN_LIMIT = "turn_limit"
    """It called a tool in the last turn that `max_turns` or `max_tool_calling_iterations` allows."""
    TURN_LENGTH_LIMIT = "turn_length_limit"
    """`max_turn_length` or `generation_kwargs` cut a turn off before any call was complete."""
    LENGTH_LIMIT = "length_limit"
    """`max_completion_length` was reached, or left no room for an observation and another turn."""
    CONTEXT_LIMIT = "context_limit"
    """The same with the model's context."""
    MALFORMED = "malformed"
    """It sampled a tool call that cannot be read, and `on_malformed_tool_call="end"`."""
    STOP_TOOL = "stop_tool"
    """It called one of the `stop_tools`."""
    EMPTY = "empty"
    """The backend sampled nothing."""


@dataclass
class Call:
    """
    A tool call of a turn.

    Attributes:
        name (`str`): of the tool, as the policy wrote it; `"unknown"` if it wrote none that can be read.
        arguments (`dict` or `str`): as the tool got them, by parameter; their text if JSON cannot express them. Empty
            for a call that cannot be read: it is in the turn's text.
        error (`str` or `None`): why there is no result: `"malformed"`, `"unknown_tool"`, `"bad_arguments"`,
            `"raised"`, `"timeout"`, `"not_text"`, or `"not_run"` if a limit ended the rollout first.
    """

    name: str
    arguments: dict[str, Any] | str = field(default_factory=dict)
    error: str | None = None


@dataclass
class Turn:
    """
    One turn: what the policy sampled, and the observation that followed.

    Attributes:
        text (`str`): the sampled tokens, decoded with special tokens; empty where the length limit left no room.
        observation (`str`): the tokens between this turn and the next one, decoded; empty after the last turn.
        num_tokens (`int`): sampled tokens.
        belief (`float` or `None`): probability of the right answer before this turn (geometric mean over its tokens).
        info_gain (`float` or `None`): gain of this turn; `None` for the last turn and where no belief was scored.
        advantage (`float` or `None`): the advantage that every sampled token of the turn was trained with.
        calls (list of [`Call`]): its tool calls; none in a turn that begins with an answer.
        observation_tokens (`int`): tokens of the observation.
        alias_beliefs (list of `float`): the belief in each of the `answers`, in their order, which `belief` reduces to
            one number; empty where none was scored.
    """

    text: str
    observation: str = ""
    num_tokens: int = 0
    belief: float | None = None
    info_gain: float | None = None
    advantage: float | None = None
    calls: list[Call] = field(default_factory=list)
    observation_tokens: int = 0
    alias_beliefs: list[float | None] = field(default_factory=list)


@dataclass
class Trajectory:
    """
    One rollout.

    Attributes:
        prompt (`str`): the rendered prompt.
        turns (list of [`Turn`]): at least one.
        answers (list of `str`): right answers, the first is the gold one.
        outcome (`float` or `None`): weighted sum of the reward functions; `None` if none applied.
        rewards (`dict[str, float | None]`): each reward function's value.
        step (`int`): optimizer step at which it was sampled.
        group (`int`): number of its group within the batch.
        stop_reason (`str` or `None`): why it ended, a [`StopReason`]; `None` if unknown.
        info (`dict`): anything else, JSON-serialisable.
        question (`str`): the last user message of the prompt as plain text; empty if unknown.
        data_set (`str` or `None`): the set that the question is from, where the questions say so.
        seconds (`float` or `None`): wall time in which its process generated the batch (sampling, tools, beliefs
            scored meanwhile), divided by the number of its rollouts, so that the sum over them is the time of the
            batch; `None` where it was not measured.
        version (`int`): version of the record. Older ones are brought up to date when they are read.
    """

    prompt: str
    turns: list[Turn]
    answers: list[str] = field(default_factory=list)
    outcome: float | None = None
    rewards: dict[str, float | None] = field(default_factory=dict)
    step: int = 0
    group: int = 0
    stop_reason: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    question: str = ""
    data_set: str | None = None
    seconds: float | None = None
    version: int = VERSION

    @property
    def beliefs(self) -> list[float | None]:
        """Belief before each turn; entry k > 0 is the belief after turn k and its observation."""
        return [turn.belief for turn in self.turns]

    def to_json(self) -> str:
        """One line of JSON."""
        turns = [{**vars(turn), "calls": [vars(call) for call in turn.calls]} for turn in self.turns]
        return json.dumps({"version": self.version, **vars(self), "turns": turns}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> "Trajectory":
        """
        The inverse of [`Trajectory.to_json`]; reads the records of earlier versions too.

        Raises:
            `ValueError`: this is no record, or one of a later version.
        """
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, got {type(record).__name__}")
        version = record.get("version", 1)
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"the record has version {version!r}, expected at most {VERSION}: update the package with "
                "`pip install -U igpo-trl`"
            )
        if version == 1 and isinstance(info := record.get("info", {}), dict):
            record = {"question": info.get("question", ""), "data_set": info.get("dataset")} | record
        turns = [
            _make(Turn, turn, calls=[_make(Call, call) for call in turn.get("calls", ())])
            for turn in record.get("turns", ())
        ]
        if not turns:
            raise ValueError("expected a list of at least one turn in `turns`, got none")
        return _make(cls, record, turns=turns, version=VERSION)


def _make(kind: Any, record: Mapping[str, Any], **converted: Any) -> Any:
    """A dataclass of this module from its record; says which field is unknown."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(record) - known):
        raise ValueError(
            f"unknown field {unknown[0]!r} in a {kind.__name__.lower()}, expected {', '.join(sorted(known))}: it may "
            "come from a later release, update the package with `pip install -U igpo-trl`"
        )
    return kind(**{**record, **converted})


class RolloutKey(NamedTuple):
    """Identifies a rollout of an evaluation: the data set and the id of its question, and the number of the sample."""

    dataset: str
    id: str
    sample: int

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "RolloutKey":
        """The key of anything with these three fields: a question to roll out, or a verdict."""
        return cls(record["dataset"], str(record["id"]), record["sample"])


def key_of(trajectory: Trajectory) -> RolloutKey:
    """The key in `info`. Rollouts of a training run have none there: their prompt serves as the id."""
    return RolloutKey.of_record({"dataset": "all", "id": trajectory.prompt, "sample": 0} | trajectory.info)


# --------------------------------------------------------------------------------------------------------------- files


def write_jsonl(
    path: str | Path, trajectories: Iterable[Trajectory], append: bool = False, max_bytes: int = MAX_FILE_BYTES
) -> None:
    """
    Write trajectories, one a line; parent folders are made.

    Args:
        path (`str` or `Path`): the file, such as `trajectories/rank0.jsonl`.
        trajectories (iterable of [`Trajectory`]): what to write.
        append (`bool`, *optional*, defaults to `False`): keep what is there. Once a file has `max_bytes`, the next one
            follows: `rank0.1.jsonl`, `rank0.2.jsonl` and so on. A process that is killed leaves at most an incomplete
            last line.
        max_bytes (`int`, *optional*): that size; 64 MiB by default.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if append:
        parts = [path]
        while (following := path.with_suffix(f".{len(parts)}{path.suffix}")).exists():
            parts.append(following)
        path = following if parts[-1].exists() and parts[-1].stat().st_size >= max_bytes else parts[-1]
    lines = "".join([trajectory.to_json() + "\n" for trajectory in trajectories])
    # A lone surrogate, which UTF-8 cannot encode, becomes its escape, which JSON can read.
    with path.open("ab" if append else "wb") as file:
        file.write(lines.encode("utf-8", "backslashreplace"))


def drop_later(path: str | Path, step: int) -> None:
    """
    Remove the trajectories of a step and of all later ones from a file, and lines that are not trajectories.

    Training that resumes from a checkpoint samples those steps again. A last line that a killed process left
    incomplete is removed as well.
    """
    with replace_when_complete(path) as temporary:
        with Path(path).open("rb") as file, temporary.open("wb") as earlier:
            for line in file:
                try:
                    if json.loads(line)["step"] < step:
                        earlier.write(line)
                except (ValueError, KeyError, TypeError):
                    continue


def read_jsonl(path: str | Path) -> Iterator[Trajectory]:
    """
    Read trajectories one by one. An incomplete last line, as a killed process leaves it, is skipped with a warning.

    Raises:
        `ValueError`: names the file and the line that is not a trajectory.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield Trajectory.from_json(line)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                if not line.endswith(b"\n") and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                    logger.warning("%s: skipped line %d, the last one, which is incomplete.", path, number)
                    return
                raise ValueError(f"{path}, line {number}: not a trajectory ({error}).") from error


def record_files(run: str | Path) -> list[Path]:
    """The files of a run's rollouts, by process and in the order in which they were written."""
    folders = [folder for folder in (Path(run, TRAJECTORIES), Path(run)) if folder.is_dir()]
    parts = [(path, _RANK_FILE.fullmatch(path.name)) for folder in folders[:1] for path in folder.iterdir()]
    numbers = {path: (int(match[1]), int(match[2] or 0)) for path, match in parts if match is not None}
    return sorted(numbers, key=numbers.__getitem__)


def load_run(run: str | Path) -> list[Trajectory]:
    """
    The rollouts of a training run, of an evaluation or of the sandbox, in the order of their steps.

    A rollout that an evaluation has twice counts once. Where a judge has read one, its verdict is `info["judge"]`.

    Args:
        run (`str` or `Path`): Directory of the run, or a file of trajectories.

    Raises:
        FileNotFoundError: There are no rollouts; the message names those of the directories below that have some.
        ValueError: A line is not a trajectory; the message names the file and the line.
    """
    run = Path(run)
    files = [run] if run.is_file() else record_files(run)
    trajectories = sorted((each for file in files for each in read_jsonl(file)), key=lambda each: each.step)
    if not trajectories:
        below = sorted(str(folder.parent) for folder in run.glob(f"*/{TRAJECTORIES}"))
        raise FileNotFoundError(
            f"no rollouts in {run}. Expected the directory of a training run (with `save_trajectories`) or of an "
            f"evaluation, or a file of trajectories{f', such as {below[0]}' if below else ''}."
        )
    if not (run / RUN_FILE).is_file():
        return trajectories
    by_key: dict[RolloutKey, Trajectory] = {}
    for trajectory in trajectories:
        by_key.setdefault(key_of(trajectory), trajectory)
    for verdict in read_verdicts(run / VERDICTS_FILE):
        judged = by_key.get(RolloutKey.of_record(verdict))
        if judged is not None and verdict["prediction"] == judged.info.get("prediction"):
            judged.info["judge"] = {name: verdict[name] for name in ("correct", "reason", "model")}
    return list(by_key.values())


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Verdicts of a judge, without an incomplete last line. Raises `ValueError` if the file is damaged."""
    complete = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    try:
        return [json.loads(line) for line in complete.splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: not a file of verdicts ({error}). Remove it, and judge again.") from error
