"""How good an index is for a set of questions, without any model: each question itself is the query."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.contexts import title_keys
from ..search import Searchable, open_search
from ..search.passages import Passage
from .intervals import Interval, bootstrap_interval
from .scores import has_answer, is_searchable
from .tables import Table, format_interval, format_percent, to_plain

logger = logging.getLogger(__name__)

_BATCH = 64  # queries per search
# Each of the five sets in docs/results/retrieval_quality.md finds 38 to 90 % in its own corpus, and 0 to 16 % in that
# of another, where names and years turn up by chance.
FEWEST_FOUND = 0.15


@dataclass(frozen=True)
class RetrievalScores:
    """
    What one search with the question itself finds.

    Attributes:
        dataset (`str`): name of the set.
        index (`str`): name of the index.
        questions (`int`): number of questions.
        searchable (`int`): number of those that are not yes-no questions.
        supported (`int`): number of those whose supporting titles are known.
        answer (`dict[int, Interval]`): by k, the share of `searchable` with an answer in one of the top k passages.
        recall (`dict[int, Interval]`): by k, the mean share of the supporting titles among the top k.
        recall_all (`dict[int, Interval]`): by k, the share of `supported` with all titles among the top k.
    """

    dataset: str
    index: str
    questions: int
    searchable: int
    supported: int
    answer: dict[int, Interval]
    recall: dict[int, Interval]
    recall_all: dict[int, Interval]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(to_plain(self))


def score_retrieval(
    index: Searchable | str | Path,
    questions: Iterable[dict[str, Any]],
    ks: Sequence[int] = (5, 10),
    *,
    dataset: str = "",
    name: str = "",
    progress: Callable[[int], Any] = lambda number: None,
) -> RetrievalScores:
    """
    Searches with each question, and looks for its answers and supporting titles among the results.

    Answers are looked for in title and text, see [`has_answer`]. Titles are compared without regard to case and
    extra space.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        questions (iterable of `dict`):
            Rows of [`load_questions`].
        ks (sequence of `int`, *optional*, defaults to `(5, 10)`): Numbers of results to look at.
        dataset (`str`, *optional*): Name of the questions, for the table.
        name (`str`, *optional*): Name of the index, for the table.
        progress (`Callable`, *optional*): Called with the number of questions of each batch that is finished.

    Raises:
        ValueError: There are no questions, or a k is below 1.
    """
    rows, ks = list(questions), sorted(set(ks))
    if not rows or not ks or ks[0] < 1:
        raise ValueError(f"expected questions and k of at least 1, got {len(rows)} questions and k {list(ks)}.")
    searchable = open_search(index)
    answer: dict[int, list[float]] = {k: [] for k in ks}
    recall: dict[int, list[float]] = {k: [] for k in ks}
    results = search_all(searchable, [row["prompt"][-1]["content"] for row in rows], ks[-1], progress)
    for row, passages in zip(rows, results, strict=True):
        rank = answer_rank(passages, row["answers"])
        for k in ks:
            if is_searchable(row["answers"]):
                answer[k].append(float(rank < k))
            if titles := title_keys(row["supporting_titles"]):
                among = titles & title_keys(passage.title for passage in passages[:k])
                recall[k].append(len(among) / len(titles))
    recall_all = {k: [float(value == 1) for value in values] for k, values in recall.items()}
    return RetrievalScores(
        dataset=dataset,
        index=name,
        questions=len(rows),
        searchable=len(answer[ks[0]]),
        supported=len(recall[ks[0]]),
        answer=_intervals(answer),
        recall=_intervals(recall),
        recall_all=_intervals(recall_all),
    )


def search_all(
    searchable: Searchable, queries: Sequence[str], k: int, progress: Callable[[int], Any] = lambda number: None
) -> Iterator[list[Passage]]:
    """The up to `k` passages for each query, in order; the queries are sent in batches, each counted by `progress`."""
    for first in range(0, len(queries), _BATCH):
        batch = queries[first : first + _BATCH]
        yield from searchable.search_batch(batch, k)
        progress(len(batch))


def answer_rank(passages: Sequence[Passage], answers: Sequence[str]) -> float:
    """Position, from 0, of the first passage whose title or text contains an answer; infinity if none does."""
    texts = (f"{passage.title}\n{passage.text}" for passage in passages)
    return next((float(i) for i, text in enumerate(texts) if has_answer([text], answers)), math.inf)


def _intervals(curve: dict[int, list[float]]) -> dict[int, Interval]:
    return {k: bootstrap_interval(values) for k, values in curve.items() if values}


def sample_of(questions: Sequence[Any], number: int) -> list[dict[str, Any]]:
    """Up to `number` questions, spread over all; rows without a column of supporting titles get an empty one."""
    rows = [questions[i * len(questions) // number] for i in range(number)] if len(questions) > number else questions
    return [{"supporting_titles": [], **row} for row in rows]


def check_retrieval(index: Searchable | str | Path, questions: Sequence[Any], k: int = 3, sample: int = 100) -> float:
    """
    Searches with a sample of questions before training, and warns if few of the answers are found.

    Then the index is probably one of another corpus, and training would teach the policy to search in vain.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        questions (`Dataset`, or sequence of `dict`): Rows with `prompt` and `answers`, as of [`load_questions`].
        k (`int`, *optional*, defaults to `3`): Passages per search.
        sample (`int`, *optional*, defaults to `100`): Number of questions to search with, spread over all.

    Returns:
        `float`: Share of the questions whose answer is found; NaN if none can be looked for, as with yes-no questions.
    """
    scores = score_retrieval(index, sample_of(questions, sample), [k])
    if not scores.searchable:
        return math.nan
    share = scores.answer[k].mean
    if share < FEWEST_FOUND:
        logger.warning(
            f"Only {round(share * scores.searchable)} of {scores.searchable} sampled questions have an answer among "
            f"the first {k} passages that a search with the question finds. Is this an index of another corpus? (For "
            "multi-hop questions over all of Wikipedia it may be right.) `igpo eval --retrieval-only` measures it."
        )
    return share


def retrieval_table(scores: Sequence[RetrievalScores]) -> Table:
    """One row for each set of questions and its index."""
    ks = sorted({k for one in scores for k in one.answer})
    header = ["Set", "Index", "Questions", *(f"Answer in top {k}" for k in ks)]
    header += [name for k in ks for name in (f"Recall@{k}", f"All titles in top {k}")]
    rows = []
    for one in scores:
        values = [one.answer.get(k) for k in ks]
        values += [curve.get(k) for k in ks for curve in (one.recall, one.recall_all)]
        cells = [format_interval(value, format_percent) for value in values]
        rows.append([one.dataset, one.index, str(one.questions), *cells])
    note = (
        "Percent, with 95 % bootstrap intervals over questions; the query is the question itself. Answers as "
        "whole words in title or text, yes-no questions left out. Recall is of the supporting titles, where known."
    )
    return Table("Retrieval", header, rows, note)
