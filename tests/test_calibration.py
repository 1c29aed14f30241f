"""`igpo eval --calibration`: beliefs against the share of right answers that are sampled in the same states."""

import json
import math

import pytest
import tiny
import torch
from test_evaluation_rollouts import command, files, settings  # noqa: F401
from typer.testing import CliRunner

from igpo_trl.beliefs import build_probes, reduce_aliases, score_beliefs
from igpo_trl.cli.app import app
from igpo_trl.evaluation import load_run
from igpo_trl.evaluation.calibration import CALIBRATION, REDUCTIONS, calibrate, reduction_table
from igpo_trl.evaluation.forced_answers import shares_of_right_answers
from igpo_trl.evaluation.rollouts import roll_out
from igpo_trl.trajectory import Trajectory, Turn

TEMPLATE = "<answer>\n{answer}\n</answer>"


def options_rows(args, options):
    return tuple((args[0] if args else options["input_ids"]).shape)


def taught(tokenizer, weights):
    """A model that has learned to answer with these texts, as often as their weights say."""
    model = tiny.make_model(initializer_range=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    end = tokenizer.eos_token
    texts = [f"Capital?{TEMPLATE.format(answer=answer)}{end}" for answer in weights]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shares = torch.tensor(list(weights.values()))
    for _ in range(120):
        logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        optimizer.zero_grad()
        (loss.sum(dim=1) * shares).sum().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("shared", [True, False])
def test_the_share_of_right_answers_is_their_probability(shared, monkeypatch):
    tokenizer = tiny.make_tokenizer()
    model = taught(tokenizer, {"Paris": 0.7, "Rome": 0.3})
    rows = []
    model.register_forward_pre_hook(
        lambda _, args, options: rows.append(options_rows(args, options)), with_kwargs=True
    )
    if not shared:  # as for a model whose cache cannot be branched
        monkeypatch.setattr("igpo_trl.evaluation.forced_answers.packed_obstacle", lambda *_: "its cache")
    contexts = [tokenizer.encode("Capital?"), tokenizer.encode("Capital?" * 3)]
    for answer in ("Paris", "Rome"):
        (probe,) = build_probes(tokenizer, [answer], TEMPLATE)
        (beliefs,) = score_beliefs(model, contexts[:1], [[len(contexts[0])]], [[probe]])
        length = probe.answer_end - probe.answer_start
        probability = math.exp(float(beliefs.flatten()[0]) * length)  # beliefs are means over tokens
        torch.manual_seed(0)
        share, _ = shares_of_right_answers(
            model, tokenizer, contexts, [probe] * 2, [[answer]] * 2, TEMPLATE, samples=400
        )
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 400)), answer
        assert 0.1 < share < 0.9
    assert ((1, len(contexts[0]) + probe.answer_start - 1) in rows) == shared
    assert shares_of_right_answers(model, tokenizer, [], [], [], TEMPLATE, samples=2) == []


def test_the_scores_of_a_forecast():
    def rollout(dataset, id, beliefs, shares):
        info = {"dataset": dataset, "id": id, "sample": 0, CALIBRATION: shares}
        return Trajectory("?", [Turn("t", belief=b) for b in beliefs], ["a"], info=info)

    results = calibrate(
        [
            rollout("nq", "1", [0.25, 0.75], [0.5, 1.0]),
            rollout("nq", "2", [None, 0.5], [0.0, 0.0]),
            rollout("popqa", "1", [0.5], [0.5]),
            Trajectory("?", [Turn("t", belief=0.5)], ["a"]),
        ]
    )
    assert list(results) == ["nq", "popqa", "all"]
    nq = results["nq"]
    assert nq.states == 3 and nq.belief == pytest.approx(0.5) and nq.right == pytest.approx(0.5)
    # Of the first state's samples one half is right: (.75² + .25²) / 2; of the others all or none: .25² and .5².
    assert nq.brier == pytest.approx(((0.75**2 + 0.25**2) / 2 + 0.25**2 + 0.5**2) / 3)
    assert nq.error == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert nq.rank_correlation == pytest.approx(0.5)
    assert results["popqa"].rank_correlation is None and results["all"].states == 4
    assert calibrate([Trajectory("?", [Turn("t", belief=0.5)], ["a"])]) == {}


def test_the_command_saves_and_shows_it(files, tmp_path):  # noqa: F811
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    out = tmp_path / "run"
    words = command(files, out, "--limit", 3, "--calibration", 4)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "Calibration of beliefs" in result.output, result.output
    for each in load_run(out):
        assert len(each.info[CALIBRATION]) == len(each.turns)
        assert all(share in (0, 0.25, 0.5, 0.75, 1) for share in each.info[CALIBRATION])
    saved = json.loads((out / "results.json").read_text())["calibration"]["rivers"]
    assert saved["states"] == sum(len(each.turns) for each in load_run(out))
    assert "Calibration of beliefs" in (out / "results.md").read_text()
    assert (out / "calibration.svg").is_file() and (out / "calibration.png").is_file()
    # The rollouts are those of an evaluation without it.
    plain = roll_out(settings(files, limit=3), tmp_path / "plain")
    assert [[t.text for t in each.turns] for each in plain] == [[t.text for t in each.turns] for each in load_run(out)]


@pytest.mark.parametrize("changed", [{"beliefs": False}, {"vllm": True}])
def test_it_needs_beliefs_and_the_model(files, changed):  # noqa: F811
    with pytest.raises(ValueError, match="compares answers with beliefs"):
        settings(files, calibration=2, **changed).resolve()


def test_the_calibration_of_each_reduction():
    def rollout(id, aliases, share):
        turn = Turn("t", belief=max(aliases), alias_beliefs=aliases)
        return Trajectory("?", [turn], ["a", "b"], info={"dataset": "nq", "id": id, "sample": 0, CALIBRATION: [share]})

    rollouts = [rollout("1", [0.1, 0.9], 0.0), rollout("2", [0.2, 0.4], 0.5), rollout("3", [0.3, 0.8], 1.0)]
    correlations = {name: calibrate(rollouts, name)["nq"].rank_correlation for name in ("first", "max", "mean")}
    assert correlations == pytest.approx({"first": 1.0, "max": -0.5, "mean": 0.5})
    for name, reduce in REDUCTIONS.items():  # as the trainer reduces them
        assert reduce([0.1, 0.9]) == pytest.approx(float(reduce_aliases(torch.tensor([0.1, 0.9]).log(), name).exp()))
    rows = reduction_table(rollouts).rows
    assert [row[1] for row in rows] == ["first", "max", "mean"] and len({tuple(row[2:]) for row in rows}) == 3
    assert reduction_table([rollout("1", [0.5], 1.0)]) is None
