"""Which module may import which, read from the syntax trees.

A module imports only from levels below its own, so that reports work where there is no TRL, and the maths can be read
without the trainer. Optional packages are imported by the function that needs them, never on import of a module.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "igpo_trl"
SOURCE = Path(__file__).resolve().parent.parent / "src" / PACKAGE

# Level -1: helpers on the standard library alone.
LEVELS = {
    -1: {"_jsonl", "_tool_options"},
    0: {"advantages", "probes", "turns", "rewards", "data", "trajectory", "search"},
    1: {
        *("beliefs", "tooling", "observations", "prefix_cache", "malformed"),
        *("metrics", "evaluation", "diagnostics", "report"),
    },
    2: {
        *("checks", "config", "rollout", "round_log", "turn_batch"),
        *("belief_pass", "belief_trainer", "trainer", "evaluator"),
    },
    3: {"sandbox", "tiny_model", "training", "cli", "commands", "__main__", "__init__"},
}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}

# Modules that work where neither torch nor TRL is installed.
WITHOUT_TORCH = {"probes", "trajectory", "report"}
OPTIONAL = {
    *("bm25s", "deepspeed", "faiss", "matplotlib", "numba", "sentence_transformers"),
    *("starlette", "trafilatura", "uvicorn", "vllm"),
}

FILES = sorted(SOURCE.rglob("*.py"))


def module_of(file: Path, source: Path = SOURCE) -> str:
    """Name of the module or sub-package of the package that the file belongs to."""
    return file.relative_to(source).parts[0].removesuffix(".py")


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


def siblings(names: set[str]) -> set[str]:
    """Modules of the package among the imported names."""
    parts = [name.split(".") for name in names]
    return {name[1] for name in parts if name[0] == PACKAGE and len(name) > 1 and name[1] in LEVEL_OF}


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


def violations(file: Path, source: Path = SOURCE) -> list[str]:
    """What a file imports and must not."""
    module = module_of(file, source)
    if module not in LEVEL_OF:
        return [f"{file.name}: module {module!r} has no level; add it to LEVELS"]
    level = LEVEL_OF[module]
    text = file.read_text(encoding="utf-8")
    anywhere = imported_names(ast.parse(text), file, source)
    on_import = {name.split(".")[0] for name in imported_names(run_on_import(ast.parse(text)), file, source)}
    top_level = {name.split(".")[0] for name in anywhere}

    # The maths and the two ends (levels 0 and 1) see nothing of their own level; the trainer sees its config.
    found = [
        f"{module} (level {level}) imports {other} (level {LEVEL_OF[other]})"
        for other in sorted(siblings(anywhere) - {module})
        if LEVEL_OF[other] > level or (LEVEL_OF[other] == level and level < 2)
    ]
    if level < 2 and "trl" in top_level:
        found.append(f"{module} (level {level}) imports trl")
    if level < 0:
        found += [f"{module} imports {name}" for name in sorted(top_level - set(sys.stdlib_module_names))]
    if module in WITHOUT_TORCH:
        found += [f"{module} imports {name}" for name in sorted({"torch", "transformers"} & top_level)]
    found += [f"{module} imports {name} on import" for name in sorted(OPTIONAL & on_import)]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_module_imports_only_from_levels_below(file):
    assert violations(file) == []


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("turns.py", "from .beliefs import score_beliefs", ["turns (level 0) imports beliefs (level 1)"]),
        ("turns.py", "from . import rewards", ["turns (level 0) imports rewards (level 0)"]),
        ("search/bm25.py", "from ..trainer import IGPOTrainer", ["search (level 0) imports trainer (level 2)"]),
        ("search/bm25.py", "from .passage import Passage", []),
        ("beliefs.py", "def f():\n    import trl.trainer", ["beliefs (level 1) imports trl"]),
        ("report.py", "import matplotlib.pyplot as plt", ["report imports matplotlib on import"]),
        ("report.py", "def f():\n    import matplotlib.pyplot as plt", []),
        ("report.py", "try:\n    import matplotlib\nexcept ImportError: ...", ["report imports matplotlib on import"]),
        ("report.py", "import typing\nif typing.TYPE_CHECKING:\n    from matplotlib.figure import Figure", []),
        ("_jsonl.py", "import gzip\nimport numpy", ["_jsonl imports numpy"]),
        ("trajectory.py", "import torch.nn", ["trajectory imports torch"]),
        ("trainer.py", "from igpo_trl.config import IGPOConfig", []),
        ("new.py", "", ["new.py: module 'new' has no level; add it to LEVELS"]),
    ],
)
def test_the_rule_finds_what_breaks_it(tmp_path, name, code, expected):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(code)
    assert violations(file, tmp_path) == expected


@pytest.mark.parametrize("module", ["igpo_trl", "igpo_trl.cli.app", "igpo_trl.report", "igpo_trl.trajectory"])
def test_import_loads_no_heavy_package(module):
    heavy = OPTIONAL | {"accelerate", "datasets", "evaluate", "peft", "torch", "transformers", "trl"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
