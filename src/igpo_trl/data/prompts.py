"""System prompts: two built-in ones, and any other from a string or a file."""

import difflib
import os.path
from pathlib import Path

THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn, first reason inside <think> and </think>. Then do one \
of two things: call a tool, as often as you need over the turns, or, once the evidence is enough, answer.
Give the final answer inside <answer> and </answer>: a name, a number or a few words, without an explanation."""
"""System prompt for models that write down their reasoning before they act."""

NO_THINK_SYSTEM_PROMPT = """\
You answer questions by searching for evidence. In every turn do one of two things: call a tool, as often as you need \
over the turns, or, once the evidence is enough, answer.
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
