"""System prompts, and the messages of a prompt: which of them is the question, and how they are rendered."""

import difflib
import os.path
import re
from pathlib import Path
from typing import Any

from .cells import decode

THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn, first reason inside <think> and </think>, then call a \
tool or answer. After each search, decide whether another one is needed: if the results hold the answer, answer; \
otherwise search again with other words, or for the part that is still missing.
Give the final answer inside <answer> and </answer>: a name, a number or a few words, without an explanation."""
"""System prompt for models that write down their reasoning before they act."""

NO_THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn, call a tool or answer. After each search, decide \
whether another one is needed: if the results hold the answer, answer; otherwise search again with other words, or \
for the part that is still missing.
Give the final answer inside <answer> and </answer>: a name, a number or a few words, without an explanation."""
"""System prompt for models that do not write down their reasoning."""

SYSTEM_PROMPTS: dict[str, str | None] = {
    "think": THINK_SYSTEM_PROMPT,
    "no_think": NO_THINK_SYSTEM_PROMPT,
    "none": None,
}
"""System prompts by name."""

_FILE_ENDINGS = (".txt", ".md", ".prompt")


def resolve_system_prompt(prompt: str | Path | None) -> str | None:
    """
    The text of a system prompt, given its name, its file or the text itself.

    Args:
        prompt (`str`, `Path` or `None`): `"think"`, `"no_think"` or `"none"`; the path of a text file (a `Path`, an
            existing file, or anything without a space that ends in `.txt`, `.md` or `.prompt`); or the text itself.
            `None` is no system prompt.

    Returns:
        `str` or `None`: the text without surrounding space, or `None` for no system message.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The text is empty, or a single word that is almost a name, or the file is not UTF-8.
    """
    if prompt is None or prompt in SYSTEM_PROMPTS:
        return None if prompt is None else SYSTEM_PROMPTS[str(prompt)]
    text = str(prompt)
    # `os.path.isfile`, unlike `Path.is_file`, is false for a text that is too long for a path.
    looks_like_file = text.endswith(_FILE_ENDINGS) and not any(map(str.isspace, text))
    if not isinstance(prompt, Path) and not os.path.isfile(text) and not any(map(str.isspace, text)):
        if near := difflib.get_close_matches(text.lower().replace("-", "_"), SYSTEM_PROMPTS, n=1):
            raise ValueError(f"no system prompt is called {text!r}. Did you mean {near[0]}?")
    if isinstance(prompt, Path) or looks_like_file or os.path.isfile(text):
        path = Path(prompt)
        if not path.is_file():
            raise FileNotFoundError(
                f"no such file of a system prompt: {path}. Give a text file, {', '.join(SYSTEM_PROMPTS)}, or the text."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ValueError(f"the system prompt {str(prompt)!r} is empty. Use `none` for no system message.")
    return text.strip()


# Tags with which the prompts of other projects teach another way to search, and those they share with ours.
_FOREIGN_TAG = re.compile(
    r"</?(search|tool_call|tool_response|information|query|result|function_call)>|<\|?begin_of_query\|?>"
    r"|<\|begin_search_query\|>|<\|im_start\|>",
    re.IGNORECASE,
)
_TAG = re.compile(rf"</?(think|answer)>|{_FOREIGN_TAG.pattern}", re.IGNORECASE)


def plain_text(content: Any) -> str:
    """
    The text of a message: its content, or the text of its parts (`[{"type": "text", "text": …}]`).

    Raises:
        ValueError: The content is anything else, such as a part with an image.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return "".join(part["text"] for part in parts)
    raise ValueError(f"expected a message's content to be a text, or a list of parts with texts, got {content!r}.")


def question_text(prompt: Any) -> Any:
    """The question in a prompt: the prompt itself if it is text, else the content of its last message."""
    return prompt if isinstance(prompt, str) else plain_text(prompt[-1]["content"])


def question_of(prompt: Any) -> str:
    """
    The question in a prompt of any origin: text, chat messages, or these as JSON text.

    Instructions for another format of calls are left out where the question follows them after `Question:`, as in
    Search-R1's prompts.

    Raises:
        ValueError: There is no question, or it cannot be told from such instructions or from an earlier conversation.
    """
    messages = decode(prompt) if isinstance(prompt, str) and prompt.lstrip().startswith("[{") else prompt
    if isinstance(messages, str):
        text = messages
    else:
        users = [message for message in messages or () if message.get("role") == "user"]
        if not users or len(users) > 1 or any(message.get("role") != "system" for message in messages[:-1]):
            raise ValueError(
                f"expected `prompt` to be chat messages that end with the only one of the user, got {prompt!r}. Give "
                "the question a column `question`, or pass the data set to the trainer as it is."
            )
        text = plain_text(users[0]["content"])
    tags = list(_TAG.finditer(text))
    if tags:
        _, marker, question = text[tags[-1].end() :].rpartition("Question:")
        if marker:
            return question.strip()
    if any(_FOREIGN_TAG.fullmatch(tag.group()) for tag in tags):
        raise ValueError(
            f"`prompt` explains another format of calls ({tags[-1].group()}), and its question is not told from the "
            f"explanation: {text!r}. Give the question a column `question`."
        )
    return text
