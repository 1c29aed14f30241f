"""Write docs/configuration.md from the help texts of `IGPOConfig` and of `igpo train`.

python docs/make_configuration.py
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from igpo_trl import IGPOConfig
from igpo_trl.cli.arguments import ScriptArguments, own_fields

HEADER = """# Configuration

Look up here what you can set. `python docs/make_configuration.py` makes this page from the help texts of the code.

In Python the fields of `IGPOConfig` are its arguments. In a configuration file of `igpo train` or `train.py` they are
keys (`max_turns: 5`), and on its command line they are options (`--max_turns 5`), which take precedence. Values of
both are checked in the same way.

`igpo train --help` lists the options of this page and the most used ones of TRL, `igpo train --help-all` all of them.
An error is one line; `--debug` shows its traceback.

## IGPOConfig

What `IGPOConfig` adds to `trl.GRPOConfig`; it takes every argument of `GRPOConfig` as well. Without a GPU that
computes in bfloat16, `bf16` is `False` unless you set it.

"""

SCRIPT = """
## Data and search

What `igpo train` and `train.py` take besides: questions, passages, and how they are searched. In Python these are
arguments of [`load_questions`](data.md) and [`SearchTool`](search.md). The options of the model, such as
`model_name_or_path` and `use_peft`, are those of TRL's `ModelConfig`. A PEFT adapter, in a directory or
[on the hub](hub.md), is a model too, and is trained further.

"""


def table(fields: Iterable[dataclasses.Field[Any]]) -> str:
    """Fields with their defaults and help texts."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for field in fields:
        default = "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | {default} | {field.metadata['help']} |".replace("\n", "\\n"))
    return "\n".join(rows) + "\n"


def render() -> str:
    """The page's text."""
    return HEADER + table(own_fields(IGPOConfig, GRPOConfig)) + SCRIPT + table(own_fields(ScriptArguments))


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(render(), encoding="utf-8")
