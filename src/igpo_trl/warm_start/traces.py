"""
Traces: conversations in which someone searches as the model shall, with real results of the index.

A query uses only words that the model has seen by then, in the question or in an observation. So it never learns to
name what it cannot know.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..beliefs.probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, split_template
from ..evaluation import has_answer
from ..evaluation.scores import is_searchable
from ..files import read_json_lines

Messages = list[dict[str, Any]]

MAX_SEARCHES = 5
"""Most searches of a trace. A question with more supporting titles gets one more search than it has titles."""

MAX_USELESS = 1
"""Most searches of a trace that bring none of the supporting titles."""

STYLES = ("title", "words", "both")
"""What a query is made of: the title of the passage that is wanted, words of the question, or both."""

_SHOWN = re.compile(r"^\[\d+\] (.+)$", re.MULTILINE)  # the titles in a result of the search tool
_WORD = re.compile(r"[\w'’.&-]*\w")
# What a question is asked with, and says nothing about what it is about.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be been being both by can could did do does for from had has have he her his how if in "
    "into is it its many much name named of on or same she than that the their them these they this those to was "
    "were what when where which while who whom whose why will with would you".split()
)


@dataclass
class Traces:
    """
    Attributes:
        records (`list[dict]`): one per trace: `messages`, and `id`, `dataset`, `answers` and `style` of its question.
        dropped (`Counter[str]`): how many questions gave no trace, by reason.
    """

    records: list[dict[str, Any]]
    dropped: Counter[str] = field(default_factory=Counter)

    def save(self, path: str | Path) -> None:
        """Writes one trace per line."""
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
        Path(path).write_text("".join(lines), encoding="utf-8")

    @property
    def summary(self) -> str:
        """How many traces there are, and why other questions gave none."""
        searches = sum(message["role"] == "tool" for record in self.records for message in record["messages"])
        text = f"{len(self.records)} traces with {searches / max(1, len(self.records)):.1f} searches each"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return text + (f"; {self.dropped.total()} questions gave none ({reasons})" if reasons else "")


def make_traces(
    questions: Iterable[dict[str, Any]],
    tool: Callable[..., str],
    number: int | None = None,
    *,
    thoughts: float | None = None,
    answer_template: str | None = None,
    styles: Sequence[str] = STYLES,
    seed: int = 0,
) -> Traces:
    """
    Makes traces from questions, with real results of the search tool.

    The supporting titles of a question are searched in their order, each as soon as it is visible: in the question, or
    in what was found so far. Where none is, the query is made of words of the question. A search that brings nothing
    new is followed by another one in another form. Without titles, searching ends when an answer was found.

    Only traces whose observations contain the answer or an alias are kept; for yes and no, those that found all
    supporting titles.

    Args:
        questions (iterable of `dict`): Rows of [`load_questions`], in random order: they are used from the beginning.
        tool (`Callable`): A [`SearchTool`] with the `k` and `max_words` of the later training.
        number (`int`, *optional*): How many traces to make. Defaults to one per question.
        thoughts (`float`, *optional*): Share of the traces that think inside `<think>` before they act. Defaults to 1
            where the system prompt asks for `<think>`, else 0.
        answer_template (`str`, *optional*): The form of the answer. Defaults to that in which beliefs are scored:
            `NO_THINK_TEMPLATE`, or `DEFAULT_TEMPLATE` in traces that think.
        styles (sequence of `str`, *optional*, defaults to `STYLES`): Which of these the queries have.
        seed (`int`, *optional*, defaults to `0`): Seed of styles and words.

    Returns:
        [`Traces`]: In the order of the questions.
    """
    traces = Traces([])
    for row in questions:
        if number is not None and len(traces.records) >= number:
            break
        rng = random.Random(f"{seed}|{row['id']}")
        messages = row["prompt"]
        system = " ".join(message["content"] for message in messages[:-1])
        share = float("<think>" in system) if thoughts is None else thoughts
        trace = _Trace(row, tool, rng, rng.choice(list(styles)), rng.random() < share)
        if reason := trace.search():
            traces.dropped[reason] += 1
            continue
        template = answer_template or (DEFAULT_TEMPLATE if trace.thinks else NO_THINK_TEMPLATE)
        before, after = split_template(template)
        final = {"role": "assistant", "content": before + trace.answer + after}
        traces.records.append(
            {name: row[name] for name in ("id", "dataset", "answers")}
            | {"style": trace.style, "messages": [*messages, *trace.messages, final]}
        )
    return traces


class _Trace:
    """The searches for one question."""

    def __init__(self, row: dict[str, Any], tool: Callable[..., str], rng: random.Random, style: str, thinks: bool):
        self.tool, self.rng, self.style, self.thinks = tool, rng, style, thinks
        self.question: str = row["prompt"][-1]["content"]
        self.answers: list[str] = row["answers"]
        self.titles: list[str] = row["supporting_titles"]
        self.messages: Messages = []
        self.results: list[str] = []
        self.queries: set[str] = set()

    @property
    def answer(self) -> str:
        """The first of the answers that was read, so that it can be copied."""
        read = (answer for answer in self.answers if has_answer(self.results, [answer]))
        return next(read, self.answers[0])

    def search(self) -> str:
        """Searches until everything is found. Returns why the trace is of no use, or an empty text."""
        limit, useless = max(MAX_SEARCHES, len(self.titles) + 1), 0
        while len(self.results) < limit and not self._has_everything():
            query = next((query for query in self._queries() if _plain(query) not in self.queries), None)
            if query is None:
                break
            missing = self._missing()
            self._ask(query)
            if self.titles and self._missing() == missing:
                useless += 1
                if useless > MAX_USELESS:
                    break
        if useless > MAX_USELESS:
            return "whose passages the searches did not find"
        if is_searchable(self.answers):
            found = has_answer(self.results, self.answers)
            return "" if found else "whose answer the searches did not find"
        return "" if self.titles and not self._missing() else "of yes or no, whose passages the searches did not find"

    def _has_everything(self) -> bool:
        if not self.results:
            return False
        if self.titles:
            return not self._missing()
        return has_answer(self.results, self.answers)

    def _missing(self) -> list[str]:
        shown = {_plain(title) for result in self.results for title in _SHOWN.findall(result)}
        return [title for title in self.titles if _plain(title) not in shown]

    def _queries(self) -> Iterable[str]:
        """Queries that are worth a try now, the best first."""
        words = _content_words(self.question)
        seen = _plain(" ".join([self.question, *self.results]))
        names = [name for title in self._missing() if (name := _visible_name(title, seen))]
        ways = {"title": names[:1], "words": [" ".join(self._most(words))], "both": []}
        if names:
            rest = [word for word in words if _plain(word) not in _plain(names[0]).split()]
            ways["both"] = [" ".join([names[0], *self._most(rest)[:4]])]
        order = [self.style, *self.rng.sample(STYLES, len(STYLES))] if not self.results else ["title", "both", "words"]
        if self.results and self.style != "title" and self.rng.random() < 0.5:
            order = ["both", "title", "words"]
        for way in order:
            yield from ways[way]
        yield from names[1:]
        yield " ".join(words)

    def _most(self, words: list[str]) -> list[str]:
        """Most of the words in their order, names in any case."""
        return [word for word in words if word[0].isupper() or self.rng.random() < 0.7] or words

    def _ask(self, query: str) -> None:
        self.queries.add(_plain(query))
        result = self.tool(query=query)
        thought = f"<think>\n{self._thought(query)}\n</think>" if self.thinks else ""
        call = {"type": "function", "function": {"name": self.tool.__name__, "arguments": {"query": query}}}
        self.messages += [
            {"role": "assistant", "content": thought, "tool_calls": [call]},
            {"role": "tool", "name": self.tool.__name__, "content": result},
        ]
        self.results.append(result)

    def _thought(self, query: str) -> str:
        if not self.results:
            return self.rng.choice([f"I look for {query} first.", f"The question is about {query}."])
        return self.rng.choice([f"Next I need {query}.", f"That is not enough. I look for {query}."])


def _content_words(question: str) -> list[str]:
    """The words of a question that tell what it is about, each once; all of them if there is none."""
    words = list(dict.fromkeys(_WORD.findall(question)))
    return [word for word in words if word.lower() not in _FUNCTION_WORDS] or words


def _visible_name(title: str, seen: str) -> str | None:
    """The title, or the title without what tells it from others of that name, whichever was seen; else `None`."""
    for name in (title, re.sub(r"\s*\([^)]*\)$", "", title), title.split(",")[0]):
        if _plain(name).strip() and f" {_plain(name)} " in f" {seen} ":
            return name
    return None


def _plain(text: str) -> str:
    """Words without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_traces(path: str | Path) -> Traces:
    """
    Reads traces of your own: JSON Lines with `messages` that end with an assistant's turn.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line has no such messages (the error names it), or there is none.
    """
    records = []
    for where, record in read_json_lines(path):
        messages = record.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise ValueError(f"{where}: expected `messages`, a list of messages with `role` and `content`.")
        roles = [message["role"] for message in messages]
        if "user" not in roles or roles[-1] != "assistant":
            raise ValueError(f"{where}: expected a message of the user, and an assistant's at the end, got {roles}.")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no traces.")
    return Traces(records)
