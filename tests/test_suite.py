"""What the suite promises about itself: it needs no data beside the clone, and no idle machine."""

import re
import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st


def slow(number):
    time.sleep(0.15)
    return number


@settings(max_examples=10, database=None)
@given(st.integers().map(slow))
def test_a_busy_machine_fails_no_test(number):
    """Hypothesis's own limits are for an example and for drawing all of them."""
    assert isinstance(number, int)


def test_with_data(shared_dir):
    assert (shared_dir / "data").is_dir()


def test_the_marker_data_selects_what_reads_the_shared_folder(request):
    chosen = [item for item in request.session.items if item.get_closest_marker("data")]
    assert chosen == [item for item in request.session.items if "shared_dir" in item.fixturenames]


def test_no_test_reads_the_shared_folder_without_the_fixture():
    around = re.compile(r"""parent ?/ ?["']shared["']|["']\.\./shared""")
    for file in Path(__file__).parent.rglob("*.py"):
        if file.name not in ("conftest.py", Path(__file__).name):
            assert not around.search(file.read_text(encoding="utf-8")), file
