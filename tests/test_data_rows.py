"""Data sets as a trainer gets them: refused before a model is loaded, or rendered and scored as they are meant."""

import numpy
import pytest
import tiny
from datasets import Dataset, List, Value

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.data.rows import answers_of, plain_prompt
from igpo_trl.rewards import answer_reward

SQUAD = [{"text": ["Paris"], "answer_start": [3]}] * 4
RIGHT, SEARCH = tiny.answer("Paris"), tiny.call("Paris")


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = ([SEARCH, RIGHT], [tiny.answer("Rome")])


def make(tmp_path, **options):
    return tiny.make_trainer(Trainer, IGPOConfig, tmp_path, **options)


def dataset(**columns) -> Dataset:
    return Dataset.from_dict(tiny.make_dataset(4).to_dict() | columns)


def stream(rows):
    """A stream that does not know its columns."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(lambda: iter(rows))


def prompts(*contents):
    return [[{"role": "user", "content": content}] for content in contents]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# --- refused at once -------------------------------------------------------------------------------------------------

NO_MODEL = {"model": "no-such-folder/no-such-model"}  # would fail as soon as it were loaded
CUSTOM = {"info_gain_weight": 0.0, "reward_funcs": lambda completions, **_: [0.0] * len(completions)}
GOOD = tiny.make_dataset(4)
IMAGE = [{"type": "image", "image": "x.png"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Evaluation reads the answers whatever the reward is.
        (
            {"eval_dataset": dataset(answers=SQUAD), **CUSTOM},
            r"got \{'text': \['Paris'\].* in column `answers`, row 0 of `eval_dataset`.*row\['answers'\]\['text'\]",
        ),
        ({"eval_dataset": dataset(answers=[["a"], ["b"], [], ["c"]])}, "row 2 of `eval_dataset`"),
        ({"eval_dataset": {"one": GOOD, "two": dataset(answers=[1, 2, 3, 4])}}, r"row 0 of `eval_dataset\['two'\]`"),
        ({"eval_dataset": stream([{"prompt": prompts("x")[0], "answers": SQUAD[0]}])}, "row 0 of `eval_dataset`"),
        ({"eval_dataset": GOOD.remove_columns("answers")}, "`eval_dataset` has no column `answers`"),
        ({"train_dataset": dataset(answers=SQUAD)}, "row 0 of `train_dataset`"),
        ({"train_dataset": dataset(answers=SQUAD), "save_trajectories": True, **CUSTOM}, "row 0 of `train_dataset`"),
        # Names that TRL uses.
        ({"train_dataset": dataset(prompts=list("abcd"))}, "column `prompts`.*reward function. Rename or remove"),
        ({"train_dataset": dataset(completions=list("abcd")), **CUSTOM}, "column `completions`"),
        ({"eval_dataset": dataset(completions=list("abcd"))}, "`eval_dataset` has a column `completions`"),
        ({"train_dataset": GOOD.rename_column("prompt", "prompts")}, "belong in a column `prompt`"),
        ({"train_dataset": dataset(log_metric=list("abcd"))}, "column `log_metric`"),
        ({"train_dataset": GOOD.rename_column("prompt", "question")}, "no column `prompt`, got question, answers"),
        # Prompts that no template renders.
        (
            {"train_dataset": dataset(prompt=prompts(*[parts("x")] * 3, IMAGE))},
            "Row 3 of `train_dataset`.*list of parts",
        ),
        ({"eval_dataset": dataset(prompt=prompts(*[parts("x")] * 3, IMAGE))}, "Row 3 of `eval_dataset`"),
        ({"train_dataset": dataset(prompt=["x"] * 4)}, "got a string in row 0 of `train_dataset`"),
        ({"eval_dataset": dataset(prompt=["x"] * 4)}, "got a string in row 0 of `eval_dataset`"),
        ({"train_dataset": dataset(prompt=[*prompts("x", "y", "z"), []])}, r"got \[\] in row 3 of `train_dataset`"),
        ({"train_dataset": dataset(prompt=[[{"from": "user", "value": "x"}]] * 4)}, "`role` and `content`"),
    ],
)
def test_refused_before_a_model_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **NO_MODEL | options)


@pytest.mark.filterwarnings("ignore:Neither `tools`")
def test_columns_that_nobody_reads_may_hold_anything(tmp_path):
    """With other rewards and without beliefs, the answers are the reward functions' own affair."""
    make(tmp_path, train_dataset=dataset(answers=SQUAD), **CUSTOM)
    make(tmp_path, train_dataset=dataset(prompt=["x"] * 4), tools=None)


# --- rendered --------------------------------------------------------------------------------------------------------


def example_call(**arguments):
    return {"type": "function", "function": {"name": "search", "arguments": arguments}}


def with_examples(content="Where?"):
    """Two example calls with different arguments: Arrow gives each the other's, with null."""
    return [
        {"role": "system", "content": content},
        {"role": "assistant", "content": "", "tool_calls": [example_call(query="x")]},
        {"role": "tool", "name": "search", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [example_call(url="http://x", options={"deep": True})]},
        {"role": "tool", "name": "search", "content": "b"},
        {"role": "user", "content": content},
    ]


def test_fields_that_arrow_has_filled_are_not_rendered():
    tokenizer = tiny.make_tokenizer()
    written = with_examples()
    (stored,) = Dataset.from_dict({"prompt": [written]})["prompt"]
    rendered = tokenizer.apply_chat_template(stored, tokenize=False)
    assert '"url": null' in rendered  # what is left out
    assert tokenizer.apply_chat_template(plain_prompt(stored), tokenize=False) == tokenizer.apply_chat_template(
        written, tokenize=False
    )
    assert stored[1]["tool_calls"][0]["function"]["arguments"]["url"] is None  # the row itself is unchanged


def test_contents_as_parts_are_texts():
    assert plain_prompt([{"role": "user", "content": parts("Who ", "wrote it?")}]) == [
        {"role": "user", "content": "Who wrote it?"}
    ]
    assert plain_prompt([{"role": "assistant", "content": None, "tool_calls": [example_call(query="x")]}]) == [
        {"role": "assistant", "content": "", "tool_calls": [example_call(query="x")]}
    ]
    assert plain_prompt("text") == "text"
    with pytest.raises(ValueError, match="list of parts with texts"):
        plain_prompt([{"role": "user", "content": [*parts("x"), {"type": "image"}]}])


def test_prompts_with_parts_and_examples_are_trained_on(tmp_path):
    """... as the same prompts without them would be, in training and in evaluation."""
    plain = [with_examples("Where?"), *prompts("a", "b", "c")]
    rich = [with_examples("Where?")[:-1] + prompts(parts("Wh", "ere?"))[0], *prompts(*[parts(x) for x in "abc"])]
    for message in rich[0][:-1]:
        message["content"] = parts(message["content"])
    seen = []
    for rows in (plain, rich):
        questions = dataset(prompt=rows)
        trainer = make(tmp_path, train_dataset=questions, eval_dataset=questions, max_completion_length=64)
        trainer.train()
        ids = [trainer.current_step.prompt_ids]
        trainer.evaluate()
        seen.append(ids + [trainer.current_step.prompt_ids])
    assert seen[0] == seen[1]
    assert not any("null" in trainer.processing_class.decode(ids) for batch in seen[0] for ids in batch)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"remove_unused_columns": True}])
@pytest.mark.parametrize("form", ["lists", "numpy", "stream of arrays"])
def test_answers_reach_rewards_and_beliefs(tmp_path, options, form):
    read = []

    def reads_a_column(completions, level, **columns):
        read.extend(level)
        return [0.0] * len(completions)

    questions = dataset(level=["easy"] * 4)
    if form == "numpy":
        questions = questions.with_format("numpy")
        assert isinstance(questions[0]["answers"], numpy.ndarray)
    elif form == "stream of arrays":
        questions = stream([row | {"answers": numpy.array(row["answers"])} for row in questions.to_list()])
    trainer = make(
        tmp_path,
        train_dataset=questions,
        eval_dataset=questions,
        reward_funcs=[answer_reward, reads_a_column],
        save_trajectories=True,
        **options,
    )
    trainer.train()
    metrics = trainer.state.log_history[0]
    assert metrics["rewards/answer_reward/mean"] == 0.5
    assert 0 < metrics["belief/prompt"] < 1
    assert set(read) == {"easy"}
    assert trainer.evaluate()["eval_f1"] == 0.5


def test_arrays_of_answers():
    array = numpy.array(["Paris", "City of Light"])
    assert answers_of({"answers": array}, "answers") == ("Paris", "City of Light")
    assert answers_of({"answers": numpy.array(" Paris")}, "answers") == ("Paris",)
    assert answer_reward([RIGHT, RIGHT], [array, numpy.array(["Rome"])]) == [1.0, 0.0]
    for empty in (numpy.array([]), numpy.array([1.0]), numpy.array(["", "a"])):
        with pytest.raises(ValueError, match="row 7"):
            answers_of({"answers": empty}, "answers", "row 7")


def test_columns_of_a_transform_are_seen(tmp_path):
    """`set_transform` makes columns on the fly."""
    raw = Dataset.from_dict({"question": list("abcd")})
    raw = raw.cast_column("question", Value("string"))

    def transform(batch):
        return {"prompt": prompts(*batch["question"]), "answers": [["Paris"]] * len(batch["question"])}

    make(tmp_path, train_dataset=raw.with_transform(transform))
    with pytest.raises(ValueError, match="row 0 of `train_dataset`"):
        make(tmp_path, train_dataset=raw.with_transform(lambda batch: transform(batch) | {"answers": [[""]] * 4}))


def test_answers_as_large_lists_and_fixed_lists(tmp_path):
    questions = dataset().cast_column("answers", List(Value("large_string"), length=2))
    make(tmp_path, train_dataset=questions)
