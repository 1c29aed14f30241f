"""The record of a rollout, in files."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from igpo_trl.trajectory import (
    VERSION,
    Call,
    Trajectory,
    Turn,
    drop_later,
    load_run,
    read_jsonl,
    record_files,
    write_jsonl,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "records.md"


def rollout(step: int) -> Trajectory:
    calls = [Call("search", {"query": "Zürich"}), Call("unknown", "['x'] (list)", "malformed")]
    turn = Turn("<answer>Zürich\u2028</answer>", "", 4, 0.25, None, calls=calls, alias_beliefs=[0.25, None])
    return Trajectory(f"prompt {step}", [turn], ["Zürich", "Turicum"], 1.0, step=step, question="Where?", seconds=0.5)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new/rank0.jsonl"
    rollouts = [rollout(0), rollout(1)]
    write_jsonl(path, rollouts[:1])
    write_jsonl(path, rollouts[1:], append=True)
    assert list(read_jsonl(path)) == rollouts
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0])["version"] == VERSION == 2


def test_records_of_the_first_version_are_read():
    turns = [{"text": "a", "observation": "b", "num_tokens": 3, "belief": 0.5, "info_gain": 0.1, "advantage": None}]
    line = {"prompt": "p", "turns": turns, "answers": ["x"], "outcome": 1.0, "rewards": {"f1": 1.0}, "step": 3}
    line |= {"group": 1, "stop_reason": "answered", "info": {"dataset": "nq", "question": "Who?", "id": "7"}}
    read = Trajectory.from_json(json.dumps(line))
    turn = Turn("a", "b", 3, 0.5, 0.1)
    assert read == Trajectory(
        "p", [turn], ["x"], 1.0, {"f1": 1.0}, 3, 1, "answered", line["info"], question="Who?", data_set="nq"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "version 3, expected at most 2: update the package"),
        ({"version": "two"}, "version 'two', expected"),
        ({"mood": 1}, "unknown field 'mood' in a trajectory, expected answers, .*update the package"),
        ({"turns": [{"text": "a", "mood": 1}]}, "unknown field 'mood' in a turn"),
        ({"turns": [{"text": "a", "calls": [{"tool": "x"}]}]}, "unknown field 'tool' in a call"),
        ({"turns": []}, "at least one turn"),
        ({"turns": [{}]}, "text"),
    ],
)
def test_other_records_are_refused(tmp_path, change, message):
    path = tmp_path / "rank0.jsonl"
    path.write_text(json.dumps(json.loads(rollout(0).to_json()) | change))  # without a line end, yet not incomplete
    with pytest.raises(ValueError, match=f"rank0.jsonl, line 1: not a trajectory .*{message}"):
        list(read_jsonl(path))


@pytest.mark.parametrize("torn", [40, -45], ids=["in the middle", "in a character"])
def test_an_incomplete_last_line_is_skipped_with_a_warning(tmp_path, caplog, torn):
    path = tmp_path / "rank0.jsonl"
    write_jsonl(path, [rollout(0), rollout(1)])
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[0]
    cut = line[:torn] if torn > 0 else line[: line.index("ü".encode()) + 1]
    path.write_bytes(whole + cut)
    assert [one.step for one in read_jsonl(path)] == [0, 1]
    assert "skipped line 3, the last one, which is incomplete" in caplog.text
    path.write_bytes(cut + b"\n" + whole)
    with pytest.raises(ValueError, match="line 1"):
        list(read_jsonl(path))


def test_later_steps_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "rank0.jsonl"
    write_jsonl(path, [rollout(step) for step in (0, 0, 1, 2, 3)])
    whole = path.read_bytes()
    path.write_bytes(whole + b"7\n" + whole[: whole.index("ü".encode()) + 1])
    with pytest.raises(ValueError, match="line 6"):
        list(read_jsonl(path))
    drop_later(path, 2)
    assert [one.step for one in read_jsonl(path)] == [0, 0, 1]
    assert [file.name for file in Path(tmp_path).iterdir()] == ["rank0.jsonl"]


def test_records_continue_in_another_file_when_one_is_full(tmp_path):
    folder, size = tmp_path / "trajectories", len(rollout(0).to_json().encode()) + 1
    for step in range(24):
        for rank in (0, 1):
            write_jsonl(folder / f"rank{rank}.jsonl", [rollout(step)], append=True, max_bytes=2 * size)
    names = ["rank0.jsonl", *(f"rank0.{part}.jsonl" for part in range(1, 12))]
    assert [path.name for path in record_files(tmp_path)[:12]] == names  # part 10 comes after part 9
    assert [one.step for one in load_run(tmp_path)] == [step for step in range(24) for _ in "01"]
    assert load_run(folder) == load_run(tmp_path)
    for path in record_files(tmp_path):
        drop_later(path, 5)
    for rank in (0, 1):
        write_jsonl(folder / f"rank{rank}.jsonl", [rollout(5)], append=True, max_bytes=2 * size)
    assert [one.step for one in load_run(tmp_path)] == [step for step in range(6) for _ in "01"]


def test_a_folder_without_rollouts_names_the_runs_below(tmp_path):
    write_jsonl(tmp_path / "out/grpo/trajectories/rank0.jsonl", [rollout(0)])
    with pytest.raises(FileNotFoundError, match=r"no rollouts in .*such as .*out/grpo\."):
        load_run(tmp_path / "out")


def test_the_docs_list_every_field():
    sections = re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for kind in (Trajectory, Turn, Call):
        (section,) = [text for text in sections if text.startswith(f"{kind.__name__}\n")]
        documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
        assert sorted(documented) == sorted(field.name for field in dataclasses.fields(kind))
