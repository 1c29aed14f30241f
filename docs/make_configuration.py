"""Write docs/configuration.md from the help texts of `IGPOConfig`.

python docs/make_configuration.py
"""

import dataclasses
from pathlib import Path

from trl import GRPOConfig

from igpo_trl import IGPOConfig

HEADER = """# Configuration

Look up here what `IGPOConfig` adds to `trl.GRPOConfig`; it takes every argument of `GRPOConfig` as well. In Python the
fields are arguments of `IGPOConfig`. In a configuration file of `igpo train` or `train.py` they are keys
(`max_turns: 5`), and on its command line they are options (`--max_turns 5`). `python docs/make_configuration.py` makes
this page from the fields' help texts.

| field | default | meaning |
|---|---|---|
"""


def render() -> str:
    """The page's text."""
    inherited = {field.name for field in dataclasses.fields(GRPOConfig)}
    rows = [
        f"| `{field.name}` | `{field.default!r}` | {field.metadata['help']} |".replace("\n", "\\n")
        for field in dataclasses.fields(IGPOConfig)
        if field.name not in inherited
    ]
    return HEADER + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(render(), encoding="utf-8")
