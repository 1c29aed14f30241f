"""What the records of a step say, made by the trainer's own rollouts."""

import json
import re

import pytest
import tiny

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.rollout.tool_calls import ToolCall
from igpo_trl.trajectory import Call, Trajectory, Turn, load_run

BROKEN, ANSWER = "<tool_call>\n{'name': 1", tiny.answer("Paris")
SCRIPTS = [
    [tiny.call("Paris") + tiny.call("Rome"), tiny.call("x", "nothing"), ANSWER],
    [BROKEN, tiny.call("fail"), tiny.call("too late")],
    [ANSWER],
    [
        tiny.call("Paris") + "<tool_call>\n" + json.dumps({"name": "search", "arguments": {}}) + "\n</tool_call>",
        ANSWER,
    ],
]


def search(query: str) -> str:
    """
    Searches.

    Args:
        query: What to look for.
    """
    if query == "fail":
        raise RuntimeError("no")
    return f"{query} is the capital of France."


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = SCRIPTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    dataset = tiny.make_dataset(dataset=["capitals"] * 8)
    options = {"max_turns": 3, "max_completion_length": 700, "tools": [search], "train_dataset": dataset}
    trainer = tiny.make_trainer(Scripted, IGPOConfig, folder, save_trajectories=True, **options)
    trainer.train()
    return trainer, load_run(folder)


def test_calls_are_recorded_as_they_were_read_and_run(run):
    _, records = run
    calls = [[turn.calls for turn in record.turns] for record in records]
    assert calls == [
        [[Call("search", {"query": "Paris"}), Call("search", {"query": "Rome"})],
         [Call("nothing", {}, "unknown_tool")], []],
        [[Call("search", {}, "malformed")], [Call("search", {"query": "fail"}, "raised")],
         [Call("search", {"query": "too late"}, "not_run")]],
        [[]],
        [[Call("search", {"query": "Paris"}), Call("search", {}, "bad_arguments")], []],
    ]  # fmt: skip
    assert [record.stop_reason for record in records] == ["answered", "turn_limit", "answered", "answered"]


def test_a_record_says_what_was_asked_and_how_long_it_took(run):
    trainer, records = run
    for record, ids in zip(records, trainer.current_step.completion_ids, strict=True):
        assert re.fullmatch(r"Where was author \d born\?", record.question) and record.question in record.prompt
        assert record.data_set == "capitals" and record.answers == ["Paris", "City of Light"]
        assert sum(turn.num_tokens + turn.observation_tokens for turn in record.turns) == len(ids)
        assert all(bool(turn.observation_tokens) == bool(turn.observation) for turn in record.turns)
    assert len({record.seconds for record in records}) == 1
    assert 0 < sum(record.seconds for record in records) < trainer.state.log_history[0]["step_time"]


def test_beliefs_of_aliases_reduce_to_the_belief(run):
    _, records = run
    scored = [turn for record in records for turn in record.turns if turn.belief is not None]
    assert len(scored) >= 8
    for turn in scored:
        assert len(turn.alias_beliefs) == 2 and max(turn.alias_beliefs) == pytest.approx(turn.belief)
    assert len({tuple(turn.alias_beliefs) for turn in scored}) > 2
    first, second = (turn.alias_beliefs for turn in scored[:2])
    assert first[0] != first[1] and first != second


def test_what_json_cannot_express_is_recorded_as_text():
    for arguments in ({"x": float("nan")}, {"x": {1, 2}}, {"x": 10**5000}):
        call = ToolCall("adder", arguments, None).record()
        assert isinstance(call.arguments, str) and call.error == "not_run"
        record = Trajectory("p", [Turn("a", calls=[call])])
        assert Trajectory.from_json(record.to_json()) == record
        json.loads(record.to_json(), parse_constant=pytest.fail)  # such as NaN, which other readers do not know
