"""The record of a rollout, in files."""

from pathlib import Path

import pytest

from igpo_trl.trajectory import Trajectory, Turn, drop_later, read_jsonl, write_jsonl


def rollout(step: int) -> Trajectory:
    turn = Turn(text="<answer>Zürich\u2028</answer>", observation="", num_tokens=4, belief=0.25, info_gain=None)
    return Trajectory(prompt=f"prompt {step}", turns=[turn], answers=["Zürich"], outcome=1.0, step=step)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new/rank0.jsonl"
    rollouts = [rollout(0), rollout(1)]
    write_jsonl(path, rollouts[:1])
    write_jsonl(path, rollouts[1:], append=True)
    assert list(read_jsonl(path)) == rollouts


def test_later_steps_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "rank0.jsonl"
    write_jsonl(path, [rollout(step) for step in (0, 0, 1, 2, 3)])
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + "7\n" + whole[:40], encoding="utf-8")
    with pytest.raises(ValueError, match="line 6"):
        list(read_jsonl(path))
    drop_later(path, 2)
    assert [one.step for one in read_jsonl(path)] == [0, 0, 1]
    assert [file.name for file in Path(tmp_path).iterdir()] == ["rank0.jsonl"]
