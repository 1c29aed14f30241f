"""The files around the code agree with it and with one another."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement

import igpo_trl

try:
    INSTALLED = version("igpo-trl")
except PackageNotFoundError:
    INSTALLED = ""
needs_installation = pytest.mark.skipif(not INSTALLED, reason="the package runs from its source tree, not installed")


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def test_version_is_the_same_everywhere(repository, project):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert project["version"] == citation["version"]
    assert igpo_trl.__version__ == (INSTALLED or "0+unknown")
    assert INSTALLED in ("", project["version"])


def test_pins_lie_within_the_bounds(repository, project):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    for requirement in map(
        Requirement, project["dependencies"] + [line for group in extras.values() for line in group]
    ):
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    for requirement in map(Requirement, project["dependencies"] + extras["dev"] + extras["docs"]):
        assert requirement.name == project["name"] or requirement.name.lower() in pins, f"{requirement} has no pin"


def test_pre_commit_runs_the_pinned_ruff(repository):
    (ruff,) = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"]
    pins = (repository / "constraints.txt").read_text().splitlines()
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in pins


def test_files_for_the_host_are_valid(repository):
    files = sorted((repository / ".github").rglob("*.yml"))
    assert len(files) >= 3
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict), file
    workflow = yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make test", "make docs", "make test-compat COMPAT=${{ matrix.versions }}"} <= set(commands)
    assert workflow[True]["schedule"]  # YAML 1.1 reads `on` as true
    makefile = (repository / "Makefile").read_text()
    for versions in jobs["compat"]["strategy"]["matrix"]["versions"]:
        assert re.search(rf"^{versions} = trl", makefile, re.MULTILINE)


def test_declared_pythons_are_those_of_the_hosted_tests(repository, project):
    jobs = yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    declared = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == declared
    assert project["requires-python"] == f">={declared[0]}"


def test_extras_in_error_messages_exist(repository, project):
    named = {
        extra.strip()
        for file in [*(repository / "src").rglob("*.py"), *repository.glob("*.md"), *repository.rglob("docs/*.md")]
        for match in re.findall(r"igpo[-_]trl\[([\w, -]+)\]", file.read_text(encoding="utf-8"))
        for extra in match.split(",")
    }
    assert named <= set(project["optional-dependencies"])
    assert {"plots"} <= named


@pytest.mark.parametrize("name", ["slurm", "torchrun", "search_server", "vllm_server"])
def test_launch_scripts_are_shell(repository, name):
    script = repository / "examples" / "launch" / f"{name}.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    result = subprocess.run(["bash", script], capture_output=True, text=True)
    assert result.returncode == 1 and re.search(rf"usage: (sbatch )?{name}\.sh", result.stderr)
    named = set(re.findall(r"(?:configs|accelerate_configs)/[\w.-]+\.yaml", script.read_text()))
    assert all((repository / path).is_file() for path in named)


def test_extras_are_complete(project):
    extras = project["optional-dependencies"]
    assert set(extras) >= {
        *("search", "numba", "dense", "serve", "web", "smollm2", "page", "plots", "demo", "deepspeed", "vllm"),
        *("quantization", "notebooks", "docs", "dev"),
    }
    for requirement in map(Requirement, [line for group in extras.values() for line in group]):
        assert requirement.name != project["name"] or requirement.extras <= set(extras), requirement


def test_two_builds_are_the_same_bytes(repository, tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the archives")
    digests = []
    for name in ("first", "second"):
        tree = tmp_path / name / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "site", "dist", "__pycache__", ".*_cache")
        shutil.copytree(repository, tree, ignore=ignored)
        for file in tree.rglob("*.py"):
            os.utime(file, (0, 1_700_000_000 + len(digests)))
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path / name)],
            cwd=tree,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
            check=True,
            capture_output=True,
        )
        archives = sorted(path for path in (tmp_path / name).iterdir() if path.is_file())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in archives})
    assert digests[0] == digests[1] and len(digests[0]) == 2
    wheel, source = archives
    names = zipfile.ZipFile(wheel).namelist()
    package = {str(path.relative_to(repository / "src")) for path in (repository / "src/igpo_trl").rglob("*.*")}
    package = {name for name in package if "__pycache__" not in name}
    assert package <= set(names), "files of the package are missing from the wheel"
    assert all(name.startswith("igpo_trl") for name in names), "the wheel holds more than the package"
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/test_packaging.py"} <= inside


def test_help_loads_no_torch():
    code = (
        "import sys\n"
        "from igpo_trl.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print(*sorted({'torch', 'transformers', 'trl', 'numpy', 'datasets'} & set(sys.modules)), file=sys.stderr)"
    )
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"igpo --help: {time.perf_counter() - started:.2f} s")
    assert "train" in result.stdout and result.stderr.split() == []


@needs_installation
def test_console_script():
    (script,) = entry_points(group="console_scripts", name="igpo")
    assert script.load() is __import__("igpo_trl.cli.app", fromlist=["app"]).app
    assert any(line.startswith("trl") for line in requires("igpo-trl") or [])


@pytest.mark.parametrize(
    ("name", "distributed_type", "cpu"),
    [
        ("cpu", "NO", True),
        ("single_gpu", "NO", False),
        ("ddp", "MULTI_GPU", False),
        ("fsdp2", "FSDP", False),
        ("zero2", "DEEPSPEED", False),
        ("zero3", "DEEPSPEED", False),
    ],
)
def test_accelerate_reads_its_configs(repository, name, distributed_type, cpu):
    config = load_config_from_file(str(repository / "accelerate_configs" / f"{name}.yaml"))
    assert config.distributed_type == distributed_type
    assert config.use_cpu is cpu
    assert (config.num_processes == 1) is (distributed_type == "NO")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if distributed_type == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
