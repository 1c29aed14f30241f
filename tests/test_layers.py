"""
Which module may import which.

The rule: a module imports only from entries above its own in README's tree. So the maths can be read without the
trainer, and there is no circle. Optional packages are imported by the function that needs them, never on import.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "igpo_trl"
ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / PACKAGE
RULE = "a module imports only from entries above its own in README's tree"

OPTIONAL = {
    *("bm25s", "deepspeed", "faiss", "jinja2", "matplotlib", "numba", "plotly", "sentence_transformers"),
    *("starlette", "trafilatura", "uvicorn", "vllm"),
}
# Re-exports of names that have moved; nothing in the package imports them.
FORMER = {"metrics", "probes", "tooling"}
# Only these may import TRL; everything else is usable without it.
USES_TRL = {
    "rollout.loop",
    "rollout.chat_templates",
    "config",
    "checks",
    "trainer",
    "training.estimate",
    "evaluation.rollouts",
    "warm_start",
    "sandbox",
    "cli",
}
WITHOUT_TORCH = {"files", "tools", "trajectory", "rewards", "report"}

FILES = sorted(SOURCE.rglob("*.py"))


def entries(readme: str) -> tuple[list[str], set[str]]:
    """The package's own entries in the order of README's tree, and every file that it names, as dotted modules."""
    tree = readme.split(f"src/{PACKAGE}/", 1)[1].split("```", 1)[0]
    order: list[str] = []
    modules: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        match = re.match(r"([│ ]*)[├└]── ([\w/.]+)", line)
        if not match:
            continue
        depth, name = len(match.group(1)) // 4, match.group(2)
        folders = [*folders[:depth], name.rstrip("/")]
        if depth == 0:
            order.append(name.removesuffix(".py").rstrip("/"))
        if name.endswith(".py"):
            modules.add(".".join(folders).removesuffix(".py"))
    return order, modules


ORDER, NAMED = entries((ROOT / "README.md").read_text(encoding="utf-8"))


def module_of(file: Path, source: Path = SOURCE) -> str:
    return ".".join(file.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


def imported_names(tree: ast.AST, file: Path, source: Path = SOURCE) -> set[str]:
    """Dotted names of everything imported below a node, relative imports resolved."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = [PACKAGE, *file.relative_to(source).parts[:-1]]
                base = package[: len(package) - node.level + 1] + base
            # `from package import module` may name a module: keep the longer name.
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def run_on_import(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported: no function bodies, no blocks for type checkers only."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST:
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                return ast.Module(body=node.orelse, type_ignores=[])
            return self.generic_visit(node)

    return Prune().visit(tree)


def violations(file: Path, source: Path = SOURCE, order: list[str] = ORDER) -> list[str]:
    """What a file imports and must not."""
    module = module_of(file, source)
    entry = module.split(".")[0]
    if entry in FORMER | {"__init__", "__main__"}:
        return []
    if entry not in order:
        return [f"{entry} is not in README's tree ({RULE})"]
    text = file.read_text(encoding="utf-8")
    anywhere = imported_names(ast.parse(text), file, source)
    on_import = {name.split(".")[0] for name in imported_names(run_on_import(ast.parse(text)), file, source)}
    top_level = {name.split(".")[0] for name in anywhere}
    siblings = {name.split(".")[1] for name in anywhere if name.startswith(PACKAGE + ".")}

    found = [f"{module} imports the former name {name}" for name in sorted(siblings & FORMER)]
    found += [
        f"{module} imports {other}, which stands below it ({RULE})"
        for other in sorted(siblings & set(order) - {entry}, key=order.index)
        if order.index(other) > order.index(entry)
    ]
    private = {name for name in anywhere if name.startswith(PACKAGE + ".")}
    found += [f"{module} imports {name}" for name in sorted(private) if re.search(r"\._(?!_)", name)]
    if "trl" in top_level and not USES_TRL & {module, entry}:
        found.append(f"{module} imports trl")
    if entry in WITHOUT_TORCH:
        found += [f"{module} imports {name}" for name in sorted({"torch", "transformers"} & top_level)]
    found += [f"{module} imports {name} on import" for name in sorted(OPTIONAL & on_import)]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_module_imports_only_from_entries_above(file):
    assert violations(file) == []


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("turns.py", "from .beliefs import score_beliefs", f"turns imports beliefs, which stands below it ({RULE})"),
        ("search/b.py", "from ..trainer import IGPO", f"search.b imports trainer, which stands below it ({RULE})"),
        ("search.py", "def f(): import igpo_trl.trainer", f"search imports trainer, which stands below it ({RULE})"),
        ("search/bm25.py", "from .passage import Passage", None),
        ("search/bm25.py", "from .passage import _split", "search.bm25 imports igpo_trl.search.passage._split"),
        ("beliefs/scoring.py", "def f():\n    import trl.trainer", "beliefs.scoring imports trl"),
        ("trainer.py", "from .probes import AnswerProbe", "trainer imports the former name probes"),
        ("report.py", "import matplotlib.pyplot as plt", "report imports matplotlib on import"),
        ("report.py", "def f():\n    import matplotlib.pyplot as plt", None),
        ("report.py", "try:\n    import matplotlib\nexcept ImportError: ...", "report imports matplotlib on import"),
        ("report.py", "import typing\nif typing.TYPE_CHECKING:\n    from matplotlib.figure import Figure", None),
        ("trajectory.py", "import torch.nn", "trajectory imports torch"),
        ("trainer.py", "from igpo_trl.config import IGPOConfig", None),
        ("new.py", "", f"new is not in README's tree ({RULE})"),
    ],
)  # fmt: skip
def test_the_rule_finds_what_breaks_it(tmp_path, name, code, expected):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    order = ["trajectory", "turns", "report", "beliefs", "search", "config", "trainer"]
    assert violations(file, tmp_path, order) == ([] if expected is None else [expected])


def test_the_tree_names_every_file():
    modules = {module_of(file) for file in FILES if file.name not in ("__init__.py", "__main__.py")}
    assert NAMED | FORMER | {"search.reader", "search.server"} == modules
    assert len(ORDER) <= 24


def test_no_file_is_long():
    lengths = {module_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("module", ["igpo_trl", "igpo_trl.cli.app", "igpo_trl.report", "igpo_trl.trajectory"])
def test_import_loads_no_heavy_package(module):
    heavy = OPTIONAL | {"accelerate", "datasets", "evaluate", "peft", "torch", "transformers", "trl"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("module", ["igpo_trl.evaluation.doctor", "igpo_trl.search", "igpo_trl.rewards"])
def test_import_needs_neither_torch_nor_trl(module):
    code = (
        "import sys\n"
        "for name in ('torch', 'trl', 'transformers', 'accelerate', 'peft'): sys.modules[name] = None\n"
        f"import {module}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "line",
    [
        "from igpo_trl.tooling import tool, ToolOptions, ToolCall, ToolErrorKind, ToolResult, ToolRunner, read_calls",
        "from igpo_trl.probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE, AnswerProbe, build_probes",
        "from igpo_trl.metrics import AnswerF1, AnswerExactMatch, AnswerCoverExactMatch",
        "from igpo_trl.search.reader import PageReader, ReadPageTool",
        "from igpo_trl.search.server import create_app",
        "from igpo_trl.search.passages import read_passages",
    ],
)
def test_names_that_the_docs_once_showed_still_work(line):
    exec(line, {})
