"""The model card that a run writes: its facts, its pictures, a program that runs, and no path of this machine."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.evaluation.settings import save_options
from igpo_trl.search import BM25Index, SearchTool
from igpo_trl.training.card import hooks
from igpo_trl.training.card.base_model import origin_of
from igpo_trl.training.card.content import settings_of
from igpo_trl.training.card.scores import add_evaluation
from igpo_trl.training.card.snippet import make_snippet

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SYSTEM = 'Search, then say "done".'


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = [[tiny.call("Paris"), tiny.answer("Paris")], ["?"]]


def card_of(folder: Path, base: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n\nText.\n")


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        ({}, HUB, (HUB, HUB)),
        ({"a/README.md": f"---\nbase_model: {HUB}\n---\n"}, "a", (HUB, HUB)),
        ({"a/README.md": f"---\nbase_model:\n- {HUB}\n---\n"}, "a", (HUB, HUB)),
        ({"a/README.md": f"---\nbase_model: {HUB}\n---\n", "b/adapter_config.json": "{root}/a"}, "b", (HUB, HUB)),
        ({"a/warm_start.json": json.dumps({"settings": {"model": HUB}})}, "a", (HUB, HUB)),
        ({"a/config.json": json.dumps({"_name_or_path": HUB})}, "a", (HUB, HUB)),
        # A folder that has gone says nothing, so another file is asked.
        (
            {"a/config.json": json.dumps({"_name_or_path": "/gone/x"}), "a/README.md": f"---\nbase_model: {HUB}\n---"},
            "a",
            (HUB, HUB),
        ),
        ({"models--org--m/snapshots/0f/config.json": "{}"}, "models--org--m/snapshots/0f", ("org/m", "org/m")),
        ({"a/config.json": "{"}, "a", (None, "a")),
        ({"run/checkpoint-20/config.json": "{}"}, "run/checkpoint-20", (None, "run, step 20")),
        ({}, "gone", (None, "gone")),
        ({"a/adapter_config.json": "{root}/b", "b/adapter_config.json": "{root}/a"}, "a", (None, "a")),
    ],
)
def test_the_base_model_has_its_true_name(tmp_path, files, name, expected):
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("{root}"):
            text = json.dumps({"base_model_name_or_path": text.format(root=tmp_path)})
        (tmp_path / path).write_text(text)
    assert origin_of(name if name == HUB else str(tmp_path / name)) == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an adapter on a model in a folder, that searches an index, with checkpoints and evaluations."""
    root = tmp_path_factory.mktemp("card")
    tiny.make_model("qwen3").save_pretrained(root / "base")
    tiny.make_tokenizer().save_pretrained(root / "base")
    card_of(root / "base", HUB)
    corpus = root / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "1", "title": "Paris", "text": "Paris is the capital of France."}) + "\n")
    BM25Index.build(corpus, show_progress=False).save(root / "index")
    rows = tiny.make_dataset(8, dataset=["quiz"] * 8).to_list()
    rows = [row | {"prompt": [{"role": "system", "content": SYSTEM}, *row["prompt"]]} for row in rows]
    dataset = tiny.Dataset.from_list(rows)
    trainer = tiny.make_trainer(
        Trainer,
        IGPOConfig,
        root / "run",
        model=str(root / "base"),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        tools=[SearchTool(root / "index", k=2, max_words=20)],
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        per_device_train_batch_size=2,
        max_steps=2,
        max_turns=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.data_sources = {
        "Searched": str(root / "index"),
        "Questions": f"{root}/q.csv,nq",
        "Server": "http://10.0.0.1",
    }
    trainer.train()
    save_options(root / "run", trainer.args, search_k=2, search_max_words=20, system_prompt=SYSTEM)
    trainer.save_model()
    trainer.save_model(str(root / "copy"))
    return root, trainer


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_a_run_writes_what_it_is(run):
    root, _ = run
    card = (root / "run/README.md").read_text(encoding="utf-8")
    data = ModelCard(card).data
    assert data.base_model == HUB and {"igpo", "trl", "generated_from_trainer"} <= set(data.tags)
    assert f"https://huggingface.co/{HUB}" in card and "[None]" not in card
    assert section(card, "Tools").strip().startswith("- `search(query)`: ")
    assert section(card, "Data").strip().splitlines() == [
        "- Searched: index",
        "- Questions: q.csv, nq",
        "- Server: a search server",
        "- Training: 8 questions of quiz",
        "- Evaluation: 4 questions of quiz",
    ]
    training = section(card, "Training")
    assert "2 steps, adapter LORA of rank 4" in training
    assert "| `max_turns` | `3` |" in training and "| `normalization` | `critic` |" in training
    assert re.search(r"\| `belief/final` \| \S+ \| \S+ \| mean belief before the last turn \|", card)
    # Half of 4 rollouts are right: Wilson's interval of 2 of 4.
    assert "| step 2 | all | 4 | 50.0 | 50.0 [15.0, 85.0] |" in section(card, "Evaluation")
    assert "2510.14967" in card and "@software{vonwerra2020trl" in card


def test_pictures_are_drawn_once_training_is_over(run):
    root, _ = run
    for folder, has_pictures in (("run", True), ("copy", True), ("run/checkpoint-2", False)):
        card = (root / folder / "README.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", card)
        assert pictures == (["learning_curve.png", "beliefs_by_turn.png"] if has_pictures else [])
        for name in pictures:
            assert (root / folder / name).read_bytes().startswith(b"\x89PNG")


def test_no_card_has_a_path_of_this_machine(run):
    root, _ = run
    cards = [path for path in root.glob("**/README.md") if path.parent.name != "base"]
    assert len(cards) == 4  # with those that PEFT writes beside the adapter of a checkpoint
    for path in cards:
        card = path.read_text(encoding="utf-8")
        assert str(root) not in card and "10.0.0.1" not in card
        assert ModelCard(card).data.base_model == HUB


def test_the_program_in_the_card_runs(run, monkeypatch, capsys):
    root, trainer = run
    use = section((root / "run/README.md").read_text(encoding="utf-8"), "Use")
    assert "igpo ask --model run --index path/to/index" in use
    code = re.search(r"```python\n(.*?)```", use, re.DOTALL)[1]
    assert 'SearchTool("path/to/index", k=2, max_words=20)' in code and SYSTEM in code.replace('\\"', '"')
    monkeypatch.chdir(root)
    turns = [tiny.call("Paris"), tiny.call("x", name="made_up"), tiny.answer("Paris")]
    family = type(trainer.model.get_base_model())

    def generate(self, input_ids, **kwargs):
        ids = trainer.processing_class(turns.pop(0) + "<|im_end|>", return_tensors="pt").input_ids
        return torch.cat([input_ids, ids], dim=1)

    monkeypatch.setattr(family, "generate", generate)
    names = {}
    code = code.replace(', dtype="auto", device_map="auto"', "")
    exec(code.replace("path/to/index", "index"), names)
    assert capsys.readouterr().out.strip().endswith("Paris")
    results = [message["content"] for message in names["messages"] if message["role"] == "tool"]
    assert "Paris is the capital of France." in results[0] and results[1] == "Error: 'made_up'"


class Environment:
    def reset(self): ...
    def look(self): ...


@pytest.mark.parametrize(
    ("tools", "line"),
    [
        ([tiny.search], 'tools = {"search": search}'),
        ([Environment().look], 'tools = {"look": environment.look}'),
        (None, "tools = {}"),
    ],
)
def test_a_program_with_tools_of_others_says_where_they_are_needed(tmp_path, tools, line):
    args = IGPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = SimpleNamespace(args=args, tools=tools, train_dataset=tiny.make_dataset())
    text = make_snippet(trainer, tmp_path, "tester/policy")
    assert line in text and "igpo ask" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    undefined = {"search", "environment"} & set(compile(code, "card", "exec").co_names)
    assert (
        not undefined or f"from your_tools import {'Environment' if 'environment' in undefined else 'search'}" in code
    )


def test_the_table_of_an_evaluation_in_the_folder_of_the_model_is_in_its_card(run):
    root, trainer = run
    results = root / "copy/eval/results.md"
    results.parent.mkdir()
    for score in ("41.0 [30.1, 52.0]", "42.0 [31.0, 53.0]"):  # the second time it is replaced
        results.write_text(f"## Scores\n\n| set | F1 |\n|---|---:|\n| nq | {score} |\n")
        assert add_evaluation(results)
    card = (root / "copy/README.md").read_text(encoding="utf-8")
    evaluation = section(card, "Evaluation")
    assert "42.0 [31.0, 53.0]" in evaluation and "41.0" not in card
    assert "| step 2 | all | 4 |" in evaluation and "### Scores" in evaluation
    trainer.save_model(str(root / "copy"))  # keeps it
    assert (root / "copy/README.md").read_text(encoding="utf-8") == card
    assert not add_evaluation(root / "results.md")


def test_no_picture_without_matplotlib_and_no_error_without_a_card(run, tmp_path, monkeypatch, caplog):
    _, trainer = run
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        trainer.save_model(str(tmp_path / "plain"))
    card = (tmp_path / "plain/README.md").read_text(encoding="utf-8")
    assert "![" not in card and "| `reward` |" in card and not list(tmp_path.glob("plain/*.png"))

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(hooks, "make_card", fail)
    trainer.save_model(str(tmp_path / "full"))
    assert (tmp_path / "full/adapter_model.safetensors").is_file()
    assert "No model card was written to" in caplog.text and "no space left" in caplog.text


def test_settings_are_those_of_the_method_that_differ_from_the_defaults(tmp_path):
    args = IGPOConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, hub_token="hf_secret", gain_clip=0.5,
        weight_decay=0.1, vllm_server_host="10.0.0.1", run_name="mine",
    )  # fmt: skip
    settings = settings_of(args)
    assert settings["gain_clip"] == 0.5 and settings["weight_decay"] == 0.1 and settings["bf16"] is False
    assert settings["normalization"] == "critic"
    text = json.dumps(settings, default=str)
    assert not {"hf_secret", "10.0.0.1", str(tmp_path), "mine"} & {word for word in re.split(r'[" ]', text)}
    assert "std_floor" not in settings  # a default
