"""Environments: made as often as TRL makes them, and owners of their data, answers and reward."""

import pytest
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.trajectory import read_jsonl


class Scripted(tiny.Scripted, IGPOTrainer):
    scripts = [[tiny.call("Paris", "look"), tiny.answer("Paris")], [tiny.answer("Rome")]]


class ScriptedGRPO(tiny.Scripted, GRPOTrainer):
    scripts = Scripted.scripts


class World:
    """Owns nothing: the row has the answers."""

    def reset(self, **row) -> str:
        return " Look around."

    def look(self, query: str) -> str:
        """
        Looks.

        Args:
            query: Anything.
        """
        return f"{query} is the capital."


class Owner(World):
    """Owns question and answers."""

    def __init__(self):
        self.answers = None

    def reset(self, **row) -> str:
        self.answers = ["Paris"]
        return "What is the capital of France?"


class Declaring(World):
    answers: list[str]

    def reset(self, **row) -> str:
        self.answers = ("Paris", "City of Light")
        return "What is the capital of France?"


class Property(World):
    @property
    def answers(self) -> str:
        return "Paris"


class Rewarding(World):
    def get_reward(self) -> float:
        return 1.0


class Answering(World):
    """Has a tool of that name, which the policy may call."""

    def answers(self, query: str) -> str:
        """
        Answers.

        Args:
            query: Anything.
        """
        return "Paris"


@pytest.fixture(autouse=True)
def silence(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def make(tmp_path):
    def make(factory, trainer_class=Scripted, config_class=IGPOConfig, **options):
        options = {"tools": None, "environment_factory": factory} | options
        return tiny.make_trainer(trainer_class, config_class, tmp_path, **options)

    return make


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", [World, Rewarding])
def test_no_environment_is_made_in_vain(make, kind, several):
    """A function was called once extra, to look at what it makes, and that environment was thrown away."""
    made = {}

    def counted(name):
        def factory():
            made.setdefault(name, []).append(kind())
            return made[name][-1]

        return factory

    def run(trainer_class, config_class, **options):
        made.clear()
        factory = {"a": counted("a"), "b": counted("b")} if several else counted(None)
        dataset = tiny.make_dataset(environment=["a", "b"] * 4) if several else tiny.make_dataset()
        trainer = make(factory, trainer_class, config_class, train_dataset=dataset, **options)
        trainer.train()
        assert trainer._environment_pool == made  # each of them is in use
        return {name: len(each) for name, each in made.items()}

    reward = {"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)}
    assert run(Scripted, IGPOConfig) == run(ScriptedGRPO, GRPOConfig, **reward)


@pytest.mark.parametrize(
    "owner", [Owner, Declaring, Property, lambda: Owner()], ids=["init", "class", "property", "f"]
)
def test_an_environment_that_owns_its_data_owns_the_answers_too(make, owner, tmp_path):
    trainer = make(owner, train_dataset=None, max_steps=2, save_trajectories=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/answer_reward/mean"] == 0.5 and "info_gain/mean" in log
    records = list(read_jsonl(tmp_path / "trajectories" / "rank0.jsonl"))
    assert len(records) == 8 and {record.answers[0] for record in records} == {"Paris"}
    assert records[0].turns[0].belief is not None


def test_the_beliefs_are_those_in_the_same_answers_of_a_row(make, tmp_path):
    prompt = [[{"role": "user", "content": "Look: "}]] * 4
    records = []
    for answers in ({}, {"answers": [["Paris", "City of Light"]] * 4}):
        dataset = Dataset.from_dict({"prompt": prompt, **answers})
        make(Declaring, train_dataset=dataset, save_trajectories=True).train()
        records.append(
            [[turn.belief for turn in one.turns] for one in read_jsonl(tmp_path / "trajectories/rank0.jsonl")]
        )
        (tmp_path / "trajectories/rank0.jsonl").unlink()
    assert records[0] == records[1]


def test_the_answers_of_a_row_come_first_and_evaluation_has_them_too(make):
    rows = {"prompt": [[{"role": "user", "content": "?"}]] * 8, "answers": [["Rome"], None] * 4}
    trainer = make(Owner, train_dataset=Dataset.from_dict(rows), max_steps=1, eval_dataset=tiny.make_dataset(4))
    trainer.train()
    assert {answers[0] for answers in trainer.current_step.answers} == {"Rome", "Paris"}
    rows = {"prompt": rows["prompt"][:4]}
    metrics = trainer.evaluate(Dataset.from_dict(rows))
    assert metrics["eval_f1"] == 0.5


def test_one_environment_of_several_may_own_its_answers(make):
    rows = {"environment": ["own", "row"] * 4, "prompt": [[{"role": "user", "content": "?"}]] * 8}
    rows["answers"] = [None, ["Rome"]] * 4
    trainer = make({"own": Owner, "row": World}, train_dataset=Dataset.from_dict(rows))
    trainer.train()
    for row, answers in zip(trainer.current_step.rows, trainer.current_step.answers, strict=True):
        assert answers == (("Paris",) if row["environment"] == "own" else ("Rome",))


@pytest.mark.parametrize("environment", [World, Answering])
@pytest.mark.parametrize("rows", [{"prompt": [[{"role": "user", "content": "?"}]] * 8}, None], ids=["rows", "none"])
def test_answers_that_nobody_owns_are_missed_before_a_model_is_loaded(make, environment, rows):
    dataset = None if rows is None else Dataset.from_dict(rows)
    with pytest.raises(ValueError, match="let the environment own them in an attribute `answers`"):
        make(environment, train_dataset=dataset, model="absent/model")


def test_a_tool_called_answers_is_no_owner(make):
    trainer = make(Answering)
    trainer.train()
    assert set(trainer.current_step.answers) == {("Paris", "City of Light")}


def test_an_environment_without_an_answer_after_its_reset_is_named(make):
    class Forgetful(Owner):
        def reset(self, **row):
            self.answers = []

    with pytest.raises(ValueError, match=r"got \[\] in column `answers`, `Forgetful.answers` after its `reset`"):
        make(Forgetful, train_dataset=None).train()
