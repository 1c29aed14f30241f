"""Other ways of writing an answer, by rules and from a file."""

import json

import pytest
from typer.testing import CliRunner

from igpo_trl.cli.app import app
from igpo_trl.data import load_questions
from igpo_trl.data.paraphrases import add_paraphrases, paraphrases, read_paraphrases


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("March 5, 1999", ["5 March 1999", "1999-03-05"]),
        ("5 March 1999", ["March 5, 1999", "1999-03-05"]),
        ("1999-03-05", ["March 5, 1999", "5 March 1999"]),
        ("March 1999", []),
        ("1999", []),
        ("1,200", ["1200"]),
        ("43814", ["43,814"]),
        ("007", []),
        ("seven", ["7"]),
        ("12", ["twelve"]),
        ("The Beatles", ["Beatles"]),
        ("Alien (film)", ["Alien"]),
        ("George W. Bush", ["George Bush"]),
        ("New York City", []),
        ("J. R. R. Tolkien", []),
        ("Simon & Garfunkel", ["Simon and Garfunkel"]),
        ("U.S.", ["US"]),
        ("Beyonc\u00e9", ["Beyonce"]),
        ("yes", []),
        ("", []),
    ],
)
def test_rules(answer, expected):
    assert paraphrases(answer) == expected


def test_answers_stay_first_and_nothing_comes_twice():
    known = {"new york city": ["NYC", "New York"]}
    assert add_paraphrases(["New York City", "NYC"], known) == ["New York City", "NYC", "New York"]
    assert add_paraphrases(["seven"], rules=False) == ["seven"]


@pytest.mark.parametrize("text", ["[]", "{", '{"a": "b"}', '{"a": [""]}'])
def test_a_file_of_something_else(tmp_path, text):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(ValueError, match="Expected an object of lists"):
        read_paraphrases(tmp_path / "own.json")


def test_the_command(tmp_path):
    questions, own, out = tmp_path / "q.jsonl", tmp_path / "own.json", tmp_path / "out.jsonl"
    rows = [{"id": "1", "question": "When?", "answers": ["5 March 1999"], "level": "easy"}]
    rows += [{"id": "2", "question": "Where?", "answers": ["New York City"]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own.write_text(json.dumps({"New York City": ["NYC"]}))
    words = ["data", "paraphrase", str(questions), "--out", str(out), "--file", str(own)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0 and "2 questions" in result.output and "3 more answers" in result.output
    assert load_questions(str(out))["answers"][:] == [
        ["5 March 1999", "March 5, 1999", "1999-03-05"],
        ["New York City", "NYC"],
    ]
    assert json.loads(out.read_text().splitlines()[0])["level"] == "easy"
