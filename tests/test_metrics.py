"""Answer scores as metrics of 🤗 Evaluate: the same numbers as the rewards, through every interface."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import evaluate
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_trl.evaluation.metrics import AnswerCoverExactMatch, AnswerExactMatch, AnswerF1
from igpo_trl.rewards import cover_exact_match

ANSWERS = [["Paris", "City of Light"], ["1965"], ["Frank Herbert"]]
PREDICTIONS = ["city of light", "in 1965", "Ridley Scott"]


@pytest.fixture(scope="module")
def golden(shared_dir):
    return json.loads((shared_dir / "golden" / "answer_scores.json").read_text(encoding="utf-8"))["cases"]


def test_by_hand():
    # F1: 1; P = 1/2 and R = 1, so 2/3; 0.
    assert AnswerF1().compute(predictions=PREDICTIONS, references=ANSWERS) == {"f1": pytest.approx((1 + 2 / 3) / 3)}
    assert AnswerExactMatch().compute(predictions=PREDICTIONS, references=ANSWERS) == {"exact_match": 1 / 3}
    cover = AnswerCoverExactMatch().compute(predictions=PREDICTIONS, references=ANSWERS)
    assert cover == {"cover_exact_match": 2 / 3}


def test_every_golden_score_alone(golden):
    options = {"variant": "reference", "responses": True}
    f1, exact_match = AnswerF1(), AnswerExactMatch()
    for case in golden:
        one = {"predictions": [case["text"]], "references": [case["answers"]]} | options
        assert f1.compute(**one, format_penalty=-2.0) == {"f1": case["f1"]}, case
        assert f1.compute(**one) == {"f1": case["f1_no_format"]}, case
        assert exact_match.compute(**one, format_penalty=-2.0) == {"exact_match": case["em"]}, case


def test_all_golden_scores_together_and_in_parts(golden):
    texts, answers = [case["text"] for case in golden], [case["answers"] for case in golden]
    answers = [[aliases] if isinstance(aliases, str) else aliases for aliases in answers]
    expected = {
        "f1": sum(case["f1"] for case in golden) / len(golden),
        "exact_match": sum(case["em"] for case in golden) / len(golden),
    }
    options = {"variant": "reference", "responses": True, "format_penalty": -2.0}
    both = evaluate.combine([AnswerF1(), AnswerExactMatch()])
    assert both.compute(predictions=texts, references=answers, **options) == expected
    for text, aliases in zip(texts[:100], answers[:100], strict=True):
        both.add(prediction=text, reference=aliases)
    both.add_batch(predictions=texts[100:], references=answers[100:])
    assert both.compute(**options) == expected


def test_variants():
    one = {"predictions": ["the cat cat"], "references": [["cat"]]}
    assert AnswerF1().compute(**one) == {"f1": pytest.approx(2 / 3)}  # P = 1/2, R = 1
    assert AnswerF1().compute(**one, variant="reference") == {"f1": pytest.approx(2 / 3)}  # {the, cat} against {cat}
    assert AnswerExactMatch().compute(predictions=["The cat"], references=["cat"]) == {"exact_match": 1.0}
    reference = AnswerExactMatch().compute(predictions=["The cat"], references=["cat"], variant="reference")
    assert reference == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="'squad' or 'reference', got 'em'"):
        AnswerF1().compute(**one, variant="em")


@pytest.mark.parametrize(
    ("prediction", "by_default", "as_response", "as_answer"),
    [
        ("Paris", 1.0, 0.0, 1.0),
        ("<think>Rome?</think><answer>Paris</answer>", 1.0, 1.0, 0.0),
        ("<answer>Paris", 0.0, 0.0, 0.0),  # malformed
        ("", 0.0, 0.0, 0.0),
        (" ", 0.0, 0.0, 0.0),
    ],
)
def test_answers_and_responses(prediction, by_default, as_response, as_answer):
    one = {"predictions": [prediction], "references": [["Paris"]]}
    metric = AnswerExactMatch()
    assert metric.compute(**one)["exact_match"] == by_default
    assert metric.compute(**one, responses=True)["exact_match"] == as_response
    assert metric.compute(**one, responses=False)["exact_match"] == as_answer
    penalised = metric.compute(**one, responses=True, format_penalty=-1.0)["exact_match"]
    assert penalised == (1.0 if as_response else -1.0)


def test_references_may_be_single_texts():
    assert AnswerF1().compute(predictions=["Paris"], references=["Paris"]) == {"f1": 1.0}


def test_bad_references_are_errors():
    with pytest.raises(ValueError, match="at least one answer"):
        AnswerF1().compute(predictions=["a"], references=[[]])
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        AnswerF1().compute(predictions=["a"], references=["a", "b"])
    with pytest.raises(ValueError, match="don't match the expected format"):
        AnswerF1().compute(predictions=["a"], references=[3])


def test_a_metric_can_be_reused_even_after_an_error():
    metric = AnswerF1()
    with pytest.raises(ValueError, match="variant"):
        metric.compute(predictions=["a"], references=["a"], variant="x")
    assert metric.compute(predictions=["a"], references=["a"]) == {"f1": 1.0}
    assert metric.compute(predictions=["b"], references=["a"]) == {"f1": 0.0}
    assert pickle.loads(pickle.dumps(AnswerF1())).compute(predictions=["a"], references=["a"]) == {"f1": 1.0}


def test_it_describes_itself():
    metric = AnswerF1()
    assert metric.name == "answer_f1"
    assert "variant" in metric.inputs_description and "variant" in metric.compute.__doc__
    assert evaluate.combine([AnswerF1(), AnswerExactMatch()], force_prefix=True).compute(
        predictions=["a"], references=["a"]
    ) == {"answer_f1_f1": 1.0, "answer_exact_match_exact_match": 1.0}


phrases = st.lists(st.sampled_from(["the", "cat", "Cat!", "dog", "-"]), max_size=4).map(" ".join)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(phrases, st.lists(phrases, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_the_mean_is_that_of_an_independent_scorer(rows):
    predictions, references = [prediction for prediction, _ in rows], [answers for _, answers in rows]
    expected = [oracles.squad_f1(text, answers) if text else 0.0 for text, answers in rows]
    f1 = AnswerF1().compute(predictions=predictions, references=references)["f1"]
    assert f1 == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was Paris, in France.", ["Rome", "paris"], 1.0),
        ("Paris", ["Paris, France"], 0.0),
        ("the", ["a"], 1.0),  # both normalise to nothing
        ("cat", ["the"], 0.0),
        ("1965", ["65"], 1.0),
        (None, ["x"], 0.0),
    ],
)
def test_cover_exact_match(prediction, answers, expected):
    assert cover_exact_match(prediction, answers) == expected


# --- files and processes ---------------------------------------------------------------------------------------------


def gathered(process_id: int, folder: str, predictions: list[str], results: "multiprocessing.Queue") -> None:
    options = {"num_process": 2, "process_id": process_id, "experiment_id": "test", "cache_dir": folder}
    metric = AnswerF1(**options)
    metric.add_batch(predictions=predictions, references=[["a"]] * len(predictions))
    results.put((process_id, metric.compute()))


def compute_alone_and_together(folder: str) -> None:
    """Runs in a separate process, with its own home directory and forks."""
    alone = AnswerF1().compute(predictions=["a"], references=[["a"]])
    written = [
        str(path) for path in Path(folder).parent.rglob("*") if "metrics" in path.name or path.suffix == ".arrow"
    ]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    parts = [["a", "b", "b"], ["a"]]
    workers = [context.Process(target=gathered, args=(i, folder, parts[i], results)) for i in range(2)]
    for worker in workers:
        worker.start()
    together = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    print(json.dumps({"alone": alone, "written": written, "together": [together[0], together[1]]}))


def test_alone_it_writes_nothing_and_two_processes_gather(tmp_path, repository):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(repository / "src"), str(repository / "tests")])
    command = [sys.executable, __file__, str(tmp_path / "shared")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(process.stdout.splitlines()[-1])
    assert results["alone"] == {"f1": 1.0}
    assert results["written"] == []
    assert results["together"] == [{"f1": 0.5}, None]  # as for any metric, the first process has the result
    assert (tmp_path / "shared" / "answer_f1").is_dir()


def test_memory_is_not_shared_between_processes():
    with pytest.raises(ValueError, match="keep_in_memory"):
        AnswerF1(keep_in_memory=True, num_process=2)


if __name__ == "__main__":
    compute_alone_and_together(sys.argv[1])
