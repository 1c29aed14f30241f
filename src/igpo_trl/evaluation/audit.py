"""Which questions can be answered from a corpus: whether it has what they need, and whether searches find it."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.contexts import title_keys
from ..search import Searchable, open_search
from ..search.passages import Passage
from .retrieval import answer_rank, sample_of, search_all
from .scores import AnswerFinder, is_searchable
from .tables import Table, format_share

logger = logging.getLogger(__name__)

# In corpora that were made from the contexts of their own questions it is 0 to 0.2 %.
MOST_UNANSWERABLE = 0.02
LARGEST_CHECKED = 100_000
"""Number of passages that [`check_answerable`] reads at most, in a second or two; a quarter of it without titles."""

_ALL = "all"

#: What is counted of every question, with its heading.
MEASURES = {
    "titles": "Titles in corpus",
    "answer": "Answer in corpus",
    "answer_in_titles": "Answer under titles",
    "answerable": "Answerable",
    "answer_by_question": "Answer in top {k}, by question",
    "titles_by_question": "Titles in top {k}, by question",
    "answer_by_titles": "Answer in top {k}, by titles",
    "titles_by_titles": "Titles in top {k}, by titles",
}


@dataclass(frozen=True)
class QuestionAudit:
    """
    What a corpus has for one question. What cannot be judged is `None`: answers of yes-no questions, titles that are
    unknown, and whatever needs the whole corpus if that is on a server.

    Attributes:
        id, dataset, question (`str`), hops (`int` or `None`), answers (`list[str]`): the question.
        missing_titles (`list[str]` or `None`): supporting titles that no passage has.
        answer (`bool` or `None`): whether a passage contains an answer.
        answer_in_titles (`bool` or `None`): whether one with a supporting title does.
        answer_by_question, titles_by_question (`bool` or `None`):
            Whether the first k passages for the question contain an answer, and have all titles.
        answer_by_titles, titles_by_titles (`bool` or `None`): The same of searches for each supporting title.
    """

    id: str
    dataset: str
    hops: int | None
    question: str
    answers: list[str]
    missing_titles: list[str] | None = None
    answer: bool | None = None
    answer_in_titles: bool | None = None
    answer_by_question: bool | None = None
    titles_by_question: bool | None = None
    answer_by_titles: bool | None = None
    titles_by_titles: bool | None = None

    @property
    def titles(self) -> bool | None:
        """Whether the corpus has all supporting titles."""
        return None if self.missing_titles is None else not self.missing_titles

    @property
    def answerable(self) -> bool | None:
        """
        Whether the corpus has all supporting titles, and an answer in a passage with one of them: elsewhere a city or
        a year turns up by chance. Without known titles, an answer anywhere has to do.
        """
        known = [value for value in (self.titles, self._answer) if value is not None]
        return all(known) if known else None

    @property
    def _answer(self) -> bool | None:
        return self.answer if self.titles is None else self.answer_in_titles

    @property
    def reason(self) -> str:
        """Why the question cannot be answered."""
        if self.missing_titles:
            return f"no passage is titled {' or '.join(map(repr, self.missing_titles))}"
        where = "" if self.titles is None else " with the supporting titles"
        return f"no passage{where} contains an answer" if self._answer is False else ""


@dataclass(frozen=True)
class Audit:
    """The result of [`audit_questions`], with the number of passages (`None`: unknown) and of results per search."""

    questions: list[QuestionAudit]
    passages: int | None
    k: int | None

    @property
    def unanswerable(self) -> list[QuestionAudit]:
        """Questions that cannot be answered from the corpus. Those that cannot be judged are not among them."""
        return [question for question in self.questions if question.answerable is False]

    def groups(self) -> dict[tuple[str, str], list[QuestionAudit]]:
        """Questions by data set and hops; where there are several, also those of each set, and all."""
        groups: dict[tuple[str, str], list[QuestionAudit]] = defaultdict(list)
        for question in self.questions:
            groups[question.dataset, str(question.hops or "?")].append(question)
        result: dict[tuple[str, str], list[QuestionAudit]] = {}
        for dataset in sorted({dataset for dataset, _ in groups}):
            of_set = {key: groups[key] for key in sorted(groups) if key[0] == dataset}
            result |= of_set
            if len(of_set) > 1:
                result[dataset, _ALL] = [question for part in of_set.values() for question in part]
        if len({dataset for dataset, _ in result}) > 1:
            result[_ALL, _ALL] = self.questions
        return result

    def table(self) -> Table:
        """Percent of the questions of each group."""
        names = [name for name in MEASURES if self.k or "_by_" not in name]
        rows = []
        for (dataset, hops), questions in self.groups().items():
            cells = [share_of(questions, name) for name in names]
            shares = [format_share(cell["share"]) if cell["of"] else "" for cell in cells]
            rows.append([dataset, hops, str(len(questions)), *shares])
        note = "Percent. Left out: answers of yes-no questions, and titles that are unknown."
        header = ["Set", "Hops", "Questions", *(MEASURES[name].format(k=self.k) for name in names)]
        return Table("What the corpus has for the questions", header, rows, note)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        groups = [
            {"dataset": dataset, "hops": hops, "questions": len(questions)}
            | {name: share_of(questions, name) for name in MEASURES}
            for (dataset, hops), questions in self.groups().items()
        ]
        unanswerable = [asdict(question) | {"reason": question.reason} for question in self.unanswerable]
        return {"passages": self.passages, "k": self.k, "groups": groups, "unanswerable": unanswerable}


def share_of(questions: Iterable[QuestionAudit], measure: str) -> dict[str, Any]:
    """How many questions a measure is true of, of how many it can be judged, and their share (`None` if of none)."""
    values = [value for question in questions if (value := getattr(question, measure)) is not None]
    return {"count": sum(values), "of": len(values), "share": sum(values) / len(values) if values else None}


def _untracked(items: Iterable[Any], **options: Any) -> Iterable[Any]:
    return items


def audit_questions(
    index: Searchable | str | Path,
    questions: Iterable[dict[str, Any]],
    k: int | None = 10,
    *,
    under_titles_only: bool = False,
    track: Callable[..., Iterable[Any]] = _untracked,
) -> Audit:
    """
    Looks up the supporting titles and the answers of questions in a corpus, then searches with each question, and with
    each of its supporting titles.

    The corpus is read once, one passage at a time. That takes about 50 µs per passage.

    Args:
        index (`Searchable`, `str` or `Path`):
            What to search: an index, or what [`open_search`] opens. A server does not show its corpus, so there only
            the searches are judged.
        questions (iterable of `dict`): Rows of [`load_questions`].
        k (`int`, *optional*, defaults to `10`): Results per search. `None` does not search.
        under_titles_only (`bool`, *optional*, defaults to `False`):
            Whether to look for answers only in the passages that have a supporting title, if all questions have
            titles. That is all that [`QuestionAudit.answerable`] needs, and takes a fifth of the time.
        track (`Callable`, *optional*): Shows progress, as `tqdm` does: called with an iterable, `total` and `desc`.

    Raises:
        ValueError: There are no questions.
    """
    rows = [{"supporting_titles": [], **row} for row in questions]
    if not rows:
        raise ValueError("there are no questions to audit.")
    searchable = open_search(index)
    passages = getattr(searchable, "passages", None)
    nothing: list[dict[str, Any]] = [{} for _ in rows]
    in_corpus = nothing if passages is None else _look_up(passages, rows, track, under_titles_only)
    found = nothing if k is None else _search(searchable, rows, k, track)
    about = (
        {"question": row["prompt"][-1]["content"], "answers": row["answers"], "hops": row.get("hops")}
        | {name: str(row.get(name, "")) for name in ("id", "dataset")}
        for row in rows
    )
    audits = [QuestionAudit(**one, **held, **hits) for one, held, hits in zip(about, in_corpus, found, strict=True)]
    return Audit(audits, None if passages is None else len(passages), k)


def check_answerable(
    index: Searchable | str | Path, questions: Sequence[Any], sample: int = 200, command: str = "igpo data audit"
) -> float:
    """
    Looks up a sample of questions in the corpus before training, and warns if some cannot be answered from it.

    Nothing is done for a server, or a corpus that is too large to be read in a second or two.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        questions (`Dataset`, or sequence of `dict`): Rows as of [`load_questions`].
        sample (`int`, *optional*, defaults to `200`): Number of questions to look up, spread over all.
        command (`str`, *optional*): What the warning recommends to run.

    Returns:
        `float`: Share of the questions that cannot be answered; NaN if nothing was done, or nothing can be judged.
    """
    searchable = open_search(index)
    passages = getattr(searchable, "passages", None)
    if passages is None:
        return math.nan
    rows = sample_of(questions, sample)
    if len(passages) > LARGEST_CHECKED // (1 if all(row["supporting_titles"] for row in rows) else 4):
        logger.info("Not checked, for its size: whether the corpus can answer the questions. `%s` does it.", command)
        return math.nan
    audit = audit_questions(searchable, rows, k=None, under_titles_only=True)
    answerable = share_of(audit.questions, "answerable")
    if not answerable["of"]:
        return math.nan
    bad, share = audit.unanswerable, 1 - answerable["share"]
    if share > MOST_UNANSWERABLE:
        logger.warning(
            f"{len(bad)} of {answerable['of']} sampled questions ({share:.0%}) cannot be answered from the corpus, as "
            f"{bad[0].question!r}: {bad[0].reason}. `{command}` shows more, and writes the others to a file."
        )
    return float(share)


def _look_up(
    passages: Sequence[Passage],
    rows: Sequence[dict[str, Any]],
    track: Callable[..., Iterable[Any]],
    under_titles_only: bool,
) -> list[dict[str, Any]]:
    """What the whole corpus has for each row."""
    searchable = [row for row in rows if is_searchable(row["answers"])]
    everywhere = not under_titles_only or not all(row["supporting_titles"] for row in searchable)
    finder = AnswerFinder(answer for row in searchable for answer in row["answers"])
    wanted = set[str]().union(*(title_keys(row["supporting_titles"]) for row in rows))
    answers = set[str]()  # that occur
    under = dict[str, set[str]]()  # those in the passages of a title, by the titles that occur
    for passage in track(passages, total=len(passages), desc="Reading the corpus"):
        (key,) = title_keys([passage.title])
        if everywhere or key in wanted:
            here = finder.find(f"{passage.title}\n{passage.text}")
            answers |= here
            if key in wanted:
                under.setdefault(key, set()).update(here)
    results = []
    for row in rows:
        titles = row["supporting_titles"]
        result: dict[str, Any] = {}
        if titles:
            result["missing_titles"] = [title for title in titles if title_keys([title]).isdisjoint(under)]
        if is_searchable(row["answers"]):
            if everywhere:
                result["answer"] = not answers.isdisjoint(row["answers"])
            if titles:
                near = set[str]().union(*(under.get(key, ()) for key in title_keys(titles)))
                result["answer_in_titles"] = not near.isdisjoint(row["answers"])
        results.append(result)
    return results


def _search(
    searchable: Searchable, rows: Sequence[dict[str, Any]], k: int, track: Callable[..., Iterable[Any]]
) -> Iterator[dict[str, Any]]:
    """What searches find for each row."""
    queries = [[row["prompt"][-1]["content"], *filter(None, row["supporting_titles"])] for row in rows]
    results = search_all(searchable, [query for of_row in queries for query in of_row], k)
    for row, of_row in track(zip(rows, queries, strict=True), total=len(rows), desc="Searching"):
        by_question, *by_titles = islice(results, len(of_row))
        found = [passage for result in by_titles for passage in result]
        yield _judge(row, by_question, "question") | _judge(row, found, "titles")


def _judge(row: dict[str, Any], passages: Sequence[Passage], by: str) -> dict[str, bool]:
    result = {}
    titles = title_keys(row["supporting_titles"])
    if is_searchable(row["answers"]) and (titles or by == "question"):
        result[f"answer_by_{by}"] = answer_rank(passages, row["answers"]) < len(passages)
    if titles:
        result[f"titles_by_{by}"] = titles <= title_keys(passage.title for passage in passages)
    return result
