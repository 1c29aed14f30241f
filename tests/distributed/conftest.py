"""Starting several processes, and stopping them all."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

# What a launcher around pytest, or a user's shell, may have set for another run than ours.
FOREIGN = ("ACCELERATE_", "FSDP_", "DS_", "MASTER_", "LOCAL_", "TORCHELASTIC_", "RANK", "WORLD_SIZE")


@pytest.fixture(scope="session")
def launch(repository: Path) -> Callable[..., None]:
    """Run a command on CPUs only, and fail with the end of its output if it fails or takes too long."""

    def run(command: Sequence[str], timeout: float = 480.0, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        ours = {
            "PYTHONPATH": os.pathsep.join([str(repository / "src"), str(repository / "tests")]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        process = subprocess.Popen(
            command,
            env=inherited | ours | environment,
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # The launcher's workers are in sessions of their own: one that waits for another would wait for ever.
            family = [*psutil.Process(process.pid).children(recursive=True), process]
            for member in family:
                member.kill()
            output, _ = process.communicate()
            pytest.fail(f"not finished after {timeout:.0f} s: {' '.join(command)}\n{output[-6000:]}")
        assert process.returncode == 0, output[-6000:]

    return run
