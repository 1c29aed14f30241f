"""Scores, intervals, tests, comparisons and the files of a run: by hand, and against enumeration and simulation."""

import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from igpo_trl import evaluation
from igpo_trl.data import load_questions
from igpo_trl.evaluation import (
    bootstrap_interval,
    check_retrieval,
    compare_runs,
    has_answer,
    load_run,
    mcnemar_test,
    permutation_test,
    score_retrieval,
    score_run,
)
from igpo_trl.evaluation.retrieval import FEWEST_FOUND, retrieval_table
from igpo_trl.evaluation.run import RunDirectory, append_lines, drop_torn_line
from igpo_trl.evaluation.scores import AVERAGE, measure
from igpo_trl.evaluation.settings import choose_questions, pair_sources, questions_digest
from igpo_trl.evaluation.tables import Table
from igpo_trl.rewards import f1_score
from igpo_trl.search import BM25Index
from igpo_trl.trajectory import RolloutKey, Trajectory, Turn, key_of


def rollout(dataset, name, said, answers=("Paris",), sample=0, observation="", belief=None, **info):
    turns = [Turn("look", observation, 5, 0.25)] if observation else []
    turns.append(Turn(f"<answer>{said}</answer>" if said is not None else "nothing", "", 7, belief))
    info |= {"dataset": dataset, "id": name, "sample": sample}
    return Trajectory("Who?", turns, list(answers), stop_reason="answered", info=info)


# --------------------------------------------------------------------------------------------------- answers in texts


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is Paris's oldest bridge.", "Paris", True),
        ("a comparison", "Paris", False),
        ("the Anglo-American war", "American", True),
        ("in 1912", "12", False),
        ("Beyoncé sang", "beyonce", True),
        ("The Beatles", "the beatles", True),
        ("Beatles", "The Beatles", True),
        ("the U.S. of A.", "U.S.", True),
        ("anything", "?!", False),
        ("", "Paris", False),
    ],
)
def test_an_answer_is_found_as_whole_words(text, answer, expected):
    assert has_answer(["nothing here", text], ["something else", answer]) is expected


# --------------------------------------------------------------------------------------------------- intervals, tests


def test_intervals_contain_the_true_mean_as_often_as_they_promise():
    # 300 samples of 80 questions, right with probability 0.3: about 95 % of the intervals contain 0.3. Binomial noise
    # over 300 is 1.3 points; the percentile bootstrap of 80 zeros and ones is about a point short.
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        low, high = bootstrap_interval(generator.binomial(1, 0.3, 80), resamples=499, seed=seed)[1:]
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_interval_of_an_average_over_sets_is_stratified():
    generator = np.random.default_rng(0)
    small, large = generator.normal(0, 1, 50), generator.normal(10, 1, 400)
    interval = bootstrap_interval(small, large)
    assert interval.mean == pytest.approx((small.mean() + large.mean()) / 2)
    # Mixing the sets would give an interval of about 2 · 1.96 · 3.1 / √450 = 0.6; drawing from each separately:
    width = 2 * 1.96 * np.sqrt(small.var() / 50 + large.var() / 400) / 2
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)
    assert bootstrap_interval(small, large) == interval
    assert bootstrap_interval(small, large, seed=1) != interval


def test_one_question_has_no_interval():
    assert bootstrap_interval([0.5]) == (0.5, None, None)
    assert bootstrap_interval([0.5], [0.0, 1.0]) == (0.5, None, None)
    for nothing in ((), ([],), ([1.0], [])):
        with pytest.raises(ValueError, match="at least one"):
            bootstrap_interval(*nothing)


def test_samples_of_a_question_are_one_observation():
    once = [rollout("nq", str(i), "Paris" if i % 3 else "Rome") for i in range(30)]
    often = [rollout("nq", str(i), "Paris" if i % 3 else "Rome", sample=s) for i in range(30) for s in range(8)]
    assert score_run(once).sets["nq"].metrics["em"] == score_run(often).sets["nq"].metrics["em"]
    assert (score_run(often).sets["nq"].questions, score_run(often).sets["nq"].rollouts) == (30, 240)


def test_permutation_test_is_all_sign_flips():
    differences = [0.5, -0.25, 1.0, 0.0, 0.75, 0.125, -0.5, 1.0]
    sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=len(differences))]
    expected = np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-12)
    assert permutation_test(differences) == pytest.approx(expected)
    # Over several sets, each set has the same weight.
    sets = [0.5, 0.5, 0.5, 0.25], [-0.5, 1.0]
    weighted = [x / len(values) / 2 for values in sets for x in values]
    sums = [np.dot(signs, weighted) for signs in itertools.product((1, -1), repeat=6)]
    assert permutation_test(*sets) == pytest.approx(np.mean(np.abs(sums) >= abs(sum(weighted)) - 1e-12))
    assert permutation_test([1.0]) is None
    assert permutation_test([0.0] * 40) == 1.0
    assert permutation_test([1.0] * 40) < 0.001  # drawn, not enumerated


def test_permutation_test_agrees_with_the_t_test_on_normal_data():
    from scipy.stats import ttest_1samp

    for shift in (0.0, 0.1, 0.2):
        differences = np.random.default_rng(1).normal(shift, 1, 300)
        assert permutation_test(differences) == pytest.approx(ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_mcnemar_by_hand():
    # Eight questions only the second gets right, one only the first: 2 · (C(9,0) + C(9,1)) / 2⁹ = 20/512.
    first, second = [0.0] * 8 + [1.0] + [1.0] * 5, [1.0] * 8 + [0.0] + [1.0] * 5
    assert mcnemar_test(first, second) == mcnemar_test(second, first) == pytest.approx(20 / 512)
    assert mcnemar_test([1.0, 0.0], [1.0, 0.0]) == 1.0
    assert mcnemar_test([0.5, 0.0], [1.0, 0.0]) is None


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand():
    run = [
        rollout("nq", "1", "Paris", observation="Paris is there.", belief=0.5, searches=2, tokens_observed=11),
        rollout("nq", "2", "Paris France", observation="Rome is not.", belief=0.25, searches=1, tokens_observed=9),
        rollout("hotpotqa", "1", None, answers=["yes"], observation="yes"),
        rollout("hotpotqa", "2", "no", answers=["yes", "no"]),
    ]
    scores = score_run(run)
    assert list(scores.sets) == ["hotpotqa", "nq", AVERAGE]
    nq = {name: value.mean for name, value in scores.sets["nq"].metrics.items()}
    assert nq == pytest.approx(
        {  # F1 of "Paris France" against "Paris": P = 1/2, R = 1, F1 = 2/3
            "f1": 5 / 6, "em": 0.5, "searches": 1.5, "turns": 2, "tokens_sampled": 12, "tokens_observed": 10,
            "in_evidence": 0.5, "belief_start": 0.25, "belief_end": 0.375, "answered": 1,
        }
    )  # fmt: skip
    hotpot = {name: value.mean for name, value in scores.sets["hotpotqa"].metrics.items()}
    assert hotpot == pytest.approx(
        {
            "f1": 0.5,
            "em": 0.5,
            "searches": 0.5,
            "turns": 1.5,
            "tokens_sampled": 9.5,
            "belief_start": 0.25,
            "answered": 0.5,
        }
    )
    average = scores.sets[AVERAGE]
    assert average.metrics["f1"].mean == pytest.approx((5 / 6 + 0.5) / 2)
    assert average.metrics["in_evidence"].mean == 0.5  # of nq alone: yes and no are in any text
    assert (average.questions, average.stops) == (4, {"answered": 1.0})
    assert json.loads(json.dumps(scores.to_dict()))["sets"]["nq"]["metrics"]["em"]["mean"] == 0.5
    main, endings = scores.tables()
    assert "| nq | 2 | 83.3 [66.7, 100.0] |" in main.to_markdown()
    assert endings.rows[-1] == [AVERAGE, "4", "100"]


def test_f1_and_em_equal_the_golden_scores(shared_dir):
    cases = json.loads((shared_dir / "golden" / "answer_scores.json").read_text(encoding="utf-8"))["cases"]
    for i, case in enumerate(cases):
        record = rollout("x", str(i), None, case["answers"], response=case["text"])
        scores = measure(record, "reference")
        assert (scores["f1"], scores["em"]) == (case["f1_no_format"], max(0, case["em"])), case
        record.turns[-1].text = case["text"]  # as records of a training run have it
        del record.info["response"]
        assert measure(record, "reference")["f1"] == case["f1_no_format"]
    assert measure(rollout("x", "1", "cat cat", ["cat"]))["f1"] == f1_score("cat cat", ["cat"]) != 1
    assert measure(rollout("x", "1", "cat cat", ["cat"]), "reference")["f1"] == 1


def test_an_answer_counts_only_where_the_reward_reads_it():
    record = rollout("x", "1", None, observation="<answer>Paris</answer>", response="")
    assert measure(record)["answered"] == measure(record)["f1"] == 0
    record.info["response"] = "<answer>Paris</answer>"
    assert measure(record)["f1"] == 1


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ("Results for 'Where is Paris':\n[1] Rome\nA city.", 0),
        ("Error: the call could not be read: 'Paris'.\n", 0),
        ("Results for 'Where':\n[1] Error: Paris\nA city.", 1),
    ],
)
def test_a_query_that_a_tool_repeats_is_not_evidence(observation, expected):
    assert measure(rollout("x", "1", "Rome", observation=observation))["in_evidence"] == expected


def test_a_table_that_is_too_wide_is_transposed():
    table = Table(
        "T", ["Set", "F1", "A long heading", "Another long heading", "Nothing"], [["nq", "1.0", "2", "3", ""]]
    )

    def printed(width):
        console = Console(width=width, file=io.StringIO())
        console.print(table.render(width))
        return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]

    assert printed(100)[1:] == [
        ["Set", "F1", *"A long heading Another long heading".split()],
        ["─" * 51],
        ["nq", "1.0", "2", "3"],
    ]
    assert printed(40)[3:] == [
        ["F1", "1.0"],
        ["A", "long", "heading", "2"],
        ["Another", "long", "heading", "3"],
        ["Nothing"],
    ]
    assert table.to_markdown() == (
        "## T\n\n| Set | F1 | A long heading | Another long heading | Nothing |\n"
        "| --- | ---: | ---: | ---: | ---: |\n| nq | 1.0 | 2 | 3 |  |\n"
    )


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="no rollouts"):
        score_run([])
    with pytest.raises(ValueError, match="no `answers`"):
        score_run([rollout("nq", "1", "Paris", answers=[])])


# ---------------------------------------------------------------------------------------------------------- comparison


def test_comparison_by_hand():
    first = [rollout("nq", str(i), "Paris" if i < 4 else "Rome") for i in range(12)]
    second = [rollout("nq", str(i), "Paris" if i < 10 else "Rome") for i in range(1, 14)]
    comparison = compare_runs(first, second)
    assert (comparison.only_first, comparison.only_second) == (1, 2)
    em = comparison.sets["nq"]["em"]
    # Questions 1 to 11: 3 right in the first, 9 in the second, which has all of the first's: 2 · (1/2)⁶ = 1/32.
    assert em.questions == 11
    assert (em.first, em.second, em.difference.mean) == pytest.approx((3 / 11, 9 / 11, 6 / 11))
    assert em.p == pytest.approx(1 / 32) and em.mcnemar == pytest.approx(1 / 32)
    assert 0 < em.difference.low < 6 / 11 < em.difference.high < 1
    table = comparison.table().to_markdown()
    assert "| nq: EM | 11 | 27.3 | 81.8 | +54.5 | [+" in table
    assert "left out: 1 (A), 2 (B)" in table
    same = compare_runs(first, first).sets["nq"]["f1"]
    assert (same.difference.mean, same.p) == (0, 1)


def test_the_average_comparison_gives_each_set_the_same_weight():
    first = [rollout(name, str(i), "Rome") for name, n in (("nq", 40), ("hotpotqa", 4)) for i in range(n)]
    second = [
        rollout(name, str(i), "Paris" if name == "nq" else "Rome")
        for name, n in (("nq", 40), ("hotpotqa", 4))
        for i in range(n)
    ]
    average = compare_runs(first, second).sets[AVERAGE]["em"]
    assert (average.questions, average.difference.mean, average.mcnemar) == (44, 0.5, None)


def test_runs_on_different_questions_cannot_be_compared():
    with pytest.raises(ValueError, match="no question in common: 1 and 1 questions of nq and popqa"):
        compare_runs([rollout("nq", "1", "x")], [rollout("popqa", "1", "x")])
    with pytest.raises(ValueError, match="has the answers .*'Paris'.* in the first run and .*'Rome'.* in the second"):
        compare_runs([rollout("nq", "1", "x")], [rollout("nq", "1", "x", answers=["Rome"])])


# ------------------------------------------------------------------------------------------------------------- imports


def test_scores_and_reports_need_neither_torch_nor_trl():
    code = (
        "import sys, igpo_trl.evaluation, igpo_trl.report\n"
        "print({'torch', 'trl', 'transformers', 'datasets', 'evaluate'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    assert evaluation.roll_out is importlib.import_module("igpo_trl.evaluation.rollouts").roll_out


# ------------------------------------------------------------------------------------------------------------- on disk


def test_only_an_incomplete_last_line_is_dropped(tmp_path):
    path = tmp_path / "trajectories" / "rank0.jsonl"
    assert not drop_torn_line(path)
    lines = [rollout("nq", str(i), "Paris").to_json() for i in range(3)]
    append_lines(path, lines)
    whole = path.read_bytes()
    assert not drop_torn_line(path)
    path.write_bytes(whole + lines[0].encode()[:40])
    assert drop_torn_line(path)
    assert path.read_bytes() == whole
    append_lines(path, [lines[0]])
    assert len(load_run(tmp_path)) == 4  # without run.json, no rollout is a duplicate
    (tmp_path / "run.json").write_text("{}")
    assert [key_of(t) for t in load_run(tmp_path)] == [RolloutKey("nq", str(i), 0) for i in range(3)]
    path.write_bytes(whole[:100] + b"\n" + whole)
    with pytest.raises(ValueError, match=r"rank0.jsonl, line 1: not a trajectory"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no rollouts"):
        load_run(tmp_path / "absent")


def settings(tmp_path, **changed):
    return {
        "model": str(tmp_path / "model"),
        "adapter": None,
        "indexes": ["http://x"],
        "k": 3,
        "sources": ["a"],
    } | changed


def test_a_run_resumes_only_with_the_same_settings(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    run = RunDirectory(tmp_path / "run")
    run.open(settings(tmp_path), "q1")
    run.open(settings(tmp_path), "q2")  # there are no rollouts yet, so the settings may still change
    run.open(settings(tmp_path, sources=["./a"]), "q1")
    append_lines(run.rollout_file(0), [rollout("nq", "1", "Paris").to_json()])
    run.open(settings(tmp_path), "q1")
    with pytest.raises(FileExistsError, match=r"other settings \(k was 3, is 5; the questions have changed\)"):
        run.open(settings(tmp_path, k=5), "q2")
    (model / "config.json").write_text('{"trained": "on"}')
    with pytest.raises(FileExistsError, match="the weights have changed"):
        run.open(settings(tmp_path), "q1")
    with pytest.raises(FileExistsError, match="not an evaluation"):
        RunDirectory(model).open(settings(tmp_path), "q1")


def test_one_process_at_a_time(tmp_path):
    code = (
        "import pathlib, sys, time; from igpo_trl.evaluation.run import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).lock(): print('locked', flush=True); time.sleep(60)"
    )
    run = RunDirectory(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match="another process"), run.lock():
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with run.lock():  # a killed process leaves no lock
        pass


# ----------------------------------------------------------------------------------------------------------- questions


def question(name, text="Where is Paris?", dataset="nq", answers=("Paris",), titles=()):
    prompt = [{"role": "user", "content": text}]
    return {
        "id": name,
        "dataset": dataset,
        "prompt": prompt,
        "answers": list(answers),
        "supporting_titles": list(titles),
    }


def test_a_limit_chooses_the_held_out_questions_of_each_set():
    from datasets import Dataset

    from igpo_trl.data import hold_out

    rows = [question(str(i), dataset=name) for name in ("nq", "popqa") for i in range(20)]
    few, more = choose_questions(rows, 3), choose_questions(rows[::-1], 7)
    assert [row["dataset"] for row in few] == ["nq"] * 3 + ["popqa"] * 3
    assert {(row["dataset"], row["id"]) for row in few} < {(row["dataset"], row["id"]) for row in more}
    assert [row["id"] for row in few[:3]] == hold_out(Dataset.from_list(rows[:20]), 3)[1]["id"][:]
    assert len(choose_questions(rows, 100)) == len(choose_questions(rows, None)) == 40
    assert questions_digest(rows) == questions_digest(rows[::-1]) != questions_digest(few)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choose_questions(rows, 0)


def test_sources_and_indexes_are_paired():
    assert pair_sources(["a", "b"], ["x"]) == [("a", "x"), ("b", "x")]
    assert pair_sources(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    with pytest.raises(ValueError, match="3 sources of questions and 2 indexes"):
        pair_sources(["a", "b", "c"], ["x", "y"])


def test_retrieval_by_hand():
    passages = [
        {"id": "1", "title": "Dune", "text": "Dune was written by Frank Herbert."},
        {"id": "2", "title": "Frank Herbert", "text": "Herbert was born in Tacoma."},
        {"id": "3", "title": "Herbert prize", "text": "The Herbert prize is given to Frank people."},
    ]
    index = BM25Index.build(passages, show_progress=False)
    questions = [
        question("1", "Who wrote Dune?", answers=["F. Herbert", "Frank Herbert"], titles=["DUNE"]),
        question("2", "Where was the writer of Dune born?", answers=["Tacoma"], titles=["Dune", "Frank Herbert"]),
        question("3", "Was Dune written by Frank Herbert?", answers=["yes"], titles=["Dune", "Herbert prize"]),
    ]
    scores = score_retrieval(index, questions, [1, 3], dataset="x", name="bm25")
    assert (scores.questions, scores.searchable, scores.supported) == (3, 2, 3)
    assert {k: value.mean for k, value in scores.answer.items()} == {1: 0.5, 3: 1.0}
    assert {k: value.mean for k, value in scores.recall.items()} == pytest.approx({1: 2 / 3, 3: 1.0})
    assert {k: value.mean for k, value in scores.recall_all.items()} == pytest.approx({1: 1 / 3, 3: 1.0})
    assert "| x | bm25 | 3 | 50.0 [0.0, 100.0] |" in retrieval_table([scores]).to_markdown()
    bare = score_retrieval(index, [question("1", "Dune?")], [1], dataset="y", name="bm25")
    assert (bare.recall, bare.answer[1].mean) == ({}, 0.0)
    for rows, ks in (([], [1]), (questions, [0]), (questions, [])):
        with pytest.raises(ValueError, match="k of at least 1"):
            score_retrieval(index, rows, ks)


def test_bm25_finds_the_answers_of_real_questions(shared_dir):
    index = BM25Index.build(shared_dir / "data/corpus/nq.jsonl.gz", show_progress=False)
    questions = load_questions(shared_dir / "data/questions/nq.jsonl.gz", None).to_list()
    scores = score_retrieval(index, questions)
    assert (scores.questions, scores.searchable, scores.supported) == (541, 541, 0)
    assert scores.answer[5].mean >= 0.94
    assert scores.answer[5].low < scores.answer[5].mean < scores.answer[10].mean


def test_the_average_of_one_set_is_that_set():
    runs = [[rollout("nq", str(i), "Paris" if i < n else "Rome") for i in range(4)] for n in (1, 3)]
    scores = score_run(runs[0])
    assert list(scores.sets) == ["nq", AVERAGE] and scores.sets[AVERAGE] == scores.sets["nq"]
    assert scores.sets["average"].metrics["f1"].mean == 0.25
    assert [[row[0] for row in table.rows] for table in scores.tables()] == [["nq"], ["nq"]]
    comparison = compare_runs(*runs)
    assert comparison.sets[AVERAGE] == comparison.sets["nq"]
    assert [row[0] for row in comparison.table().rows][:2] == ["nq: F1", "nq: EM"]
    assert len(comparison.table().rows) == len(comparison.sets["nq"])


def test_an_index_of_another_corpus_is_noticed_before_training(tmp_path, caplog):
    index = BM25Index.build([{"id": "1", "title": "Dune", "text": "A novel by Frank Herbert."}], show_progress=False)
    right = [question(str(i), "Who wrote Dune?", answers=["Frank Herbert"]) for i in range(1000)]
    wrong = [question(str(i), "Where is the Louvre?", answers=["Paris"]) for i in range(1000)]
    yes_no = [question("0", "Is Dune a novel?", answers=["yes"])]
    caplog.clear()
    assert check_retrieval(index, right) == 1.0
    index.save(tmp_path / "index")
    caplog.set_level(logging.INFO)
    mixed = [*right[:500], *wrong[:500]]
    assert check_retrieval(tmp_path / "index", Dataset.from_list(mixed)) == 0.5  # of all, not of the first
    assert math.isnan(check_retrieval(index, yes_no))
    assert not caplog.records
    assert check_retrieval(index, wrong) == 0.0
    (record,) = caplog.records
    assert "Only 0 of 100 sampled questions" in record.getMessage() and "another corpus" in record.getMessage()
    assert check_retrieval(index, [*wrong[:9], *yes_no]) == 0.0
    assert "Only 0 of 9 sampled questions" in caplog.text


@pytest.mark.parametrize(("name", "other"), [("nq", "musique"), ("musique", "hotpotqa")])
def test_real_questions_and_an_index_of_another_set(shared_dir, name, other, caplog):
    index = BM25Index.build(shared_dir / f"data/corpus/{name}.jsonl.gz", show_progress=False)
    caplog.set_level(logging.INFO)
    questions = {each: load_questions(shared_dir / f"data/questions/{each}.jsonl.gz") for each in (name, other)}
    caplog.clear()
    assert check_retrieval(index, questions[name]) > 2 * FEWEST_FOUND and not caplog.records
    assert check_retrieval(index, questions[other]) < FEWEST_FOUND and len(caplog.records) == 1


def test_the_static_embedding_of_the_results_finds_rare_words(repository, tmp_path):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("faiss")
    from igpo_trl.search import DenseIndex

    corpus = tmp_path / "corpus.jsonl"
    texts = [
        "Ada was born in Lyon.",
        "Lyon lies at the Rhône.",
        "Max was born in Kiel.",
        "Kiel lies at the sea.",
        "Max moved.",
    ]
    append_lines(corpus, [json.dumps({"id": str(i), "title": "", "text": text}) for i, text in enumerate(texts)])
    spec = importlib.util.spec_from_file_location("static_embedding", repository / "benchmarks/static_embedding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_static_embedding([corpus], tmp_path / "model", dimension=64, vocabulary=100, seed=0)
    index = DenseIndex.build(corpus, tmp_path / "index", model=tmp_path / "model")
    assert {passage.id for passage in index.search("What is LYON?", k=2)} == {"0", "1"}


def test_the_trained_embedding_is_what_the_package_holds(tmp_path, repository, monkeypatch):
    """With a package of the same layout, because the real one is not a dependency."""
    pytest.importorskip("sentence_transformers")
    import torch
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    package = tmp_path / "wordllama"
    for folder in ("weights", "tokenizers"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only its files are wanted')")
    vectors = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float16)
    save_file({"embedding.weight": vectors}, package / "weights/l2_supercat_256.safetensors")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(package / "tokenizers/l2_supercat_tokenizer_config.json"))

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["trained_embedding.py", "--out", str(tmp_path / "model")])
    spec = importlib.util.spec_from_file_location("trained_embedding", repository / "benchmarks/trained_embedding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert model.encode(["a b"]).tolist() == [[1.5, 2.0]]  # the mean of its words
