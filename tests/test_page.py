"""What the page of a run says, and the file and the server that it comes from."""

import base64
import hashlib
import json
import math
import os
import re

import pytest
from page_runs import evaluation, rollout, training

from igpo_trl.cli.view import run_names
from igpo_trl.evaluation.doctor import diagnose
from igpo_trl.report.page import page_data, write_page
from igpo_trl.report.page.compact import to_json
from igpo_trl.report.page.document import SCRIPTS
from igpo_trl.report.page.figures import by_turn, curve, verdict
from igpo_trl.report.page.live import Follower, create_app
from igpo_trl.report.page.measures import difference, estimate, gain_meaning, grade_of, reward_line, separation
from igpo_trl.report.page.questions import fate_of, lost_and_gained
from igpo_trl.trajectory import write_jsonl

# ------------------------------------------------------------------------------------------------------------- figures


def test_intervals_are_those_of_scipy():
    from scipy import stats

    a, b = [0.0, 1.0, 0.5, 0.25], [1.0, 0.75, 1.0]
    interval = stats.t.interval(0.95, 3, loc=sum(a) / 4, scale=stats.sem(a))
    assert estimate(a) == pytest.approx((0.4375, *interval))
    welch = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert difference(a, b) == pytest.approx((sum(b) / 3 - 0.4375, welch.low, welch.high))
    assert estimate([]) is None and difference(a, []) is None
    assert estimate([0.5]) == (0.5, None, None) and estimate([1.0, 1.0]) == (1, 1, 1)
    assert difference([0.0, 0.0], [1.0, 1.0]) == (1, 1, 1)


def test_separation_is_the_share_of_pairs_in_order():
    # Right against wrong: .9 > .2, .9 > .5, .5 > .2, .5 = .5: 3.5 of 4 pairs.
    assert separation([0.9, 0.2, 0.5, 0.5], [True, False, True, False]) == 3.5 / 4
    assert separation([0.9, 0.2], [True, True]) is None


@pytest.mark.parametrize(
    ("runs", "tone", "headline"),
    [
        ({"a": training()}, "good", r"It learned: reward 0.00 → 1.00 \(\+1.00, 95 % \[.*\]\) from the first"),
        ({"a": training()[::-1]}, "good", "It learned"),  # the order of the lines says nothing
        ({"a": training(rising=False)}, "unclear", r"No clear change: reward 0\.50 → 0\.50 \(\+0\.00"),
        ({"a": [rollout(f"{i}?", outcome=float(i < 8), step=i // 8) for i in range(16)]}, "bad", "It got worse"),
        ({"a": evaluation({0, 1, 2})}, "plain", r"Right answers to 25 % of 12 questions: reward 0\.25, 95 % \["),
        (
            {"a": evaluation({0, 1}), "b": evaluation(range(1, 12))},
            "good",
            r"b does better than a: reward 0\.17 → 0\.92 \(\+0\.75, 95 % .* on 12 questions that both have",
        ),
        ({"a": evaluation({0}) * 2}, "plain", "Right answers in 8 % of 24 rollouts on 12 questions"),
        ({"a": evaluation({0}), "b": evaluation(range(6))}, "likely good", "b probably does better than a"),
        ({"a": evaluation(range(6)), "b": evaluation({0})}, "likely bad", "b probably does worse than a"),
        ({"a": evaluation({0}), "b": evaluation({1})}, "unclear", "a or b: no clear difference"),
        ({"a": evaluation({0}), "b": [rollout("Else?")]}, "unclear", ".* on different questions"),
        ({"a": training(), "b": training(rising=False)}, "bad", "b does worse than a: .* in the last fifth"),
        ({"a": [rollout(outcome=None)]}, "unclear", "No reward was recorded"),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence_with_numbers(runs, tone, headline):
    found = page_data(runs)["figures"]["verdict"]
    assert found["tone"] == tone
    assert re.match(headline, found["headline"])


def test_notes_say_what_was_believed_and_how_often_that_did_not_help():
    run = [rollout(f"{i}?", beliefs=(0.1, 0.7), outcome=float(i < 2)) for i in range(5)]
    assert verdict({"a": run}, "beliefs", 0, 0)["notes"] == [
        "Mean belief in the right answer: 0.10 before the first search, 0.70 before the last turn.",
        "3 of 3 answers that were not right came although the policy believed in the right one (0.5 or more).",
    ]
    for each in run:
        for turn in each.turns:
            turn.belief = None
    assert verdict({"a": run}, "beliefs", 0, 0)["notes"] == ["No beliefs were recorded."]


def test_the_verdict_says_what_its_interval_is_over():
    basis = lambda runs: page_data(runs)["figures"]["verdict"]["basis"]  # noqa: E731
    assert "over groups" in basis({"a": training()}) and basis({"a": training()}).endswith("on training questions.")
    assert "over questions of one run" in basis({"a": evaluation({0})}) and "training" not in basis(
        {"a": evaluation({0})}
    )
    assert "shared questions" in basis({"a": evaluation({0}), "b": evaluation({1})})
    assert basis({"a": [rollout(outcome=None)]}) == ""


def test_figures_of_two_evaluations_are_those_of_shared_questions():
    found = page_data({"a": evaluation({0, 8}, 12), "b": evaluation({0}, 8)})["figures"]
    assert (found["shared"], found["counted"]) == (8, [8, 8])
    right = [fact["now"] for facts in found["facts"] for fact in facts if fact["name"] == "right"]
    assert right == [1 / 8, 1 / 8]
    assert page_data({"a": evaluation({0})})["figures"]["counted"] is None


def test_a_partial_reward_is_neither_right_nor_wrong():
    run = [rollout(f"{reward}?", outcome=reward) for reward in (1.0, 0.5, 0.0)]
    assert [grade_of(each) for each in run] == ["right", "partly", "wrong"]
    facts = {fact["name"]: fact["now"] for fact in page_data({"a": run})["figures"]["facts"][0]}
    assert [facts[name] for name in ("right", "partly", "wrong")] == pytest.approx([1 / 3] * 3)
    assert reward_line(run) == "Reward: 1 right, between 0 and 1 partly right, 0 wrong."
    assert reward_line(run[::2]) == "Reward: 1 right, 0 wrong."
    run[2].outcome = 0.2  # a part for the format: its answer is still wrong, and the line would not be true
    assert grade_of(run[2]) == "wrong" and reward_line(run) == ""


def test_what_a_gain_is_is_read_from_the_records():
    run = [rollout(beliefs=(0.1, 0.6, 0.3))]
    assert gain_meaning(run) == "belief"
    for turn, after in zip(run[0].turns, run[0].turns[1:], strict=False):
        turn.info_gain = math.log(after.belief / turn.belief)
    assert gain_meaning(run) == "logarithm"
    run[0].turns[0].info_gain = 7.0
    assert gain_meaning(run) == "other" and gain_meaning([rollout(beliefs=(0.1,))]) is None


def test_what_happened_in_a_lost_rollout_is_said_where_it_is_certain():
    cases = {(0.1, 0.6): "answered otherwise", (0.1, 0.9, 0.1): "pulled away", (0.1, 0.4): "never found"}
    for beliefs, fate in cases.items():
        assert fate_of(rollout(beliefs=beliefs, outcome=0.0)) == fate
        assert fate_of(rollout(beliefs=beliefs)) is None
    unknown = rollout(beliefs=(0.1, 0.4, 0.2), outcome=0.0)
    unknown.turns[1].belief = None
    assert fate_of(unknown) is None
    two = [rollout(beliefs=beliefs, outcome=0.0) for beliefs in cases][:2]
    _, lost, _ = lost_and_gained({"a": [rollout()], "b": two})
    assert [entry["fate"] for entry in lost] == [None]  # its rollouts differ
    assert page_data({"a": [rollout()], "b": two[:1]})["figures"]["questions"]["fates"] == {"answered otherwise": 1}


def test_a_curve_has_its_groups_as_independent_values():
    # Two groups in each step: outcomes 1, 1 and 0, 1. The interval is over the means 1 and .5.
    run = [
        rollout(f"{group}?", outcome=outcome, beliefs=(0.1, 0.2 + 0.1 * i), step=step, group=group)
        for step in range(2)
        for group, outcomes in enumerate(((1.0, 1.0), (0.0, 1.0)))
        for i, outcome in enumerate(outcomes)
    ]
    first, _ = curve(run)
    assert first["steps"] == [0, 0] and first["rollouts"] == 4
    assert first["reward"] == estimate([1.0, 0.5])
    # The first group collapsed; its gains, .1 and .2, differ.
    assert first["equal"].mean == 0.5 and first["only_gains"].mean == 0.5
    assert first["belief_end"].mean == pytest.approx(0.25) and first["searches"].mean == 1
    assert curve(run[:4]) == []  # a single step is no curve


def test_many_steps_are_drawn_together():
    points = curve([rollout(step=step) for step in range(100)])
    assert [point["steps"] for point in points[:2]] == [[0, 2], [3, 5]] and points[-1]["steps"] == [99, 99]
    assert sum(point["rollouts"] for point in points) == 100


def test_beliefs_by_turn_are_apart_for_right_answers_and_others():
    run = [rollout(beliefs=(0.1, 0.6, 0.9), outcome=1.0) for _ in range(6)]
    run += [rollout(beliefs=(0.1, 0.2), outcome=0.0) for _ in range(6)]
    turns = by_turn(run)
    assert [turn["beliefs"].get("right", [0, None])[1] for turn in turns] == [0.1, 0.6, 0.9]
    assert [turn["beliefs"].get("not right", [0, None])[1] for turn in turns] == [0.1, 0.2, None]
    assert [turn["searching"] for turn in turns] == [1.0, 0.5, 0.0]
    assert turns[0]["gain"].mean == pytest.approx(0.3) and turns[0]["gains"] == 12 and turns[2]["gain"] is None


# ----------------------------------------------------------------------------------------------------------- questions


def texts_of(entries):
    return [entry["question"].text for entry in entries]


def test_questions_lost_and_gained_between_two_runs():
    kind, lost, gained = lost_and_gained({"a": evaluation({0, 1}), "b": evaluation({1, 2, 3})})
    assert (kind, texts_of(lost), texts_of(gained)) == ("runs", ["Question 0?"], ["Question 3?", "Question 2?"])
    assert (lost[0]["before"], lost[0]["after"]) == (1, 0)


def test_questions_lost_and_gained_in_training_on_the_same_questions():
    outcomes = {"A?": (1.0, 0.5, 0.25), "B?": (0.0, 0.5, 1.0)}
    run = [rollout(name, outcome=outcomes[name][step], step=step) for step in range(3) for name in outcomes]
    kind, lost, gained = lost_and_gained({"a": run})
    assert (kind, texts_of(lost), texts_of(gained)) == ("repeated", ["A?"], ["B?"])
    assert (lost[0]["before"], lost[0]["after"], gained[0]["after"]) == (1.0, 0.25, 1.0)


def test_without_repetition_beliefs_say_what_was_lost_on_the_way():
    run = [
        rollout("Forgotten?", beliefs=(0.1, 0.9, 0.1), outcome=0.0),
        rollout("Believed?", beliefs=(0.6, 0.62), outcome=0.0),
        rollout("Never known?", beliefs=(0.01, 0.02), outcome=0.0),
        rollout("Found?", beliefs=(0.1, 0.8), outcome=1.0),
        rollout("Known before?", beliefs=(0.8, 0.82), outcome=1.0),
    ]
    kind, lost, gained = lost_and_gained({"a": run})
    assert (kind, texts_of(lost), texts_of(gained)) == ("beliefs", ["Forgotten?", "Believed?"], ["Found?"])
    assert (lost[0]["before"], lost[0]["after"]) == (0.9, 0.1)


# ---------------------------------------------------------------------------------------------------------------- data


def test_each_text_is_there_once_and_a_turn_has_what_the_page_shows():
    first, second = rollout(beliefs=(0.1, 0.6)), rollout(beliefs=(0.1, 0.123456), outcome=0.0)
    first.turns[0].calls[0].error = "timeout"
    first.turns[0].alias_beliefs = [0.25, None]
    data = json.loads(to_json(page_data({"a": [first, second]})))
    assert data["texts"] == ["[1] Page 0"] and data["questions"] == [["Who?", "", ["Ada"]]]
    assert [record["group"] for record in data["rollouts"]] == [0, 0]
    call = [["call", 'search(query="query 0")']]
    assert data["rollouts"][0]["turns"] == [
        [call, [0], 10, 0.1, 0.5, 0.5, [0.25, None], ["timeout"]],
        [[["answer", "Ada"]], [], 5, 0.6],
    ]
    assert data["rollouts"][1]["turns"][1] == [[["answer", "Eve"]], [], 5, 0.1235]


def test_json_cannot_end_its_element():
    text = to_json({"<": "</script><!--<script>&amp;"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"<": "</script><!--<script>&amp;"}
    assert to_json([math.nan, {"a": (-math.inf, 1.0)}]) == '[null,{"a":[null,1.0]}]'
    assert json.loads(to_json("\ud800")) == "\ud800" and to_json("\ud800").isascii()


def test_of_too_many_rollouts_whole_groups_are_kept_and_figures_count_all():
    run = training(steps=20, groups=5, size=4)
    data = page_data({"a": run}, max_rollouts=100)
    kept = data["rollouts"]
    assert 80 <= len(kept) <= 100 and data["runs"] == [{"name": "a", "rollouts": 400}]
    sizes = [sum(other["group"] == record["group"] for other in kept) for record in kept]
    assert set(sizes) == {4}
    assert len({record["step"] for record in kept}) >= 10
    shown = {record["question"] for record in kept}
    lists = data["figures"]["questions"]
    assert lists["gained"] and {entry["question"] for entry in lists["lost"] + lists["gained"]} <= shown
    assert lists["counts"][1] > len(lists["gained"])
    everything = page_data({"a": run})["figures"]
    assert all(data["figures"][name] == everything[name] for name in everything if name != "questions")


@pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": [1], "b": [1], "c": [1]}])
def test_other_numbers_of_runs_are_refused(runs):
    with pytest.raises(ValueError, match="expected one or two runs with rollouts"):
        page_data(runs)


# ------------------------------------------------------------------------------------------------------------ document


def test_the_page_is_one_file_whose_policy_names_its_scripts(tmp_path):
    pytest.importorskip("plotly")
    headline = write_page(tmp_path / "new" / "page.html", {"</title><b>": evaluation({0})})
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert headline.startswith("Right answers to 8 %")
    assert "<title>&lt;/title&gt;&lt;b&gt; · igpo</title>" in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe-eval" not in policy
    scripts = re.findall(r'<script(?: type="text/plain" id="plotly")?>(.*?)</script>', page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']*)'", policy) == digests and len(digests) == 2
    assert re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="([^"]*)"', page.split("<script")[0]) == [
        "data:,"
    ]


def test_the_scripts_make_no_elements_from_text(repository):
    folder = repository / "src" / "igpo_trl" / "report" / "page"
    assert sorted(script.name for script in folder.glob("*.js")) == sorted(SCRIPTS)
    for script in folder.glob("*.js"):
        code = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", code), script


# ---------------------------------------------------------------------------------------------------------- a live run


def rollouts_of(follower):
    data = json.loads(follower.latest()[0])
    return data and [record["step"] for record in data["rollouts"]]


def test_a_follower_reads_each_line_once_and_no_half_lines(tmp_path):
    follower = Follower({"run": tmp_path / "run"})
    assert rollouts_of(follower) is None
    file = tmp_path / "run" / "trajectories" / "rank0.jsonl"
    write_jsonl(file, [rollout(step=0)], append=True)
    assert rollouts_of(follower) == [0]
    text, tag = follower.latest()
    assert follower.latest() == (text, tag)
    line = rollout(step=1).to_json()
    with file.open("a") as stream:
        stream.write(line[:40])
        stream.flush()
        assert follower.latest() == (text, tag)
        stream.write(line[40:] + "\n")
    write_jsonl(file.with_name("rank1.jsonl"), [rollout(step=1)], append=True)
    assert rollouts_of(follower) == [0, 1, 1]
    assert follower.latest()[1] != tag


def test_a_follower_says_what_the_doctor_finds_so_far(tmp_path):
    follower = Follower({"run": tmp_path}, diagnose=lambda path: diagnose(path).to_dict())
    assert json.loads(follower.latest()[0]) is None
    file = tmp_path / "trajectories" / "rank0.jsonl"
    for steps in (range(4), range(4, 8)):
        write_jsonl(file, [rollout(step=step) for step in steps], append=True)
        (shown,) = json.loads(follower.latest()[0])["diagnoses"].values()
        assert shown == json.loads(json.dumps(diagnose(tmp_path).to_dict()))


def test_a_follower_tries_again_after_the_doctor_has_failed(tmp_path):
    answers = iter([FileNotFoundError("replaced"), {"findings": [], "healthy": ["drift"]}])

    def diagnose_or_fail(path):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    follower = Follower({"run": tmp_path}, diagnose=diagnose_or_fail)
    write_jsonl(tmp_path / "trajectories" / "rank0.jsonl", [rollout(step=0)])
    with pytest.raises(FileNotFoundError):
        follower.latest()
    assert json.loads(follower.latest()[0])["diagnoses"]["run"]["healthy"] == ["drift"]


def test_a_follower_starts_again_when_training_resumes(tmp_path):
    from igpo_trl.trajectory import drop_later

    file = tmp_path / "trajectories" / "rank0.jsonl"
    write_jsonl(file, [rollout(step=step) for step in range(4)])
    follower = Follower({"run": tmp_path})
    assert rollouts_of(follower) == [0, 1, 2, 3]
    drop_later(file, 2)
    write_jsonl(file, [rollout(step=2)], append=True)
    assert rollouts_of(follower) == [0, 1, 2]


def get(app, path, **headers):
    import anyio
    import httpx2

    async def ask():
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.get(path, headers=headers)

    return anyio.run(ask)


def test_the_server_sends_data_once_and_only_to_this_machine(tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("starlette")
    file = tmp_path / "rank0.jsonl"
    write_jsonl(file, evaluation({1}))
    app = create_app(Follower({"run": file}), "run")
    page = get(app, "/")
    assert page.status_code == 200 and "connect-src 'self'" in page.text and ">null</script>" in page.text
    answer = get(app, "/data.json")
    assert answer.json()["runs"] == [{"name": "run", "rollouts": 12}]
    tag = answer.headers["ETag"]
    assert get(app, "/data.json", **{"If-None-Match": tag}).status_code == 304
    assert get(app, "/data.json", Host="elsewhere.example").status_code == 400
    with file.open("a") as stream:
        stream.write("{}\n")
    answer = get(app, "/data.json", **{"If-None-Match": tag})
    assert answer.status_code == 500 and "cannot be read" in answer.text


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a/trajectories"], ["a"]),
        (["runs/a/trajectories/rank0.jsonl"], ["a"]),
        (["runs/a/evaluation"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/e1/evaluation/after", "runs/e3/evaluation/after"], ["e1", "e3"]),
        (["runs/e1/evaluation/before", "runs/e1/evaluation/after"], ["before", "after"]),
        (["runs/x/a", "runs/y/b"], ["x/a", "y/b"]),
        (["runs/a", "runs/a"], ["a (1)", "a (2)"]),
        (["runs/a", "runs/a/b"], ["a", "a/b"]),
        (["runs/grpo_batch-lr0.0003-seed0/train", "runs/igpo-lr0.0003-seed0/train"], ["grpo_batch", "igpo"]),
        (["runs/igpo-lr0.0003-seed0", "runs/igpo-lr0.0003-seed1"], ["seed0", "seed1"]),
    ],
)
def test_runs_have_short_names(paths, names, tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    assert run_names([Path(path) for path in paths]) == names


def test_the_command_writes_a_page_and_says_the_verdict(tmp_path):
    pytest.importorskip("plotly")
    from typer.testing import CliRunner

    from igpo_trl.cli.app import app

    def run(*words):
        return CliRunner().invoke(app, ["view", *map(str, words)], env={**os.environ, "COLUMNS": "200"})

    for name, right in (("a", {0}), ("b", set(range(12)))):
        write_jsonl(tmp_path / name / "trajectories" / "rank0.jsonl", evaluation(right))
    page = tmp_path / "page.html"
    result = run(tmp_path / "a", tmp_path / "b", "--html", page)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("b does better than a: reward 0.08 → 1.00") and str(page) in result.output
    assert page.stat().st_size > 1_000_000
    for words, message in (
        ((tmp_path / "a", tmp_path / "b"), "add --html FILE or --serve"),
        ((tmp_path / "a", "--html", page, "--serve"), "--serve writes no file"),
        ((tmp_path / "absent", "--html", page), "does not exist"),
        ((tmp_path, "--html", page), "no rollouts in"),
    ):
        result = run(*words)
        assert result.exit_code == 2 and message in result.stderr, result.output
