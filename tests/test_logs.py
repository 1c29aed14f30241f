"""What is logged: any text that a policy writes, in every place that it goes to, and means over rollouts."""

import contextlib
import importlib.util
import io
import json
import math
from collections import defaultdict, deque
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import trl.extras.profiling
import trl.trainer.grpo_trainer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import print_prompt_completions_sample, strip_images_from_messages

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.logs import MetricWeights, fill_columns, make_loggable
from igpo_trl.report import render_trajectory
from igpo_trl.rewards import answer_reward
from igpo_trl.trajectory import Trajectory, Turn, read_jsonl, write_jsonl

# --- the places: what TRL does with its table, and what W&B and Trackio do with theirs -------------------------------


class Mismatch(TypeError):
    """What W&B raises for a row that does not fit the types of the rows before."""


def merged(known, new):
    """W&B's types: of a value, merged with the type of the values before; `None` is not known yet."""
    if known is None or new is None:
        return known or new
    if isinstance(known, dict) and isinstance(new, dict):
        if set(new) - set(known):
            raise Mismatch(f"extra keys: {set(new) - set(known)}")
        return {key: merged(known[key], new.get(key, "nothing")) for key in known}
    if isinstance(known, list) and isinstance(new, list):
        return [merged(known[0], new[0])]
    if known != new:
        raise Mismatch(f"{known} and {new}")
    return known


def type_of(value):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "nothing"
    if isinstance(value, dict):
        return {key: type_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        element = None
        for inner in value:
            element = merged(element, type_of(inner))
        return [element]
    return "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else type(value).__name__


class WandbTable:
    """W&B's table: one type per column, and a JSON file in the end. Stands in for a package that is not required."""

    def __init__(self, dataframe):
        types = dict.fromkeys(dataframe.columns)
        for row in dataframe.to_dict(orient="records"):
            for name, value in row.items():
                kind = type_of(value)
                types[name] = types[name] if kind == "nothing" else merged(types[name], kind)
        json.dumps(dataframe.to_dict(orient="records"), ensure_ascii=False).encode()


class TrackioTable:
    """Trackio's table: rows of JSON in a database."""

    def __init__(self, dataframe):
        json.dumps(dataframe.to_dict(orient="records"), ensure_ascii=False).encode()


TABLES = [WandbTable, TrackioTable]
if importlib.util.find_spec("wandb"):
    import wandb

    TABLES.append(wandb.Table)


def table_of(logs):
    """As TRL's `log` makes it."""
    return pd.DataFrame(
        {
            "step": [0] * len(logs["prompt"]),
            "prompt": [strip_images_from_messages(messages) for messages in logs["prompt"]],
            "completion": [strip_images_from_messages(messages) for messages in logs["completion"]],
            **logs["rewards"],
            **logs["extra"],
            "advantage": logs["advantages"],
        }
    )


def write_everywhere(logs):
    """Everything that TRL does with its table; returns the parquet file's content and the console's text."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(console):
        make_loggable(logs)
        print_prompt_completions_sample(
            logs["prompt"], logs["completion"], logs["rewards"], logs["advantages"], 0, None, extra=dict(logs["extra"])
        )
    console.flush()
    table, file = table_of(logs), io.BytesIO()
    table.to_parquet(file)
    for make_table in TABLES:
        make_table(dataframe=table)
    return pd.read_parquet(file), console.buffer.getvalue().decode()


def logs_of(completions, prompts=None, **extra):
    size = len(completions)
    return {
        "prompt": deque(prompts or [[{"role": "user", "content": "?"}]] * size, maxlen=max(size, 1)),
        "completion": deque(completions, maxlen=max(size, 1)),
        "rewards": {"reward": deque([0.5] * size)},
        "advantages": deque([0.0] * size),
        "extra": defaultdict(deque, {name: deque(values) for name, values in extra.items()}),
    }


def call(arguments, name="search"):
    entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [entry]}


# --- any text --------------------------------------------------------------------------------------------------------

anything = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=8)  # lone surrogates are in Cs
numbers = st.booleans() | st.integers() | st.floats() | st.sampled_from([400, 5000]).map(lambda n: 10**n)
values = st.recursive(
    st.none() | numbers | anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(anything, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(call, values, st.just("search") | values) | st.builds(
    lambda entries: {"role": "assistant", "tool_calls": entries},
    st.lists(values, max_size=2) | values,
)
messages = (
    st.fixed_dictionaries({"role": st.just("assistant"), "content": anything})
    | st.fixed_dictionaries({"role": st.just("tool"), "name": anything, "content": values})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": anything, "reasoning_content": anything})
    | calls
)


@settings(max_examples=60)
@given(
    st.lists(st.lists(messages, max_size=3) | anything, min_size=1, max_size=4),
    st.lists(values, min_size=4, max_size=4),
)
@example([[call({"query": "é" * 300_000})], [call({"k" * 300_000: 1})]], ["x" * 300_000] * 4)
@example([[{"role": "assistant", "content": "?", "tool_calls": []}], [{"role": "assistant", "content": ""}]], [1] * 4)
@example([[]] * 4, [True, 1.5, None, 2**70])
@example([[]] * 4, [{1: 2}, object(), b"bytes", {(1, 2): 3}])
def test_every_place_takes_any_text(completions, logged):
    table, text = write_everywhere(logs_of(completions, extracted=logged[: len(completions)]))
    assert len(table) == len(completions) and "Step 0" in text


def test_every_place_takes_any_nesting():
    deep = json.loads("[" * 900 + "]" * 900)
    endless = {}
    endless["query"] = endless
    table, _ = write_everywhere(
        logs_of([[call({"query": deep})], [call(deep)], [call(endless)]], extracted=[deep] * 3)
    )
    assert table["extracted"][0].startswith("[[[")


PAIRS = {
    "text and number": ({"query": "x"}, {"query": 5}),
    "text and object": ({"query": "x"}, {"query": {"a": [1]}}),
    "list of text and of lists": ({"query": ["x"]}, {"query": [[1]]}),
    "no arguments": ({}, {}),
    "lone surrogates": ({"query": "\ud800"}, {"\udfff": 1}),
    "more than 64 bits": ({"query": 10**100}, {"query": math.inf}),
    "no object": ([1], "text"),
    "object as text": ('{"query": 3}', None),
    "boolean and number": ({"query": True}, {"query": 1.5}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_are_the_text_of_a_json_object(name):
    table, _ = write_everywhere(logs_of([[call(arguments)] for arguments in PAIRS[name]]))
    written = [row[0]["tool_calls"][0]["function"]["arguments"] for row in table["completion"]]
    expected = {
        "lone surrogates": [{"query": "\ufffd"}, {"\ufffd": 1}],
        "no object": [{"arguments": [1]}, {"arguments": "text"}],
        "object as text": [{"query": 3}, {}],
    }
    assert [json.loads(text) for text in written] == expected.get(name, list(PAIRS[name]))


def test_one_rollout_calls_and_one_does_not():
    completions = [
        [{"role": "assistant", "content": "Rome"}],
        [
            call({"query": "x"}),
            {"role": "tool", "name": "search", "content": "y"},
            {"role": "assistant", "content": "z"},
        ],
    ]
    table, text = write_everywhere(logs_of(completions))
    first, second = table["completion"]
    assert [message["content"] for message in first] == ["Rome"]
    assert [message["role"] for message in second] == ["assistant", "tool", "assistant"]
    assert second[1]["name"] == "search" and "search(query='x')" in text


def test_what_is_of_one_type_stays_as_it_is():
    logs = logs_of(["é", "b"], ["p", "q"], score=[1, 2.5], right=[True, None], text=["a", "b"], mixed=["a", 1])
    table, text = write_everywhere(logs)
    assert table["completion"].tolist() == ["é", "b"] and "\\xe9" in text
    assert table["score"].tolist() == [1.0, 2.5] and table["text"].tolist() == ["a", "b"]
    assert table["right"].tolist() == [True, None] and table["mixed"].tolist() == ["a", "1"]
    conversation = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    table, _ = write_everywhere(logs_of(["c"], [conversation]))
    assert table["prompt"][0][0] == {"role": "user", "content": "a\nb"}


def test_a_column_that_is_logged_for_some_batches_only():
    logs = logs_of(["a", "b"], ["p", "q"], steady=[1, 2])
    pending = {"new": [3], "twice": [1, 2, 3, 4]}
    fill_columns(logs, pending, 2)
    assert pending == {"new": [3, None], "twice": [1, 2], "steady": [None, None]}
    logs["prompt"] = deque("pqrs")
    make_loggable({**logs, "completion": deque("abcd"), "extra": {"new": deque([3, None])}})
    table = {**logs_of(list("abcd"), list("pqrs")), "extra": {"new": deque([3, None])}}
    make_loggable(table)
    assert list(table["extra"]["new"]) == [None, None, 3, None]


# --- records ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(anything, st.dictionaries(anything, values.filter(lambda value: "9" * 4000 not in repr_of(value)), max_size=2))
def test_records_take_any_text(tmp_path_factory, text, info):
    path = tmp_path_factory.mktemp("records") / "rank0.jsonl"
    turn = Turn(f'<tool_call>{{"name": "search", "arguments": {{"query": "\\ud800"}}}}</tool_call>{text}', text)
    record = Trajectory(text, [turn], [text], info=json.loads(json.dumps(info)))
    write_jsonl(path, [record])
    (read,) = read_jsonl(path)
    assert read.to_json() == record.to_json()
    console = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Console(file=console).print(render_trajectory(read))
    console.flush()


def repr_of(value):
    try:
        return repr(value)
    except ValueError:  # an integer of thousands of digits, which JSON cannot express
        return "9" * 4000


# --- a training run --------------------------------------------------------------------------------------------------


def raw(arguments):
    return f'<tool_call>\n{{"name": "search", "arguments": {arguments}}}\n</tool_call>'


def test_training_goes_on_whatever_is_logged(tmp_path, monkeypatch):
    class Scripted(tiny.Scripted, IGPOTrainer):
        scripts = (
            [raw('{"query": "\\ud800"}'), tiny.answer("Paris")],
            [raw('{"query": 5}'), tiny.answer("Rome")],
            [raw(f'{{"query": {"[" * 60}{"]" * 60}}}'), raw('{"query": {"a": [1, "\\udfff"]}}'), "\x00\x1b[31m"],
            [tiny.answer("Paris")],
        )

    def reward(completions, log_extra, **_):
        log_extra("found", [None, 1, "one", {"a": [1]}])
        return [1.0, 0.0, None, 1.0]

    logged = []
    for name, table in (("wandb", WandbTable), ("trackio", TrackioTable)):
        backend = SimpleNamespace(run=object(), Table=table, log=logged.append)
        monkeypatch.setattr(trl.trainer.grpo_trainer, name, backend, raising=False)
        monkeypatch.setattr(trl.extras.profiling, f"is_{name}_available", lambda: False)  # even if it is installed
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        log_completions=True,
        log_unique_prompts=True,
        save_trajectories=True,
        reward_funcs=reward,
        max_completion_length=1024,
    )
    trainer.args.report_to = ["wandb", "trackio"]
    trainer.train()
    assert trainer.current_step.round_log.errors == {
        "malformed": 1,
        "bad_arguments": 2,
    }
    assert len(logged) == 4  # after the step, and at the end
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert table["found"].tolist() == ["", "1", "one", '{"a": [1]}']
    assert [len(row) for row in table["completion"]] == [3, 3, 5, 1]
    assert len(list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))) == 4


# --- means over rollouts, not over batches ---------------------------------------------------------------------------


def test_a_mean_has_the_weights_of_its_batches():
    weights, metrics = MetricWeights(), {"f1": [0.5], "rate": [1.0], "turns/max": [2.0]}
    weights.add(metrics, 2, {"rate": 0})
    metrics["f1"].append(math.nan)
    metrics["rate"].append(0.25)
    weights.add(metrics, 2, {"rate": 4})
    weights.reduce(metrics)
    assert metrics == {"f1": [0.5], "rate": [0.25], "turns/max": [2.0]}
    # What was reduced weighs as much as its batches.
    metrics["f1"].append(1.0)
    metrics["rate"].append(0.75)
    metrics["step_time"] = [3.0, 5.0]
    weights.add(metrics, 1, {"rate": 12})
    weights.reduce(metrics)
    assert metrics == {"f1": [2 / 3], "rate": [0.625], "turns/max": [2.0], "step_time": [4.0]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("completions/min_length", 1.0),
        ("completions/max_terminated_length", 3.0),
        ("rollout/turns/max", 3.0),
        ("clip_ratio/low_min", 1.0),
        ("sampling/importance_sampling_ratio/max", 3.0),
        ("rewards/max_reward/mean", 2.0),
        ("completions/mean_length", 2.0),
    ],
)
def test_a_smallest_or_largest_value_stays_one(name, value):
    weights, metrics = MetricWeights(), {name: [1.0, 3.0]}
    weights.reduce(metrics)
    assert metrics == {name: [value]}
    metrics = {name: [math.nan]}
    MetricWeights().reduce(metrics)
    assert math.isnan(metrics[name][0])


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = ([tiny.call("x"), tiny.answer("Paris")], [tiny.answer("Rome")])


def test_evaluation_means_are_over_rollouts(tmp_path):
    """3 of 5 right in batches of 2, 2 and 1: .6, where the mean over batches is .667."""
    trainer = tiny.make_trainer(
        Scripted,
        IGPOConfig,
        tmp_path,
        eval_dataset=tiny.make_dataset(5),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        belief_at_eval=True,
    )
    seen = []
    trainer.add_callback(OnEvaluate(seen.append))
    metrics = trainer.evaluate()
    for name in ("f1", "exact_match", "reward", "rewards/answer_reward/mean"):
        assert metrics[f"eval_{name}"] == pytest.approx(0.6), name
    assert metrics["eval_rollout/turns/mean"] == pytest.approx(8 / 5)
    assert metrics["eval_tools/call_frequency"] == pytest.approx(3 / 5)
    assert metrics["eval_rollout/stop/answered"] == 1.0
    assert metrics["eval_rollout/turns/max"] == 2.0
    encode = trainer.processing_class.encode
    lengths = [sum(len(encode(text)) + 1 for text in script) for script in trainer.scripts]
    assert metrics["eval_completions/mean_length"] == pytest.approx((3 * lengths[0] + 2 * lengths[1]) / 5)
    assert metrics["eval_completions/min_length"] == min(lengths)
    assert metrics["eval_completions/max_length"] == max(lengths)
    assert seen[0]["eval_f1"] == metrics["eval_f1"] == trainer.state.log_history[-1]["eval_f1"]


class OnEvaluate(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.call(dict(metrics))


def test_training_rates_have_their_own_denominators(tmp_path):
    """Two generation batches in one log: what was scored, called and gained once counts once."""

    class Changing(Scripted):
        def _generate(self, prompts):
            broken = '<tool_call>{"name": "search", "arguments": 5}</tool_call>'
            first = [[tiny.call("x"), broken, broken, tiny.answer("Paris")]] * 2 + [[tiny.answer("Rome")]] * 2
            second = [[tiny.call("x"), tiny.answer("Paris")]] + [["?"]] * 3
            self.scripts = second if self.state.global_step else first
            return super()._generate(prompts)

    gains = []

    def reward(completions, trainer_state, **_):
        return [1.0, 1.0, 0.0, 0.0] if trainer_state.global_step == 0 else [3.0, None, None, None]

    trainer = tiny.make_trainer(
        Changing,
        IGPOConfig,
        tmp_path,
        reward_funcs=reward,
        max_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        save_trajectories=True,
        max_completion_length=512,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == log["rewards/reward/mean"] == pytest.approx(5 / 5)  # the mean over batches is 1.75
    assert log["tools/failure_frequency"] == pytest.approx(4 / 7)  # the mean over batches is 1/3
    assert log["tools/errors/malformed"] == pytest.approx(4 / 7)
    assert log["tools/call_frequency"] == pytest.approx(7 / 8)
    records = list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))
    gains = [turn.info_gain for record in records for turn in record.turns if turn.info_gain is not None]
    assert len(gains) == 7
    assert log["info_gain/mean"] == pytest.approx(sum(gains) / 7, rel=1e-4)
    assert log["info_gain/positive"] == pytest.approx(sum(gain > 0 for gain in gains) / 7)
    advantages = [abs(turn.advantage) for record in records for turn in record.turns]
    assert log["advantages/abs_mean"] == pytest.approx(sum(advantages) / len(advantages), rel=1e-4)


def test_equal_batches_are_averaged_as_trl_does(tmp_path):
    logs = {}
    for trainer_class, config in ((IGPOTrainer, IGPOConfig), (GRPOTrainer, GRPOConfig)):
        trainer = tiny.make_trainer(
            type("Scripted", (tiny.Scripted, trainer_class), {"scripts": Scripted.scripts * 2}),
            config,
            tmp_path,
            reward_funcs=answer_reward,
            max_steps=2,
            logging_steps=2,
            **({"info_gain_weight": 0.0} if config is IGPOConfig else {}),
        )
        trainer.train()
        logs[trainer_class] = trainer.state.log_history[0]
    timed = {name for name in logs[GRPOTrainer] if "time" in name}
    assert {n: logs[IGPOTrainer][n] for n in logs[GRPOTrainer].keys() - timed} == {
        n: logs[GRPOTrainer][n] for n in logs[GRPOTrainer].keys() - timed
    }


# --- training or evaluation, in whatever mode the model is -----------------------------------------------------------


def test_continuous_batching_evaluates(tmp_path):
    """It leaves the model in training mode; five questions in batches of two."""
    trainer = tiny.make_trainer(
        IGPOTrainer,
        IGPOConfig,
        tmp_path,
        use_transformers_continuous_batching=True,
        save_trajectories=True,
        eval_dataset=tiny.make_dataset(5),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
    )
    said = trainer.processing_class.encode(tiny.answer("Paris"))

    def generate_batch(prompts, **options):  # the backend itself takes a minute to start
        return {i: SimpleNamespace(generated_tokens=said) for i in range(len(prompts))}

    trainer.model.generate_batch = generate_batch
    metrics = trainer.evaluate()
    assert metrics["eval_f1"] == 1.0 and "eval_entropy" in metrics
    assert not (tmp_path / "trajectories").exists()
    assert not trainer._metrics["train"]
    trainer.train()
    assert "eval_f1" not in trainer.state.log_history[0] and "reward" in trainer.state.log_history[0]
    assert len(list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))) == 4


@pytest.mark.parametrize("leaves", [True, False])
def test_a_rollout_function_may_leave_the_model_in_any_mode(tmp_path, monkeypatch, leaves):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def roll_out(prompts, trainer):
        trainer.model.train(leaves)
        ids = trainer.processing_class.encode(tiny.answer("Paris"))
        size = len(prompts)
        return {"prompt_ids": [[5, 6]] * size, "completion_ids": [ids] * size, "logprobs": [[0.0] * len(ids)] * size}

    trainer = tiny.make_trainer(
        IGPOTrainer,
        IGPOConfig,
        tmp_path,
        tools=None,
        rollout_func=roll_out,
        eval_dataset=tiny.make_dataset(3),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        save_trajectories=True,
    )
    assert trainer.evaluate()["eval_f1"] == 1.0
    assert not (tmp_path / "trajectories").exists()
    trainer.train()
    assert "entropy" in trainer.state.log_history[0] and not trainer._metrics["eval"]


# --- several evaluation sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "steps"), [("eval_f1", 4), ("f1", 4), ("eval_italy_f1", 3), ("eval_rewards/answer_reward/mean", 4)]
)
def test_early_stopping_with_several_evaluation_sets(tmp_path, metric, steps):
    """Italy is right after steps 1 and 2, France from step 2 on: after the best step, two evaluations end training."""

    class Fading(Scripted):
        def _generate(self, prompts):
            step = self.state.global_step
            italian = [tiny.answer("Rome" if step in (1, 2) else "Milan")]
            french = [tiny.answer("Paris" if step > 1 else "Lyon")]
            self.scripts = [italian if "Rome" in str(row["answers"]) else french for row in self.current_step.rows]
            return super()._generate(prompts)

    france, italy = tiny.make_dataset(2), tiny.make_dataset(1).map(lambda _: {"answers": ["Rome"]})
    trainer = tiny.make_trainer(
        Fading,
        IGPOConfig,
        tmp_path,
        eval_dataset={"france": france, "italy": italy},
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        max_steps=8,
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == steps
