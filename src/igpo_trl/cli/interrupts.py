"""What a run that ends early prints: the command that resumes it."""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints import last_whole_checkpoint
from ..config import IGPOConfig


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def say_how_to_resume(words: list[str], training: IGPOConfig) -> Iterator[None]:
    """Ends an interrupted run with the command that resumes it, and adds this command to the traceback of an error."""

    def stop(signum: int, frame: Any) -> None:
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if PartialState().is_main_process:
            print(f"\nInterrupted. {how_to_resume(words, training)}", file=sys.stderr, flush=True)
        raise SystemExit(143 if isinstance(interrupt, Terminated) else 130) from None
    except Exception as error:
        if getattr(error, "in_training", False):
            error.add_note(how_to_resume(words, training))
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def how_to_resume(words: list[str], training: IGPOConfig) -> str:
    try:
        checkpoint = last_whole_checkpoint(str(training.output_dir), only_model=training.save_only_model)
    except ValueError:
        checkpoint = None
    given, words = words, without_token(words)
    own = ["python", sys.argv[0]] if sys.argv[0].endswith("train.py") else ["igpo", "train"]
    if sys.argv[0].endswith("__main__.py"):
        own = ["python", "-m", "igpo_trl", "train"]
    try:  # a launcher, such as accelerate, has our arguments at the end of its own
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").rstrip("\0").split("\0")
    except (OSError, UnicodeDecodeError):
        parent = []
    if (
        given
        and parent[-len(given) :] == given
        and any("accelerate" in word or "torch" in word for word in parent[:4])
    ):
        own = parent[: -len(given)]
        if Path(own[1]).name in ("accelerate", "torchrun"):
            own = [Path(own[1]).name, *own[2:]]
    if checkpoint is None:
        command = shlex.join(own + words)
        return f"There is no checkpoint yet (`save_steps`: {training.save_steps:g}). To start again:\n  {command}"
    if "--resume_from_checkpoint" in words:
        i = words.index("--resume_from_checkpoint")
        words = words[:i] + words[i + 2 :]
    return f"To resume from {checkpoint}:\n  {shlex.join([*own, *words, '--resume_from_checkpoint', 'true'])}"


def without_token(words: list[str]) -> list[str]:
    """A command line that may be printed."""
    hidden = [re.sub(r"^(--hub[_-]token)=.*", r"\1=<token>", word, flags=re.DOTALL) for word in words]
    return ["<token>" if i and re.fullmatch("--hub[_-]token", words[i - 1]) else word for i, word in enumerate(hidden)]
