import json
import math

import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from igpo_trl.rewards import (
    DEFAULT_FORMAT_PENALTY,
    answer_reward,
    exact_match,
    extract_answer,
    f1_score,
    make_answer_reward,
    reference_score,
)

WORDS = ["the", "a", "an", "The", "cat", "cat", "Cat!", "dog", "New", "York", "U.S.", "3.14", "O'Neill", "é", "?", "-"]
WORDS += ["yes", "No."]
phrases = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
aliases = st.lists(phrases, min_size=1, max_size=3)
variants = st.sampled_from(["squad", "reference"])


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content):
    return {"role": "tool", "name": "search", "content": content}


CALL = [{"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}]


# --- extraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>Paris</answer>", "Paris"),
        ("I think: <answer>\n  New\nYork \n</answer> done", "New\nYork"),
        ("<ANSWER>Paris</Answer>", "Paris"),
        ("<answer>Rome</answer> no: <answer>Paris</answer>", "Paris"),  # the last block
        ("<think>maybe <answer>Rome</answer>?</think><answer>Paris</answer>", "Paris"),
        ("the prompt opened it</think>\n<answer>Paris</answer>", "Paris"),
        ("<think>unclosed <answer> in thought</think><answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer><think>and now", "Paris"),
        ("<answer>a < b and </b></answer>", "a < b and </b>"),
        ("Paris", None),
        ("", None),
        ("<answer></answer>", None),
        ("<answer> \n </answer>", None),
        ("<answer>Paris", None),
        ("Paris</answer>", None),
        ("</answer>Paris<answer>", None),
        ("<answer>Rome</answer><answer>Paris", None),
        ("<answer><answer>Paris</answer></answer>", None),
        ("<answer><answer>Paris</answer>", None),
        ("<think>I am sure: <answer>Paris</answer>", None),  # never stopped thinking
        ("<think><answer>Paris</answer></think> I do not know.", None),
        ("<answers>Paris</answers>", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>Rome</answer> no: <answer>Paris</answer>", "Rome"),  # the first block
        ("<answer> </answer>", ""),
        ("<think>x<answer>Paris</answer>", None),
        ("<tool_call>x<answer>Paris</answer>", None),
        ("<code>x<answer>Paris</answer>", None),
        ("</think>x<think><answer>Paris</answer>", None),
        ("<table><answer>Paris</answer>", "Paris"),
    ],
)
def test_extract_answer_by_the_authors_rules(text, expected):
    assert extract_answer(text, "reference") == expected


@given(st.text(alphabet="ab \n<>/é", min_size=1).filter(str.strip), st.text(alphabet="ab \n", max_size=5))
def test_extract_answer_gives_back_what_was_put_in(answer, around):
    assert extract_answer(f"{around}<answer>{answer}</answer>{around}") == answer.strip()


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "x", " "]), max_size=9).map("".join),
    variants,
)
def test_extract_answer_takes_any_text(text, variant):
    answer = extract_answer(text, variant)
    assert answer is None or answer in text
    if variant == "squad":
        assert answer is None or ("answer>" not in answer and answer)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_reference_variant_equals_the_authors_scorer(shared_dir):
    cases = json.loads((shared_dir / "golden" / "answer_scores.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 150
    for case in cases:
        expected = (case["f1"], case["f1_no_format"], case["em"])
        assert reference_score(case["text"], case["answers"]) == expected, case
        # ... and through the reward, which sees the text as the last turn.
        reward = answer_reward([[assistant(case["text"])]], [case["answers"]], variant="reference")
        assert reward == [case["f1"]], case


def test_squad_f1_by_hand():
    # United States / president against United States / of America: P = 2/3, R = 2/4, F1 = 2 · 1/3 / (7/6) = 4/7.
    assert f1_score("the United States president", "the United States of America") == pytest.approx(4 / 7)


def test_mistake_5_squad_counts_repeated_tokens():
    # One of three predicted tokens is matched: P = 1/3, R = 1, F1 = 1/2. As sets they would be equal.
    assert f1_score("cat cat cat", "cat") == 0.5
    assert f1_score("cat cat cat", "cat", "reference") == 1.0


def test_squad_drops_articles_and_punctuation_and_reference_does_not():
    assert exact_match("The Beatles!", "beatles") == 1.0
    assert exact_match("The Beatles!", "beatles", "reference") == 0.0
    assert exact_match("U.S.", "US") == 1.0
    assert exact_match("U.S.", "U S", "reference") == 1.0
    assert exact_match("a theatre", "theatre") == 1.0  # not an article inside a word


def test_texts_that_normalise_to_nothing():
    assert f1_score("!!!", "The") == 1.0  # as SQuAD 2.0 scores two empty answers
    assert f1_score("!!!", "cat") == 0.0
    assert f1_score("cat", "!!!") == 0.0
    assert f1_score("!!!", "!!!", "reference") == 0.0
    assert exact_match("!!!", "?", "squad") == exact_match("!!!", "?", "reference") == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("yes no", "yes", 0.0),
        ("yes no", ["no", "yes"], 0.0),
        ("Yes, they are", "yes", 0.0),
        ("no answer", "noanswer", 0.0),
        ("yes", "yes it is", 0.0),  # the same the other way round
        ("No", "no way", 0.0),
        ("The yes!", "Yes.", 1.0),
        ("NO", ["No", "neither"], 1.0),
        ("neither", ["No", "neither"], 1.0),
        ("no country for old men", "No Country for Old Men", 1.0),
        ("no country", "no country for old men", pytest.approx(4 / 7)),  # an answer that merely contains the word
    ],
)
def test_yes_and_no_match_only_themselves(prediction, answers, expected):
    assert f1_score(prediction, answers) == expected
    assert answer_reward([f"<answer>{prediction}</answer>"], [answers]) == [expected]
    metrics = pytest.importorskip("igpo_trl.evaluation.metrics")
    references = [[answers] if isinstance(answers, str) else answers]
    assert metrics.AnswerF1().compute(predictions=[prediction], references=references) == {"f1": expected}


def test_the_authors_scorer_has_no_such_rule():
    assert f1_score("yes no", "yes", "reference") == pytest.approx(2 / 3)


def test_naming_both_earns_nothing_on_real_yes_no_questions(shared_dir):
    from igpo_trl.files import read_json_lines

    for name, number in (("hotpotqa", 37), ("2wiki", 174)):
        rows = (row for _, row in read_json_lines(shared_dir / f"data/questions/{name}.jsonl.gz"))
        answers = [row["answers"] for row in rows if row["answers"][0].lower() in ("yes", "no")]
        assert len(answers) == number
        assert {f1_score("yes no", row) for row in answers} == {0.0}


def test_a_typographic_apostrophe_is_no_punctuation():
    assert exact_match("O'Brien", "OBrien") == 1.0
    assert f1_score("O’Brien", "O'Brien") == 0.0
    assert f1_score("O’Brien", ["O'Brien", "O’Brien"]) == 1.0


def test_no_prediction_scores_zero():
    assert f1_score(None, "cat") == 0.0
    assert exact_match(None, "the") == 0.0


@settings(deadline=None)
@given(phrases, aliases)
@example("cat cat", ["cat", "cat cat cat"])
def test_squad_f1_equals_oracle(prediction, answers):
    assert f1_score(prediction, answers) == pytest.approx(oracles.squad_f1(prediction, answers), abs=1e-12)


@settings(deadline=None)
@given(phrases, aliases, variants)
def test_score_properties(prediction, answers, variant):
    f1, em = f1_score(prediction, answers, variant), exact_match(prediction, answers, variant)
    assert 0.0 <= f1 <= 1.0
    assert em in (0.0, 1.0)
    assert f1 == max(f1_score(prediction, answer, variant) for answer in answers)
    assert f1 == f1_score(prediction, answers[::-1], variant)
    assert f1 == pytest.approx(max(f1_score(answer, prediction, variant) for answer in answers))  # symmetric
    assert em == exact_match(prediction.upper(), answers, variant)
    if variant == "squad" and em:
        assert f1 == 1.0


@pytest.mark.parametrize("score", [f1_score, exact_match])
def test_scores_reject_what_is_no_answer(score):
    with pytest.raises(ValueError, match="at least one answer"):
        score("cat", [])
    with pytest.raises(TypeError, match=r"got \[1969\]"):
        score("cat", [1969])
    with pytest.raises(TypeError, match="got None"):
        score("cat", None)
    with pytest.raises(ValueError, match="'squad' or 'reference', got 'f1'"):
        score("cat", "cat", "f1")


# --- the reward function ---------------------------------------------------------------------------------------------


def test_reward_of_a_multi_turn_rollout():
    rollout = [assistant("I search.", tool_calls=CALL), tool("Paris."), assistant("<answer>Paris</answer>")]
    assert answer_reward([rollout], [["Paris"]]) == [1.0]


@pytest.mark.parametrize(
    "rollout",
    [
        # an <answer> in a tool result is no prediction
        [assistant("", tool_calls=CALL), tool("<answer>Paris</answer>"), assistant("I do not know.")],
        # nor is one in an earlier turn
        [assistant("<answer>Paris</answer>", tool_calls=CALL), tool("ok"), assistant("Bye.")],
        # the rollout was cut off behind a tool result
        [assistant("<answer>Paris</answer>", tool_calls=CALL), tool("<answer>Paris</answer>")],
        # or at a call
        [assistant("<answer>Paris</answer>", tool_calls=CALL)],
        # an environment had the last word
        [assistant("<answer>Paris</answer>"), {"role": "user", "content": "<answer>Paris</answer>"}],
        [assistant(None)],
        [assistant("")],
        [{"role": "assistant"}],
        [],
        "",
    ],
)
def test_mistake_4_only_the_last_assistant_turn_is_read(rollout):
    assert answer_reward([rollout], ["Paris"]) == [DEFAULT_FORMAT_PENALTY]


@pytest.mark.parametrize("variant", ["squad", "reference"])
def test_mistake_4_tags_in_a_tool_result_are_no_format_error(variant):
    page = "</answer> <think> <code> <answer> <tool_call> unbalanced web page"
    rollout = [assistant("", tool_calls=CALL), tool(page), assistant("<answer>Paris</answer>")]
    assert answer_reward([rollout], ["Paris"], variant=variant) == [1.0]


def test_mistake_3_the_outcome_sees_all_aliases():
    answers = [["New York City", "NYC"], ["New York City", "NYC"], "NYC"]
    completions = [[assistant(f"<answer>{text}</answer>")] for text in ("NYC", "New York City", "NYC")]
    assert answer_reward(completions, answers) == [1.0, 1.0, 1.0]


def test_mistake_2_a_malformed_rollout_does_not_touch_the_others():
    bad, good = [assistant("<think></think>")], [assistant("<answer>Paris</answer>")]
    for completions in ([bad, good, good], [good, bad, good], [good, good, bad]):
        expected = [-1.0 if completion is bad else 1.0 for completion in completions]
        assert answer_reward(completions, ["Paris"] * 3, format_penalty=-1.0) == expected


def test_reward_takes_plain_text_and_content_blocks():
    blocks = [{"type": "text", "text": "<answer>Pa"}, {"type": "image"}, {"type": "text", "text": "ris</answer>"}]
    assert answer_reward(["<answer>Paris</answer>", [assistant(blocks)]], ["Paris", "Paris"]) == [1.0, 1.0]


def test_empty_tool_calls_are_no_call():
    assert answer_reward([[assistant("<answer>Paris</answer>", tool_calls=[])]], ["Paris"]) == [1.0]


def test_reward_accepts_what_trl_passes():
    reward = answer_reward(
        prompts=[[{"role": "user", "content": "?"}]],
        completions=[[assistant("<answer>the city of Paris</answer>")]],
        completion_ids=[[1, 2, 3]],
        answers=[["Paris"]],
        trainer_state=None,
        log_extra=None,
        log_metric=None,
    )
    assert reward == [pytest.approx(0.5)]  # city of Paris against Paris: P = 1/3, R = 1


def test_malformed_is_worse_than_wrong_by_default():
    wrong, malformed = answer_reward(["<answer>Rome</answer>", "Paris"], ["Paris", "Paris"])
    assert malformed < wrong == 0.0
    assert malformed == -2.0  # the authors' value


def test_make_answer_reward_binds_its_options():
    reward = make_answer_reward("golden", format_penalty=-0.5, variant="reference")
    assert reward.__name__ == "answer_reward"  # the name TRL logs it under
    completions = [[assistant("<answer>cat cat</answer>")], [assistant("cat")]]
    assert reward(completions=completions, golden=["cat", "cat"], answers=["dog", "dog"]) == [1.0, -0.5]
    # A data set column of the same name is no option.
    assert make_answer_reward()(completions=completions, answers=["cat", "cat"], variant=["x", "y"]) == [
        pytest.approx(2 / 3),
        -2.0,
    ]
    with pytest.raises(ValueError, match="got 'em'"):
        make_answer_reward(variant="em")
    with pytest.raises(ValueError, match="`metric` must be 'f1' or 'em', got 'squad'"):
        make_answer_reward(metric="squad")


def test_exact_match_pays_nothing_for_words_in_common():
    completions = [f"<answer>{answer}</answer>" for answer in ("the River Ems", "River Elbe", "Elbe")] + ["Elbe"]
    rows = {"answers": [["River Elbe", "Elbe"]] * 4}
    assert make_answer_reward()(completions, **rows) == [pytest.approx(0.5), 1.0, 1.0, -2.0]
    assert make_answer_reward(metric="em")(completions, **rows) == [0.0, 1.0, 1.0, -2.0]


def test_missing_answers_error_says_how_to_fix_it():
    with pytest.raises(ValueError, match=r"(?s)column `answers`, got the columns \['golden', 'id'\].*answer_column"):
        answer_reward(["x"], golden=["y"], id=[3])
    with pytest.raises(ValueError, match=r"column `golden`, got the columns \['answers', 'prompts'\]"):
        make_answer_reward("golden")(completions=["x"], answers=["y"], prompts=["z"])


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match="1 rows for 2 completions"):
        answer_reward(["x", "y"], ["Paris"])
    with pytest.raises(TypeError, match=r"got 1969 \(row 1 of `answers`\)"):
        answer_reward(["x", "y"], ["Paris", 1969])
    with pytest.raises(ValueError, match=r"got \[\] \(row 0 of `answers`\)"):
        answer_reward(["x"], [[]])


def test_inputs_are_not_changed():
    completions, answers = [[assistant("<answer>Paris</answer>", tool_calls=[])]], [["Paris", "City of Light"]]
    before = json.dumps([completions, answers])
    answer_reward(completions, answers)
    assert json.dumps([completions, answers]) == before


@settings(deadline=None)
@given(st.lists(st.tuples(phrases, aliases), min_size=1, max_size=5), variants)
def test_reward_is_row_by_row(rows, variant):
    completions = [[assistant(text if len(text) % 3 else f"<answer>{text}</answer>")] for text, _ in rows]
    answers = [row for _, row in rows]
    together = answer_reward(completions, answers, variant=variant)
    alone = [answer_reward([c], [a], variant=variant)[0] for c, a in zip(completions, answers, strict=True)]
    assert together == alone
    assert all(isinstance(reward, float) and math.isfinite(reward) for reward in together)
