"""Training, evaluation, demo and benchmark of the sandbox, with a budget too small to learn anything."""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from trl import GRPOTrainer

from igpo_trl.sandbox.demo import DemoPlan, run_demo
from igpo_trl.sandbox.evaluate import Scores, roll_out
from igpo_trl.sandbox.model import make_model, make_tokenizer
from igpo_trl.sandbox.train import Budget, TrainingRun, make_trainer, train_with_curve
from igpo_trl.sandbox.warm_start import WarmStartConfig
from igpo_trl.sandbox.world import make_dataset
from igpo_trl.trajectory import read_jsonl

# TRL still reads names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BUDGET = Budget(steps=2, questions=2, rollouts=4, eval_every=1, curve_questions=4)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The directory of a model with untrained weights, in place of a warm-started one."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer).save_pretrained(path)
    return path


def scripted(monkeypatch, trainer, turns):
    """Lets the policy generate the given turns, then the last one again and again."""
    ids = [trainer.processing_class(turn)["input_ids"] for turn in turns]
    remaining = iter(ids)

    def generate(prompt_ids, *args, **kwargs):
        turn = next(remaining, ids[-1])
        return [list(turn) for _ in prompt_ids], None

    monkeypatch.setattr(trainer, "_generate_single_turn", generate)


def test_both_loops_make_the_same_rollouts(policy, tmp_path, monkeypatch):
    """GRPO uses TRL's loop and IGPO ours, yet only the methods may differ."""
    questions = list(make_dataset(12, 6))
    words = questions[0]["prompt"][0]["content"].rstrip("?").split()
    query = f"{' '.join(words[-2:])} {words[-4]}"
    call = f'<tool_call>{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call><|im_end|>'
    turns_of = []
    for method in ("grpo", "igpo_critic"):
        trainer = make_trainer(method, policy, tmp_path / method, budget=BUDGET)
        scripted(monkeypatch, trainer, [call, "<answer>Ada Brown</answer><|im_end|>"])
        turns_of.append([[(t.text, t.observation) for t in record.turns] for record in roll_out(trainer, questions)])
    assert turns_of[0] == turns_of[1]
    assert all(len(turns) == 2 for turns in turns_of[0])
    assert words[-4] in turns_of[0][0][0][1] and "<|unk|>" not in str(turns_of)


def test_evaluation_reads_the_scripted_policy(policy, tmp_path, monkeypatch):
    trainer = make_trainer("grpo", policy, tmp_path, budget=BUDGET)
    questions = list(make_dataset(11, 4))
    call = '<tool_call>{"name": "search", "arguments": {"query": "Ada Brown mother"}}</tool_call><|im_end|>'
    gold = questions[0]["answers"][0]
    scripted(monkeypatch, trainer, [call, f"<answer>{gold}</answer><|im_end|>"])
    before = torch.random.get_rng_state()
    trajectories = roll_out(trainer, questions, sample=True, beliefs=True)
    assert torch.equal(before, torch.random.get_rng_state())
    first = trajectories[0]
    assert [turn.text for turn in first.turns] == [call, f"<answer>{gold}</answer><|im_end|>"]
    assert first.turns[0].observation.startswith("<|im_start|>tool\nThe ")
    assert first.turns[0].observation.endswith("<|im_start|>assistant\n")
    assert (first.info["em"], first.info["f1"], first.info["searches"]) == (1.0, 1.0, 1)
    assert first.turns[0].info_gain == pytest.approx(first.turns[1].belief - first.turns[0].belief)
    assert first.turns[1].info_gain is None
    scores = Scores.of(trajectories)
    assert scores.searches == 1
    assert scores.em == sum(gold in row["answers"] for row in questions) / 4
    # The settings for training are restored.
    assert trainer.generation_config.do_sample
    trainer.model.train()
    roll_out(trainer, questions)
    assert trainer.model.training


def test_cached_suffixes_are_those_of_trl(policy, tmp_path):
    trainer = make_trainer("grpo", policy, tmp_path, budget=BUDGET)
    messages = [{"role": "tool", "name": "search", "content": "The mother of Ada Brown is Eve Brown."}]
    expected = GRPOTrainer._get_tool_suffix_ids(trainer, messages)
    first = trainer._get_tool_suffix_ids(messages)
    first.append(-1)  # must not change the cache
    assert trainer._get_tool_suffix_ids(messages) == expected


def test_greedy_evaluation_repeats_and_sampling_follows_its_seed(policy, tmp_path):
    trainer = make_trainer("grpo", policy, tmp_path, budget=BUDGET)
    questions = list(make_dataset(11, 4))

    def texts(**options):
        return [[turn.text for turn in trajectory.turns] for trajectory in roll_out(trainer, questions, **options)]

    assert texts() == texts()
    assert texts(sample=True, seed=1) == texts(sample=True, seed=1)
    assert texts(sample=True, seed=1) != texts(sample=True, seed=2)


@pytest.mark.parametrize(
    "method, kind",
    [
        ("grpo_batch", "families"),
        ("igpo_separate", "families"),
        ("igpo_returns", "families"),
        ("igpo_critic", "strangers"),
    ],
)
def test_two_steps_train(policy, tmp_path, method, kind):
    trainer = make_trainer(method, policy, tmp_path, beta=0.1, budget=BUDGET, kind=kind, save_trajectories=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    run = train_with_curve(trainer, method, BUDGET, curve_seed=12, kind=kind)
    assert list(run.curve) == [0, 1, 2]
    assert len(run.reward) == len(run.collapse) == 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert len(before) == len(list(trainer.model.parameters()))
    saved = list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))
    assert len(saved) == 2 * 8
    assert {(record.step, record.group) for record in saved} == {(s, g) for s in (0, 1) for g in (0, 1)}


@pytest.mark.parametrize("metric", ["f1", "em"])
def test_the_outcome_is_that_of_the_budget(policy, tmp_path, metric):
    trainer = make_trainer("grpo", policy, tmp_path, budget=replace(BUDGET, answer_metric=metric))
    completions = [
        [{"role": "assistant", "content": f"<answer> {name} </answer>"}] for name in ("Zoe Evans", "Zoe Brown")
    ]
    (reward,) = trainer.reward_funcs
    assert reward(completions, answers=[["Zoe Evans"]] * 2) == [1.0, 0.5 if metric == "f1" else 0.0]


def test_area_is_the_mean_of_the_trapezoids():
    def scores(em):
        return Scores(em, em, {}, 0.0)

    run = TrainingRun("grpo", 0.0, curve={0: scores(0.0), 10: scores(0.2), 40: scores(0.4)})
    assert run.area == pytest.approx((10 * 0.1 + 30 * 0.3) / 40)


def test_demo_prints_the_table_and_writes_the_files_that_it_lists(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "cache"))
    plan = DemoPlan(
        methods=(("grpo", 0.0), ("igpo_critic", 0.0)),
        budget=BUDGET,
        warm=WarmStartConfig(demonstrations=64, epochs=1),
        test_questions=8,
    )
    run_demo(tmp_path / "out", plan=plan)
    printed = capsys.readouterr().out
    for words in ("Warm start", "GRPO", "IGPO (default)", "A rollout of IGPO (default)", "Question  "):
        assert words in printed
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert names == sorted(
        ["curves.png", "page.html", "rollout.png"]
        + [
            f"{folder}/test_{how}.jsonl"
            for folder in ("warm_start", "grpo", "igpo_critic")
            for how in ("greedy", "sampled")
        ]
        + [f"{folder}/trajectories/rank0.jsonl" for folder in ("grpo", "igpo_critic")]
    )
    assert len(list(read_jsonl(tmp_path / "out/grpo/test_sampled.jsonl"))) == 8
    assert printed.count(".jsonl") == 9  # one of them in the command that shows others
    # The page is named last, as what to open.
    assert "page.html" in printed.splitlines()[-1]


# --- benchmarks/learning.py


@pytest.fixture(scope="module")
def learning(repository_root):
    spec = importlib.util.spec_from_file_location("learning", repository_root / "benchmarks" / "learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository_root(request):
    return request.config.rootpath


def test_paired_difference_and_its_interval(learning):
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1/sqrt(3), t(2) = 4.30, half width 2.483
    assert learning.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == "+2.000 [-0.483, +4.483], 3/3"
    assert learning.spread([1.0, 3.0]) == f"2.000 ± {math.sqrt(2):.3f}"


def test_steps_to_a_level_are_interpolated(learning):
    curve = {"0": 0.1, "10": 0.3, "20": 0.2, "30": 0.8}
    assert learning.steps_to(0.1, curve) == 0
    assert learning.steps_to(0.2, curve) == pytest.approx(5)
    assert learning.steps_to(0.55, curve) == pytest.approx(20 + 10 * 0.35 / 0.6)
    assert learning.steps_to(0.9, curve) == 30


def run_and_row(learning, method, seed, area, rate=1e-3):
    run = learning.Run("families", 2, learning.STEPS[2], rate, seed, method)
    values = dict.fromkeys(("greedy_em", "sampled_em", "searches"), 0.5)
    return run, run._asdict() | values | {"area": area, "curve": {"0": 0.0, "10": area}}


def tuning(learning):
    """Results of the tuning seeds, of which the second learning rate is the better."""
    rates = enumerate(learning.LEARNING_RATES)
    pairs = [
        run_and_row(learning, "grpo_batch", seed, 0.1 * i, rate) for i, rate in rates for seed in learning.TUNING_SEEDS
    ]
    return dict(pairs)


def test_the_learning_rate_is_that_of_the_largest_area_on_all_tuning_seeds(learning):
    results = tuning(learning)
    assert learning.choose_learning_rate(results, "families", 2) == learning.LEARNING_RATES[1]
    results.popitem()
    assert learning.choose_learning_rate(results, "families", 2) is None
    assert "not tuned" in learning.report(results, "families", 2, [0], ["grpo_batch"])


def test_tables_have_the_seeds_that_are_complete(learning):
    areas = {("grpo_batch", 0): 0.2, ("igpo_critic", 0): 0.4, ("grpo_batch", 1): 0.2, ("igpo_critic", 1): 0.6}
    pairs = [run_and_row(learning, *key, area) for key, area in areas.items()]
    pairs.append(run_and_row(learning, "grpo_batch", 2, 9.0))  # without its counterpart
    methods = ["grpo_batch", "igpo_critic"]
    table = learning.report(tuning(learning) | dict(pairs), "families", 2, [0, 1, 2], methods)
    assert "2 of 3 seeds" in table
    assert "| grpo_batch | 0.200 ± 0.000 |" in table
    # Half of the best of the seed is .2 and .3: the baseline reaches the first at its end, and the second never.
    assert "| 10 ± 0 |" in table and "| 5 ± 0 |" in table
    assert "| igpo_critic | +0.300 [-0.971, +1.571], 2/2 |" in table


def test_runs_that_the_file_has_are_not_repeated(learning, tmp_path):
    run, row = run_and_row(learning, "grpo_batch", 0, 0.5)
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row) + "\n")
    assert learning.run_all([run], results, 1) == {run: row}


def test_a_run_measures_what_the_tables_show(learning, policy, monkeypatch):
    monkeypatch.setattr("igpo_trl.sandbox.warm_start.warm_start", lambda config: policy)
    row = learning.run_one(learning.Run("strangers", 2, 1, 1e-3, 0, "igpo_critic"), test_questions=4)
    assert set(learning.MEASURES) - {"half"} <= set(row)
    assert list(row["curve"]) == [0, 1]
    assert set(row["greedy_em_by_hops"]) <= {2, 3, 4}
