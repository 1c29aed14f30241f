"""What a person reads of a run: a line per log, a few rollouts, a file of every metric, a page that explains them."""

import json
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny
from test_docs import ROOT, load_script, package_strings
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.logs import make_loggable
from igpo_trl.training.console import MetricsFile, StepLines, completions_table, duration, figures, say
from igpo_trl.training.metric_table import METRICS, describe


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = ([tiny.call("x"), tiny.answer("Paris")], [tiny.answer("Rome")])


def make(folder, **options):
    trainer = tiny.make_trainer(Scripted, IGPOConfig, folder, **options)
    trainer.add_callback(MetricsFile())
    trainer.add_callback(StepLines(trainer))
    return trainer


def lines_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps with as many options on as go together, evaluations before and in between."""
    folder = tmp_path_factory.mktemp("run")
    tiny.make_model().save_pretrained(folder / "model")
    trainer = make(
        folder,
        model=str(folder / "model"),  # from where the reference model is loaded as well
        max_steps=2,
        beta=0.1,
        num_iterations=2,
        info_gain_weight_end=0.5,
        outcome_weight_end=2.0,
        evidence_every=1,
        belief_at_eval=True,
        forced_answer=True,
        max_turns=3,
        max_tool_response_tokens=20,
        eval_dataset={"france": tiny.make_dataset(2), "italy": tiny.make_dataset(2)},
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=2,
        reward_weights=[1.0, 0.5],
        reward_funcs=[lambda completions, **_: [1.0] * len(completions), answer_length],
    )
    logged = []
    trainer.add_callback(OnLog(lambda step, logs: logged.append({"step": step} | logs)))
    trainer.evaluate()
    trainer.train()
    return folder, trainer, logged


class OnLog(TrainerCallback):
    def __init__(self, call):
        self.call = call

    def on_log(self, args, state, control, logs, **kwargs):
        self.call(state.global_step, dict(logs))


def answer_length(completions, **_):
    return [float(len(completion)) for completion in completions]


# ------------------------------------------------------------------------------------------------ the table of metrics


def test_every_metric_that_a_run_logs_is_described(run):
    logged = {name for log in run[2] for name in log} - {"step"}
    assert len(logged) > 100
    assert {name for name in logged if describe(name) is None} == set()


def test_every_metric_in_the_code_is_described():
    name = re.compile(r"(info_gain|belief|rollout|collapse|advantages|credit|evidence|tools|perf)(/[a-z_0-9]+)+")
    logged = {text for text in package_strings() if name.fullmatch(text)}
    assert len(logged) >= 15
    assert {name for name in logged if describe(name) is None} == set()


def test_no_metric_is_described_that_nothing_logs():
    import inspect

    import transformers.trainer
    import trl.extras.profiling
    import trl.trainer.grpo_trainer

    modules = (transformers.trainer, transformers.trainer_utils, trl.trainer.grpo_trainer, trl.extras.profiling)
    code = "\n".join([*package_strings(), *map(inspect.getsource, modules)])
    names = [metric.name for metrics in METRICS.values() for metric in metrics]
    assert [name for name in names if re.split(r"<[^>]*>", name)[0] not in code] == []


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("tools/errors/timeout", "tools/errors/<kind>"),
        ("eval_reward_std", "reward_std"),
        ("eval_hotpotqa_reward", "reward"),
        ("eval_two_wiki_rollout/stop/answered", "rollout/stop/<reason>"),
        ("completions/mean_terminated_length", "completions/<statistic>_terminated_length"),
        ("perf/nothing", None),
        ("my_metric", None),
    ],
)
def test_a_name_finds_its_description(name, described):
    found = describe(name)
    assert (found and found.name) == described


def test_the_page_is_that_of_the_table():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == load_script("make_metrics").render(), "Run `python docs/make_metrics.py`."


# ------------------------------------------------------------------------------------------------------------ the file


def test_the_file_has_every_log_in_order(run):
    folder, _, logged = run
    assert lines_of(folder) == logged
    assert [log["step"] for log in logged] == [0, 0, 0, 1, 2, 2, 2, 2, 2] and "eval_france_f1" in logged[0]


def test_a_resumed_run_repeats_no_line_and_a_new_one_mixes_with_no_other(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    make(tmp_path, max_steps=3, **options).train()
    before = lines_of(tmp_path)
    assert [line["step"] for line in before] == [1, 2, 3, 3]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, before)) + '\n{"step": 3, "rew')
    make(tmp_path, max_steps=3, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed = lines_of(tmp_path)
    assert [line["step"] for line in resumed] == [1, 2, 3, 3] and resumed[0] == before[0]
    make(tmp_path, max_steps=1).train()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 1]
    assert lines_of(tmp_path, "metrics-1.jsonl") == resumed


def test_json_has_no_nan_and_other_processes_write_nothing(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path))
    file = MetricsFile()
    for is_main in (False, True):
        state = SimpleNamespace(is_world_process_zero=is_main, global_step=0)
        file.on_train_begin(args, state, None)
        file.on_log(args, state, None, {"reward": math.nan, "loss": math.inf, "note": "text", "kl": 0.5})
    assert lines_of(tmp_path) == [{"step": 0, "reward": None, "loss": None, "note": "text", "kl": 0.5}]


# --------------------------------------------------------------------------------------------------------- the console


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_one_line_per_log_in_a_file(tmp_path, capsys, disable_tqdm):
    trainer = make(
        tmp_path,
        max_steps=2,
        disable_tqdm=disable_tqdm,
        eval_dataset=tiny.make_dataset(2),
        per_device_eval_batch_size=2,
        num_generations_eval=1,
        eval_strategy="steps",
        eval_steps=2,
    )
    printers = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert not {PrinterCallback, ProgressCallback} & set(printers)
    trainer.train()
    output, errors = capsys.readouterr()
    assert "it/s" not in errors and "step 1" not in errors
    first, second, evaluation, end = (line for line in output.splitlines() if not line.startswith("["))  # DeepSpeed
    pattern = (
        r"step 1/2  reward +[\d.-]+  searches  0\.5  belief +[\d.e-]+ → [\d.e-]+ +collapse +\d+%  answered 100%  "
        r"tokens/s +\d+  left 0:00:\d\d"
    )
    assert re.fullmatch(pattern, first), first
    assert "left" not in second and len(first) <= 125
    assert re.match(r"eval at step 2  F1 0\.500  EM 0\.500  reward", evaluation), evaluation
    assert re.fullmatch(r"2 steps, the last ones in 0:00:\d\d", end)


def test_groups_with_equal_outcomes_are_counted_for_grpo(tmp_path, capsys):
    """With batch scaling, TRL compares the standard deviation of the whole batch with 0."""
    options = {"info_gain_weight": 0.0, "normalization": "separate", "scale_rewards": "batch"}
    trainer = make(tmp_path, max_steps=1, logging_steps=1, **options)
    trainer.reward_funcs = [lambda prompts, **_: [1.0, 1.0, 0.0, 1.0][: len(prompts)]]
    trainer.train()
    log = trainer.state.log_history[0]
    assert not trainer.args.credits_turns and log["frac_reward_zero_std"] == 0.0
    assert log["collapse/outcome"] == 0.5 and "collapse  50%" in capsys.readouterr().out


def test_a_terminal_has_a_bar_below_the_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    make(tmp_path, max_steps=2, disable_tqdm=False).train()
    output, errors = capsys.readouterr()
    assert "2/2" in errors and "step 2/2" in output and "{'" not in output


def test_evaluations_have_the_name_of_their_set(run, capsys):
    _, trainer, logged = run
    lines = StepLines(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[])))
    for log in logged:
        lines.on_log(trainer.args, trainer.state, None, log)
    printed = capsys.readouterr().out.splitlines()
    heads = [re.match(r"(eval\w*|step \d|\d steps)", line)[1] for line in printed]
    evaluations = ["eval_france", "eval_italy", "eval"]
    assert heads == [*evaluations, "step 2", "step 2", *evaluations, "2 steps"]


def test_figures_leave_out_what_there_is_not():
    assert figures({"reward": 0.5, "collapse/outcome": 0.25, "belief/prompt": math.nan, "kl": 1.0}) == (
        "reward  0.500  collapse  25%"
    )
    assert figures({"belief/prompt": 2e-5, "belief/final": 0.283}, training=False) == "belief   2e-5 → 0.28  "
    assert [duration(x) for x in (0.4, 3725.0, 100 * 3600.0, math.nan)] == ["0:00:00", "1:02:05", "100:00:00", "?"]


def test_a_console_that_knows_no_arrow(monkeypatch):
    import io

    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    say("belief 0.1 → 0.2 é")
    assert console.buffer.getvalue().decode() == "belief 0.1 -> 0.2 \\xe9\n"


# ------------------------------------------------------------------------------------------------------- the rollouts


def columns(completions, beliefs=None):
    size = len(completions)
    logs = {
        "prompt": [[{"role": "user", "content": f"Who wrote book {i}?"}] for i in range(size)],
        "completion": completions,
        "rewards": {"f1": [i / size for i in range(size)], "format": [math.nan] * size},
        "advantages": [0.0] * size,
        "extra": defaultdict(list, {"belief": beliefs} if beliefs else {}),
    }
    logs["completion"] = list(completions)
    make_loggable(logs)
    return logs


def test_a_few_rollouts_from_the_best_to_the_worst():
    search = {"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": {"query": "who"}}}]}
    read = {"role": "tool", "content": "a passage " * 900}
    completions = [[search, read, {"role": "assistant", "content": tiny.answer(f"Number {i}")}] for i in range(64)]
    table = completions_table(columns(completions, ["+0.100 +0.200 +0.900"] * 64), 7)
    lines = table.splitlines()
    assert lines[0] == "Rollouts of step 7: 4 of 64, the best first"
    assert len(lines) == 7 and max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[-4:]] == ["+0.98", "+0.66", "+0.33", "+0.00"]
    assert "0.10 → 0.90" in lines[-1] and 'search({"query": "who"}) · Number 0' in lines[-1]
    assert "Who wrote book 0?" in lines[-1] and "passage" not in table
    assert len(completions_table(columns(completions), 7, number=64).splitlines()) == 3 + 64
    assert completions_table(columns(completions[:1]), 7, number=1).count("\n") == 3


@pytest.mark.parametrize("completion", ["\x1b[31mred\x1b[0m", "[bold]x[/] [/]", "\ud800", "\n" * 99, "", [], [{}]])
def test_any_text_stays_on_its_line(completion):
    table = completions_table(columns([completion]), 0)
    assert len(table.splitlines()) == 4 and "\x1b" not in table


def test_training_prints_rollouts_once(tmp_path, capsys):
    make(tmp_path, max_steps=2, logging_steps=1, log_completions=True).train()
    output = capsys.readouterr().out
    assert re.findall(r"Rollouts of step (\d): 4 of 4", output) == ["1", "2"]
    assert sum(not line.startswith("[") for line in output.splitlines()) == 2 * (1 + 7) + 1
    make(tmp_path, log_completions=True, num_completions_to_print=0).train()
    assert "Rollouts" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ the trackers


def test_tensorboard_gets_every_metric(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra dev"
    )
    trainer = make(tmp_path, max_steps=2, report_to=["tensorboard"])
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert rewards == [(log["step"], pytest.approx(log["reward"])) for log in lines_of(tmp_path) if "reward" in log]
    logged = {f"train/{name}" for name, value in lines_of(tmp_path)[0].items() if value is not None} - {"train/step"}
    assert logged <= set(events.Tags()["scalars"])


def test_trackio_gets_every_metric(tmp_path):
    pytest.importorskip("trackio", reason="is in no extra")
    make(tmp_path, max_steps=2, report_to=["trackio"], run_name="tiny", project=tmp_path.name).train()
    from trackio.sqlite_storage import SQLiteStorage

    logs = [log for log in SQLiteStorage.get_logs(tmp_path.name, "tiny") if "train/reward" in log]
    lines = [line for line in lines_of(tmp_path) if "reward" in line]
    assert [(log["step"], log["train/reward"]) for log in logs] == [(line["step"], line["reward"]) for line in lines]
    assert {f"train/{name}" for name in lines[0]} - {"train/step"} <= set(logs[0])


def test_wandb_gets_every_metric_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="is in no extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    make(tmp_path, max_steps=2, report_to=["wandb"], run_name="tiny").train()
    logged = {name for line in lines_of(tmp_path) for name, value in line.items() if value is not None} - {
        "step",
        "total_flos",
    }
    assert {name if name.startswith("train_") else f"train/{name}" for name in logged} <= set(wandb.run.summary.keys())
    wandb.finish()
