"""Conversations that teach a tiny model to search and to answer, made from questions and passages."""

import random
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..search import Passage

if TYPE_CHECKING:
    from datasets import Dataset

ANSWER_TEMPLATE = "<answer> {answer} </answer>"
"""Form of the answers. With the spaces, a word has the same token here as in a passage."""

_NAME = re.compile(r"[A-Z0-9][\w'’.&-]*(?:\s+(?:(?:of|the|and|de|in|for)\s+){0,2}[A-Z0-9][\w'’.&-]*)*")
_QUESTION_WORDS = frozenset(
    "What Which Who Whose Whom When Where Why How In On At Of For Are Is Was Were Did Do Does The A An".split()
)

Messages = list[dict[str, Any]]


def make_conversations(
    questions: "Dataset", passages: list[Passage], tool: Callable[[str], str], rng: random.Random
) -> Iterator[Messages]:
    """
    Yields conversations without end. They alternate between the data set's questions and cloze questions on passages.

    The observations are the results of `tool`. `rng` draws order, queries and clozes.
    """
    rows = list(questions)
    rng.shuffle(rows)
    while True:
        for row in rows:
            yield _conversation(row["prompt"], row["answers"][0], row["supporting_titles"], tool, rng)
            cloze = None
            while cloze is None:
                passage = rng.choice(passages)
                cloze = make_cloze(passage, rng)
            prompt = [row["prompt"][0], {"role": "user", "content": cloze[0]}]
            yield _conversation(prompt, cloze[1], [passage.title], tool, rng)


def make_cloze(passage: Passage, rng: random.Random) -> tuple[str, str] | None:
    """
    A question and its answer: a sentence of the passage with "what" in place of a name, and the name.

    Returns `None` if the passage has no sentence of suitable length, or the chosen sentence has no name.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", passage.text) if 5 <= len(s.split()) <= 25]
    if not sentences:
        return None
    sentence = rng.choice(sentences[:2])
    names = [name for name in find_names(sentence) if name not in passage.title and len(name.split()) <= 4]
    if not names:
        return None
    name = rng.choice(names)
    return f"{passage.title}: {sentence.replace(name, 'what', 1).rstrip('.')}?", name


def find_names(text: str) -> list[str]:
    """Runs of capitalised words, without leading question words."""
    names = []
    for match in _NAME.findall(text):
        words = match.split()
        while words and words[0] in _QUESTION_WORDS:
            words.pop(0)
        names.append(" ".join(words).rstrip(".'’") if words else "")
    return [name for name in names if len(name) > 2]


def _conversation(
    prompt: Messages, answer: str, titles: list[str], tool: Callable[[str], str], rng: random.Random
) -> Messages:
    """The question, a search for words of it, sometimes a search for a title in the result, and the answer."""
    query = _query(prompt[-1]["content"], rng)
    observation = tool(query)
    messages = [*prompt, *_search_turn(query, observation)]
    shown = re.findall(r"^\[\d+\] (.+)$", observation, flags=re.MULTILINE)
    # Titles worth a second search: mentioned in the text, but not the title of a passage that was shown.
    mentioned = [title for title in titles if title in observation and title not in shown]
    candidates = mentioned or shown
    if candidates and rng.random() < (0.9 if mentioned else 0.4):
        query = f" {rng.choice(candidates)}"
        messages += _search_turn(query, tool(query))
    return [*messages, {"role": "assistant", "content": ANSWER_TEMPLATE.format(answer=answer)}]


def _search_turn(query: str, observation: str) -> Messages:
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": observation},
    ]


def _query(question: str, rng: random.Random) -> str:
    """
    A name in the question, or a short run of its words.

    It begins with a space: words then have the same tokens as in the middle of a text, and can be copied.
    """
    names = find_names(question)
    if names and rng.random() < 0.7:
        return f" {rng.choice(names)}"
    words = question.rstrip(" ?").split()
    length = min(len(words), rng.randint(3, 7))
    start = rng.randint(0, len(words) - length)
    return " " + " ".join(words[start : start + length])
