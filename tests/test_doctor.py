"""The diagnosis: each signature with a run that shows it, and the healthy run that shows none."""

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from typer.testing import CliRunner

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli.app import app
from igpo_trl.evaluation.doctor import DoctorCallback, RunFacts, diagnose
from igpo_trl.evaluation.doctor.credit import turn_price_of
from igpo_trl.evaluation.doctor.facts import Facts
from igpo_trl.evaluation.doctor.searching import stopping_area
from igpo_trl.evaluation.doctor.signatures import SIGNATURES, NotCheckedError
from igpo_trl.evaluation.scores import echoes
from igpo_trl.trajectory import Call, Trajectory, Turn, load_run, write_jsonl

STEPS, GROUPS, SIZE = 16, 8, 8
NAMES = {signature.name for signature in SIGNATURES}


def rollout(rng, step, group, number, **changed):
    """A rollout of a run that learns: one or two searches, of which the last often finds the answer."""
    searches = changed.get("searches", 1 + (number % 2))
    answer = f"Name{group}{step}"
    first, found = 0.05 + 0.02 * rng.random(), number % 4 != 3
    beliefs = [first] + [first + 0.05 * rng.random() for _ in range(searches - 1)]
    beliefs += [(0.6 if found else 0.05) + 0.1 * rng.random()] if searches else []
    turns = []
    for k, belief in enumerate(beliefs):
        is_last = k == len(beliefs) - 1
        text = f"It is {answer}." if k == len(beliefs) - 2 and found else "Something else."
        call = [] if is_last else [Call("search", {"query": f"query {k}"})]
        turns.append(
            Turn("…", "" if is_last else text, 20, belief, calls=call, observation_tokens=0 if is_last else 50)
        )
    outcome = float(found and rng.random() < 0.8)
    for turn in turns:
        turn.advantage = outcome + 0.5 * (turns[-1].belief - turns[0].belief) - 0.5 + 0.01 * rng.random()
    return Trajectory(
        f"prompt {group} {step}",
        turns,
        [answer],
        outcome,
        {"f1": outcome},
        step,
        group,
        "answered",
        question=answer[4:],
    )


def make_run(change=lambda rollout, rng, number: None, log=(), options=None, same_questions=False, **changed):
    """The facts of a healthy run after `change` was applied to every rollout."""
    rng, rollouts = random.Random(0), []
    for step in range(STEPS):
        for group in range(GROUPS):
            for number in range(SIZE):
                one = rollout(rng, step, group, number, **changed)
                change(one, rng, number)
                if same_questions:
                    one.question = f"question {group}"
                rollouts.append(one)
    healthy_log = [{"step": step, "kl": 0.02, "grad_norm": 0.5, "learning_rate": 1e-6} for step in range(1, STEPS + 1)]
    return RunFacts.of(rollouts, [a | b for a, b in zip(healthy_log, log or [{}] * STEPS, strict=True)], options)


def beliefs(*values):
    def change(one, rng, number):
        for turn, value in zip(one.turns, values * 9, strict=False):
            turn.belief = value + 0.001 * rng.random()

    return change


def falls(one, rng, number):
    for turn, value in zip(one.turns, (0.5, 0.3, 0.2), strict=False):
        turn.belief = value + 0.05 * rng.random()


def falls_over_training(one, rng, number):
    one.turns[-1].belief = 0.8 - 0.04 * one.step + 0.05 * rng.random()


def frozen(one, rng, number):
    one.turns[0].belief = 0.1


def tiny_after_evidence(one, rng, number):
    for turn in one.turns:
        turn.belief = 1e-4 * (1 + rng.random())


def unrelated(one, rng, number):
    one.outcome = float(rng.random() < 0.5)


def no_advantage(one, rng, number):
    for turn in one.turns:
        turn.advantage = 1e-4 * rng.random()


def taxed(one, rng, number):
    for turn in one.turns:
        turn.advantage -= 0.4 * len(one.turns)


def shorter(one, rng, number):
    one.outcome = float(rng.random() < 0.4)
    if one.step > STEPS // 2:
        del one.turns[:-1]


def useless(one, rng, number):
    for turn in one.turns:
        turn.belief = 0.1 + 0.001 * rng.random()


def idle(one, rng, number):
    for _ in range(2):
        one.turns.insert(1, Turn("…", "More.", 20, 0.95 + 0.001 * rng.random(), advantage=0.1, observation_tokens=50))
    one.turns[-1].belief = 0.95


def blind(one, rng, number):
    if len(one.turns) == 3:  # it searches on, although its first search found as much
        one.turns[1].belief = 0.6 + 0.1 * rng.random()


def repeats(one, rng, number):
    call = Call("search", {"query": "always this"})
    one.turns.insert(0, Turn("…", "Something.", 20, one.turns[0].belief, advantage=0.1, calls=[call]))
    for turn in one.turns[:-1]:
        turn.calls = [call]


def knows(one, rng, number):
    one.turns[0].calls = [Call("search", {"query": f"is it {one.answers[0]}"})]


def never_found(one, rng, number):
    for turn in one.turns:
        turn.observation = turn.observation and "Nothing."
    one.outcome = 0.0 if one.group < 6 else one.outcome


def penalised(one, rng, number):
    one.outcome = -0.5 if number < 5 else one.outcome / 10


def echoing(one, rng, number):
    one.question, one.answers = f"Which river is number {one.group}?", [f"River {one.answers[0]}"]
    if not one.outcome:
        one.turns[-1].text, one.outcome = "<answer>the river</answer>", 0.5
    else:
        one.turns[-1].text = f"<answer>{one.answers[0]}</answer>"


def cut_off(one, rng, number):
    one.stop_reason = "length_limit" if number < 3 else "answered"


def garbled(one, rng, number):
    if one.step > STEPS // 2 and number < 3:
        one.turns[0].calls = [Call("unknown", error="malformed")]


SHOWN = {
    "belief_saturation": {"change": beliefs(0.95, 0.96)},
    "beliefs_fall": {"change": falls},
    "template_mismatch": {"change": tiny_after_evidence},
    "belief_without_outcome": {"change": unrelated},
    "advantage_collapse": {"change": no_advantage},
    "turn_tax": {"change": taxed},
    "turn_shortening": {"change": shorter},
    "searching_without_gain": {"change": useless},
    "over_searching": {"change": idle},
    "blind_stopping": {"change": blind},
    "self_locking": {"change": repeats},
    "answer_in_queries": {"change": knows},
    "unanswerable": {"change": never_found},
    "format_penalty": {"change": penalised},
    "question_echo": {"change": echoing},
    "malformed_calls": {"change": garbled},
    "truncation": {"change": cut_off, "options": {"max_turns": 4, "max_completion_length": 128}},
    "drift": {"log": [{"kl": 0.1 * step} for step in range(STEPS)]},
    "no_op": {"log": [{"grad_norm": 0.0}] * STEPS},
}

# What such a run shows as well, because it follows from how the run was made.
ALSO = {
    "beliefs_fall": ["searching_without_gain"],
    "template_mismatch": ["belief_without_outcome", "searching_without_gain"],
    "turn_shortening": ["belief_without_outcome"],
    "searching_without_gain": ["belief_without_outcome"],
    "format_penalty": ["belief_without_outcome"],
}


def test_a_healthy_run_shows_nothing_and_everything_is_checked():
    diagnosis = diagnose(make_run())
    assert (diagnosis.findings, diagnosis.not_checked) == ([], {})
    assert set(diagnosis.healthy) == NAMES == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_that_shows_a_signature(name):
    found = {finding.name: finding for finding in diagnose(make_run(**SHOWN[name])).findings}
    assert name in found, found
    finding = found[name]
    assert finding.numbers and finding.evidence and "`" in finding.change
    assert finding.steps == (12, 15)
    assert set(found) == {name, *ALSO.get(name, ())}


def test_other_evidence_for_the_same_signatures():
    names = [finding.name for finding in diagnose(make_run(falls_over_training)).findings]
    assert names == ["beliefs_fall", "belief_without_outcome"]
    (priced,) = diagnose(make_run(log=[{"credit/turn_price": 0.3} for step in range(STEPS)])).findings
    assert (priced.name, priced.numbers["turn_price"]) == ("turn_tax", 0.3)
    assert "(logged); turns per rollout: first 2.50" in priced.evidence
    (paid,) = diagnose(make_run(log=[{"credit/turn_price": -0.3} for step in range(STEPS)])).findings
    assert "a further turn that changes nothing earns 0.30" in paid.evidence
    for believer, expected in (("policy", ["no_op"]), ("reference", [])):
        run = make_run(frozen, same_questions=True, options={"belief_model": believer})
        assert [f.name for f in diagnose(run).findings] == expected


@pytest.mark.parametrize("log", [(), [{"credit/turn_price": 0.5 if step < 5 else 0.0} for step in range(STEPS)]])
def test_the_price_is_read_where_there_were_searches(log):
    """A run that has stopped searching does not show at its end what searching cost."""

    def stopped(one, rng, number):
        if one.step >= STEPS // 2:
            one.outcome = float(rng.random() < 0.4)
            del one.turns[:-1]
        elif not log:
            taxed(one, rng, number)

    findings = {finding.name: finding for finding in diagnose(make_run(stopped, log=log)).findings}
    assert findings["turn_tax"].numbers["turn_price"] == pytest.approx(0.5 if log else 0.4, abs=0.05)
    assert (
        f"{'logged' if log else 'estimated from the advantages'} in the first steps" in findings["turn_tax"].evidence
    )
    assert "turn_shortening" in findings


def test_stopping_is_compared_within_a_turn():
    def of(on, end, turn=1, stop="answered"):
        """Rollouts that search on from these beliefs, and end, unsure, a turn later; and some that answer at these."""
        ways = [(on, [0.5], None), (end, [], stop)]
        return [
            Facts.of(Trajectory("", [Turn("…", "", 1, b) for b in [None] * turn + [x, *more]], stop_reason=why))
            for beliefs, more, why in ways
            for x in beliefs
        ]

    assert stopping_area(of([0.1, 0.2], [0.3, 0.4]))[0] == 1
    assert stopping_area(of([0.1, 0.3], [0.2, 0.3]))[0] == 0.625  # three of four, one of them a tie of half a pair
    # In the second turn all believe more, and more of them answer. That says nothing of what the policy looks at.
    assert stopping_area(of([0.2, 0.1] * 3, [0.2, 0.1]) + of([0.9, 0.8], [0.9, 0.8] * 3, turn=2))[0] == 0.5
    # Under the null hypothesis, over all orders of two and two: variance 2 * 2 * 5 / 12 of the number of pairs won.
    assert stopping_area(of([0.1, 0.2], [0.3, 0.4]))[1] == pytest.approx((20 / 12) ** 0.5 / 4)
    with pytest.raises(NotCheckedError, match="in no turn"):  # who is cut off has not decided to stop
        stopping_area(of([0.1, 0.2], [0.3, 0.4], stop="length_limit"))


def test_a_fixed_number_of_searches_is_blind_too():
    def twice(found):
        def change(one, rng, number):
            one.turns[-1].belief = 0.7 if rng.random() < found else 0.05
            one.outcome = float(one.turns[-1].belief > 0.5)

        return change

    def names(change, **options):
        return {finding.name for finding in diagnose(make_run(change, searches=2, options=options)).findings}

    (finding,) = [f for f in diagnose(make_run(twice(0.5), searches=2)).findings if f.name == "blind_stopping"]
    assert finding.evidence.startswith("100% of rollouts answer in turn 3, whatever they have read: ")
    assert finding.numbers["unsure"] == pytest.approx(0.5, abs=0.1)
    assert "blind_stopping" not in names(twice(0.9))  # two searches are what the questions need
    assert "blind_stopping" not in names(twice(0.5), max_turns=3)  # it may not search on


def test_malformed_calls_are_compared_with_the_beginning():
    (finding,) = diagnose(make_run(garbled)).findings
    assert "38% of rollouts have a tool call that cannot be read, and 0% at first" in finding.evidence


def test_the_truncation_is_explained_by_the_lengths():
    (finding,) = diagnose(make_run(**SHOWN["truncation"])).findings
    assert "cuts off 38% of rollouts. 4 turns of about 20 tokens with results of about 50 need 230" in finding.evidence
    assert "`max_completion_length` is 128" in finding.evidence


def test_the_price_of_a_turn_is_read_off_the_advantages():
    assert turn_price_of(make_run().recent) == pytest.approx(0, abs=0.05)
    assert turn_price_of(make_run(taxed).recent) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("answer", "question", "echoed"),
    [
        ("the River Ems", "Which river flows through it?", True),
        ("the River Ems", "What flows through it?", False),  # nobody had said that it is a river
        ("River Elbe", "Which river flows through it?", False),
        ("Elbe river", "Which river flows through it?", False),  # `Elbe` is not in the question
        ("Rome", "Which river flows through it?", False),
        (None, "Which river flows through it?", False),
    ],
)
def test_words_of_the_question_that_f1_pays_for(answer, question, echoed):
    assert echoes(answer, ["River Elbe"], question) is echoed


def test_what_is_missing_is_said():
    facts = RunFacts.of([Trajectory("p", [Turn("a")], ["x"])])
    diagnosis = diagnose(facts)
    assert (diagnosis.findings, diagnosis.healthy) == ([], [])
    assert set(diagnosis.not_checked) == NAMES
    assert diagnosis.not_checked["drift"].startswith("no `kl` in the trainer's log")


# ------------------------------------------------------------------------------------------------------------- command


def save(folder, change=lambda one, rng, number: None):
    rng = random.Random(0)
    rollouts = [rollout(rng, s, g, n) for s in range(STEPS) for g in range(GROUPS) for n in range(SIZE)]
    for number, one in enumerate(rollouts):
        change(one, rng, number % SIZE)
    write_jsonl(folder / "trajectories" / "rank0.jsonl", rollouts)
    return folder


def test_the_command_says_what_and_exits_with_one(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(save(tmp_path / "taxed", taxed))])
    assert result.exit_code == 1, result.output
    assert "1024 rollouts of steps 0 to 15" in result.output
    assert "turn_tax (steps 12 to 15)\n  seen:   a further turn that changes nothing costs 0.4" in result.output
    assert "change: Use `normalization='critic'`" in result.output
    assert "not checked: drift (no `kl`" in result.output
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "taxed"), "--json"])
    assert result.exit_code == 1
    assert [finding["name"] for finding in json.loads(result.output)["findings"]] == ["turn_tax"]


def test_the_command_exits_with_zero_or_two(tmp_path):
    assert CliRunner().invoke(app, ["doctor", str(save(tmp_path / "well"))]).exit_code == 0
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "absent"):
        assert CliRunner().invoke(app, ["doctor", str(path)]).exit_code == 2


def test_the_log_of_the_newest_checkpoint_is_read(tmp_path):
    run = save(tmp_path)
    for number, kl in ((16, 0.9), (8, 0.1)):
        log = [{"step": step, "kl": kl} for step in range(1, number + 1)]
        (run / f"checkpoint-{number}").mkdir()
        state = {"global_step": number, "log_history": log}
        (run / f"checkpoint-{number}/trainer_state.json").write_text(json.dumps(state))
    assert [finding.name for finding in diagnose(run).findings] == ["drift"]
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 17, "log_history": []}))  # the end of the run
    assert "drift" in diagnose(run).not_checked


# ------------------------------------------------------------------------------------------------------ while training


def test_the_callback_warns_once_of_each_signature(caplog):
    trainer = SimpleNamespace(args=IGPOConfig("unused", bf16=False, use_cpu=True, report_to="none"))
    callback = DoctorCallback(trainer, every=10)
    callback.batches = [[each] for each in make_run(taxed).rollouts]
    state = SimpleNamespace(is_world_process_zero=True, global_step=15, log_history=[])
    with caplog.at_level(logging.WARNING, "igpo_trl"):
        for _ in range(2):
            callback.on_train_end(None, state, None)
    (record,) = caplog.records
    assert record.getMessage().startswith("turn_tax (steps 12 to 15): a further turn that changes nothing costs 0.4")


def test_the_callback_looks_at_the_batches_of_a_trainer(tmp_path):
    trainer = tiny.make_trainer(IGPOTrainer, IGPOConfig, tmp_path, max_steps=3, save_trajectories=True)
    callback = DoctorCallback(trainer, every=1)
    trainer.add_callback(callback)
    trainer.train()
    seen = [each for batch in callback.batches for each in batch]
    assert seen == RunFacts.load(tmp_path).rollouts
    assert callback.diagnosis(trainer.state).rollouts == len(load_run(tmp_path)) == len(seen) > 0


def test_the_docs_name_every_signature():
    text = (Path(__file__).resolve().parent.parent / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [s.name for s in SIGNATURES]
