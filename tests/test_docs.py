"""The documentation says what the code does."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


def messages(source: str) -> list[str]:
    """The strings of a module, with `…` in place of what an f-string fills in."""
    texts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def package_strings() -> list[str]:
    """The strings of all modules of the package."""
    return [text for file in (ROOT / "src").rglob("*.py") for text in messages(file.read_text(encoding="utf-8"))]


def load_script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_table_is_that_of_the_code() -> None:
    module = load_script("make_configuration")
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == module.render(), "Run `python docs/make_configuration.py`."


def test_every_metric_of_the_trainer_is_documented() -> None:
    name = re.compile(r"(info_gain|belief|rollout|collapse|advantages)(/[a-z_]+)+")
    logged = {text for text in package_strings() if name.fullmatch(text)}
    assert len(logged) >= 10
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert not {name for name in logged if f"`{name}`" not in documented}


def test_the_readme_cites_the_paper_as_model_cards_do() -> None:
    from igpo_trl import IGPOTrainer

    assert IGPOTrainer._paper["citation"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def quoted_messages() -> list[str]:
    """The code spans in the first column of the tables under "Error messages", without those that `make` prints."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.split("\n## Error messages\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")]
    spans = [re.findall(r"``(.+?)``|`(.+?)`", cell) for cell in cells if "(from `make`)" not in cell]
    return [long or short for found in spans for long, short in found]


def test_the_error_reference_quotes_messages_of_the_code() -> None:
    texts = package_strings()
    quoted = quoted_messages()
    assert len(quoted) >= 30
    assert [fragment for fragment in quoted if not any(fragment in text for text in texts)] == []
    assert "No Python 3.11 or newer found" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="needs the extra docs")
    docstrings = load_script("docstrings")
    text = docstrings.convert_sections(
        """Scores.

Args:
    model (`str`, *optional*):
        What to score: a name.
    a, b: as in f.

Returns:
    `tuple`:
        - one
        - two

Raises:
    ValueError: if empty."""
    )
    assert (
        "**Arguments**\n\n- **`model`** (`str`, *optional*):\n    What to score: a name.\n- **`a`**, **`b`**: as"
        in text
    )
    assert "**Returns**\n\n`tuple`:\n\n- one\n- two\n" in text
    assert text.rstrip().endswith("**Raises**\n\n- **`ValueError`**: if empty.")
    paths = {"load": ["p.data.load", "p.search.load"]}
    link = '<autoref identifier="p.search.load" optional><code>load</code></autoref>'
    assert docstrings.add_links("See [`load`] and [`other`](x.md).", "p.search.tool", paths) == (
        f"See {link} and [`other`](x.md)."
    )


def test_links_that_leave_the_docs_are_text_on_the_site() -> None:
    hook = load_script("source_links")
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs" / "results" / "learning.md")))
    text = "[method](../method.md#the-turn-tax) [code](../../train.py) [gone](../../gone.py)"
    assert hook.on_page_markdown(text, page=page) == ("[method](../method.md#the-turn-tax) code [gone](../../gone.py)")
