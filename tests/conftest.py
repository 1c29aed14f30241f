"""What every test needs: no network, no GPU, one thread, fixed seeds, and the shared data where there is some."""

import os
import tempfile

# Read at import time by the libraries below, so before any of them is imported. A cache of its own keeps a test from
# finding what an earlier run, or another project, left behind.
_cache = tempfile.TemporaryDirectory(prefix="igpo-trl-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HOME=_cache.name,
    IGPO_CACHE=_cache.name,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
# CUDA_VISIBLE_DEVICES=0 make test runs on a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import random  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("igpo_trl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("igpo_trl")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers whatever ran before, so that tests may run in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that read the shared data, so that `-m data` runs them alone."""
    for item in items:
        if "shared_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: questions, passages and golden numbers, not distributed."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the data folder {path}, which is not distributed with the package")
    return path


@pytest.fixture(scope="session", autouse=True)
def remove_cache() -> Iterator[None]:
    """Delete the tests' own cache at the end."""
    yield
    _cache.cleanup()
