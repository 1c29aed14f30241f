"""The seven question sets by name, and how a source of questions is resolved."""

import difflib
import os.path  # unlike the methods of Path, its functions accept any text
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import FILE_ENDINGS
from .english import SPLITS, WORLD, world_file
from .layouts import UNUSED_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset


class QuestionSet(NamedTuple):
    """A set on the hub: repository, configuration, name in this package, and the split that papers report."""

    repository: str
    config: str | None
    dataset: str
    split: str


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"

QUESTION_SETS: dict[str, QuestionSet] = {
    "nq": QuestionSet(_FLASHRAG, "nq", "nq", "test"),
    "triviaqa": QuestionSet(_FLASHRAG, "triviaqa", "triviaqa", "test"),
    "popqa": QuestionSet(_FLASHRAG, "popqa", "popqa", "test"),
    "hotpotqa": QuestionSet(_FLASHRAG, "hotpotqa", "hotpotqa", "dev"),
    "2wiki": QuestionSet(_FLASHRAG, "2wikimultihopqa", "2wiki", "dev"),
    "musique": QuestionSet(_FLASHRAG, "musique", "musique", "dev"),
    "bamboogle": QuestionSet(_FLASHRAG, "bamboogle", "bamboogle", "test"),
}
"""The seven sets by short name, all from one repository, whose splits Search-R1 and its successors use."""

ORIGINAL_SETS: dict[str, QuestionSet] = {
    original.repository.lower(): original
    for original in (
        QuestionSet("google-research-datasets/nq_open", None, "nq", "validation"),
        QuestionSet("mandarjoshi/trivia_qa", "rc.nocontext", "triviaqa", "validation"),
        QuestionSet("akariasai/PopQA", None, "popqa", "test"),
        QuestionSet("hotpotqa/hotpot_qa", "distractor", "hotpotqa", "validation"),
        QuestionSet("framolfese/2WikiMultihopQA", None, "2wiki", "validation"),
        QuestionSet("xanhho/2WikiMultihopQA", None, "2wiki", "validation"),
        QuestionSet("dgslibisey/MuSiQue", None, "musique", "validation"),
        QuestionSet("bdsaglam/musique", "answerable", "musique", "validation"),
        QuestionSet("chiayewken/bamboogle", None, "bamboogle", "test"),
    )
}
"""The same sets as published on the hub by their authors or others, by repository in lower case."""

CONTEXT_SETS: dict[str, str] = {
    "hotpotqa": "hotpotqa/hotpot_qa",
    "2wiki": "framolfese/2WikiMultihopQA",
    "musique": "dgslibisey/MuSiQue",
}
"""The sets whose questions come with paragraphs, among them the supporting ones, by short name: where these are."""

_OTHER_NAMES = {
    "tq": "triviaqa",
    "trivia_qa": "triviaqa",
    "hotpot_qa": "hotpotqa",
    "2wikimultihopqa": "2wiki",
    "2wikimultihop": "2wiki",
    "nq_open": "google-research-datasets/nq_open",
}


class Source(NamedTuple):
    """A source of questions: a file, or a data set in a folder or on the hub, with configuration and split."""

    location: str
    is_file: bool = False
    config: str | None = None
    dataset: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        details = ", ".join(part for part in (self.config, self.split) if part)
        return f"{self.location} ({details})" if details else self.location


def find_sources(
    source: str | Path | Sequence[str | Path], split: str | None = None, *, with_contexts: bool = False
) -> list[Source]:
    """
    Resolves one or several sources of [`load_questions`]. Nothing is read, so a wrong name is reported before anything
    else is done.

    Args:
        source (`str`, `Path` or sequence of these): A source, or several as a list or separated by commas.
        split (`str`, *optional*): Split of the data sets for which `source` names none.
        with_contexts (`bool`, *optional*, defaults to `False`): Whether the paragraphs that come with the questions
            are wanted, see [`find_context_source`].

    Raises:
        FileNotFoundError: A file does not exist, or a source is neither a file nor a name on the hub.
        ValueError: There is no source, the format of a file is unknown, or a set has no paragraphs.
    """
    if isinstance(source, str | Path):
        text = str(source)
        parts = [text] if os.path.exists(text) else text.split(",")
    else:
        parts = [str(part) for part in source]
    parts = [part.strip() for part in parts if part.strip()]
    if not parts:
        raise ValueError(
            f"no source of questions in {source!r}: expected a file, or one of {', '.join([*QUESTION_SETS, WORLD])}."
        )
    find = find_context_source if with_contexts else find_source
    return [find(part, split) for part in parts]


def canonical_name(name: str) -> str:
    """The short name of one of the seven sets, given any of its names (`2wikimultihopqa`); else the name itself."""
    known = QUESTION_SETS.get(_OTHER_NAMES.get(name.lower(), name.lower()))
    return known.dataset if known else name


def find_source(text: str, split: str | None = None) -> Source:
    """
    Resolves a source: one of the seven sets or `world`, an existing file or folder (`./nq` for a folder with the name
    of a set), or a data set on the hub. `name:split` names a split.

    `split` is that of a data set if `text` names none. Files have no splits.
    """
    name, _, own_split = text.partition(":")
    key = _OTHER_NAMES.get(name.lower(), name.lower())
    if known := QUESTION_SETS.get(key) or ORIGINAL_SETS.get(key):
        return Source(known.repository, False, known.config, known.dataset, own_split or split or known.split)
    if key == WORLD:
        if (part := own_split or split or "test") not in SPLITS:
            raise ValueError(
                f"{text}: there is no split {part}. Name one of {', '.join(SPLITS)}, as in {WORLD}:train."
            )
        return Source(str(world_file(part)), is_file=True)
    if os.path.exists(text):
        return _local(Path(text), split)
    if own_split and os.path.isdir(name):
        return _local(Path(name), own_split)
    split = own_split or split
    if text.endswith(FILE_ENDINGS) or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file: {text}. Expected questions in one of {', '.join(FILE_ENDINGS)}.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?", name):
        return _on_the_hub(name, split)
    close = difflib.get_close_matches(name.lower(), [*QUESTION_SETS, WORLD, *_OTHER_NAMES], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(
        f"no such file of questions, and no data set of that name: {text}.{hint} Expected a file "
        f"({', '.join(FILE_ENDINGS)}), one of {', '.join([*QUESTION_SETS, WORLD])}, or owner/name of a data set on "
        "the hub."
    )


def find_context_source(text: str, split: str | None = None) -> Source:
    """
    As [`find_source`], for the paragraphs that come with the questions: the short name of a set stands for the
    repository that has them.

    Raises:
        ValueError: The set is published without paragraphs.
    """
    name, _, own_split = text.partition(":")
    known = QUESTION_SETS.get(_OTHER_NAMES.get(name.lower(), name.lower()))
    if known is None:
        return find_source(text, split)
    if known.dataset not in CONTEXT_SETS:
        raise ValueError(
            f"{known.dataset} is published without passages. Sets with passages: {', '.join(CONTEXT_SETS)}. For other "
            "questions index a Wikipedia dump, see docs/search.md."
        )
    # These repositories call the split `validation` that has the name `dev` elsewhere.
    split = re.sub(r"^dev\b", "validation", own_split or split or "")
    return find_source(CONTEXT_SETS[known.dataset], split or None)


def _local(path: Path, split: str | None) -> Source:
    if path.is_dir():
        return Source(str(path), split=split)
    if not path.name.endswith(FILE_ENDINGS):
        raise ValueError(f"{path}: unknown layout. Expected a file that ends in {', '.join(FILE_ENDINGS)}.")
    return Source(str(path), is_file=True)


def _on_the_hub(name: str, split: str | None) -> Source:
    """`owner/name`, or `owner/name/configuration`."""
    owner, base, *rest = name.split("/")
    repository, config = f"{owner}/{base}", rest[0] if rest else None
    original = ORIGINAL_SETS.get(repository.lower())
    if original:
        split = split or original.split
    dataset = original.dataset if original else canonical_name(config) if config else None
    return Source(repository, False, config, dataset, split)


def read_dataset(source: Source, all_columns: bool = False) -> tuple[str, Iterator[dict[str, Any]]]:
    """
    Loads a split with `datasets`, from a folder or the hub: its name, and its rows, by default without the passages
    that come with the questions.
    """
    loaded = _load(source)
    if isinstance(loaded, dict):
        split = source.split or (next(iter(loaded)) if len(loaded) == 1 else "")
        if split not in loaded:
            problem = f"there is no split {split}" if split else "it has several splits, and none was named"
            raise ValueError(
                f"{source}: {problem}. Name one of {', '.join(loaded)}, as in {source.location}:{next(iter(loaded))}."
            )
        dataset = loaded[split]
    else:
        split, dataset = source.split or str(loaded.split or "train"), loaded
    unused = [column for column in dataset.column_names if column in UNUSED_COLUMNS and not all_columns]
    return split, iter(dataset.remove_columns(unused).with_format(None))


def _load(source: Source) -> "Dataset | dict[str, Dataset]":
    import datasets

    try:
        if any(Path(source.location, name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(source.location)
        return datasets.load_dataset(source.location, source.config, split=source.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(f"no such file of questions, and no data set either: {source} ({error})") from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source}: could not be loaded: {type(error).__name__}: {error}") from error
