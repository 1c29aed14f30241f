"""Pushing and pulling what was trained, for real, with a hub of our own on the loopback interface."""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http
import pytest
import tiny
import torch
import yaml
from hub_server import TOKEN, Fault, Repository, environment, running_hub, use_hub
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli.app import app
from igpo_trl.cli.interrupts import without_token
from igpo_trl.evaluation.settings import EvaluationSettings, save_options, saved_options
from igpo_trl.search import BM25Index
from igpo_trl.training.hub import PushFailed, how_to_push

# The libraries warn of themselves, and these tests run with progress bars off.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Cannot enable progress bars"),
]


class Trainer(tiny.Scripted, IGPOTrainer):
    scripts = [[tiny.call("Paris"), tiny.answer("Paris")], ["?"]]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on which this process is logged in."""
    with running_hub() as server:
        use_hub(server, monkeypatch, tmp_path / "cache", TOKEN)
        clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time, monotonic=time.monotonic)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)  # retries do not wait
        yield server


def make(folder, **options):
    options = {"hub_model_id": "tester/policy", "per_device_train_batch_size": 2} | options
    return tiny.make_trainer(Trainer, IGPOConfig, folder, **options)


def put(hub, name, folder):
    """Put a folder on the hub."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
    hub.repositories[name] = Repository(files=files, commits=["first"])


@pytest.fixture
def base(hub, tmp_path):
    """A model on the hub."""
    tiny.make_model("qwen3").save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    put(hub, "tester/base", tmp_path / "base")
    return "tester/base"


@torch.no_grad()
def logits(model):
    return model(torch.arange(20)[None]).logits


# ------------------------------------------------------------------------------------------------------ what is pushed


def test_push_to_hub_says_igpo_and_cites_the_paper(hub, tmp_path):
    trainer = make(tmp_path / "run", save_trajectories=True, log_completions=True, num_completions_to_print=0)
    trainer.train()
    assert hub.requests == []
    for name in ("eval/trajectories/rank0.jsonl", "eval/verdicts.jsonl", "eval/run.json", "page.html"):
        Path(tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        Path(tmp_path / "run" / name).write_text(f"Where was author 1 born? {tmp_path}")
    Path(tmp_path / "run/eval/results.md").write_text("| F1 |\n|---|\n| 50.0 |\n")
    trainer.push_to_hub(dataset_name="hotpotqa/hotpot_qa")

    files = hub.repositories["tester/policy"].files
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "eval/results.md"} <= set(files)
    card = files["README.md"].decode()
    header, text = card.split("---", 2)[1:]
    data = yaml.safe_load(header)
    assert {"igpo", "trl"} <= set(data["tags"]) and data["library_name"] == "transformers"
    assert data["base_model"] == "tiny-qwen3" and data["datasets"] == "hotpotqa/hotpot_qa"
    assert "licence" not in data and data["model_name"] == "policy"
    assert "trained with IGPO" in text
    assert 'from_pretrained("tester/policy"' in text
    assert "](beliefs_by_turn.png)" in text and files["beliefs_by_turn.png"].startswith(b"\x89PNG")
    assert "2510.14967" in text
    assert "@inproceedings{wang2026igpo" in text
    assert "Information Gain-based Policy Optimization" in text
    assert "GRPO" not in text
    assert (tmp_path / "run/README.md").read_text(encoding="utf-8") == card

    written = {str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*")}
    assert {"trajectories/rank0.jsonl", "completions"} <= written
    for name, content in files.items():
        assert not name.startswith(("trajectories", "completions")), name
        assert name == "training_args.bin" or str(tmp_path).encode() not in content, name
        assert b"Where was author" not in content, name
    assert "trajectories/rank0.jsonl" not in " ".join(hub.requests)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_what_training_pushes_while_it_runs(hub, tmp_path, strategy):
    trainer = make(
        tmp_path / "run", push_to_hub=True, hub_strategy=strategy, hub_always_push=True, save_trajectories=True,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    trainer.train()
    repository = hub.repositories["tester/policy"]
    assert not [name for name in repository.files if "trajectories" in name]
    states = {name for name in repository.files if "optimizer.pt" in name}
    if strategy == "end":
        assert repository.files == {}
    else:
        assert repository.commits[0] == "Training in progress, step 1"
        assert {"model.safetensors", "README.md"} <= set(repository.files)
        assert states == ({"last-checkpoint/optimizer.pt"} if strategy == "checkpoint" else set())
    if strategy == "checkpoint":  # which resumes on another machine
        pulled = snapshot_download("tester/policy", allow_patterns="last-checkpoint/*", local_dir=tmp_path / "pulled")
        other = make(tmp_path / "other", max_steps=3)
        other.train(resume_from_checkpoint=f"{pulled}/last-checkpoint")
        assert other.state.global_step == 3 and other.state.log_history[0]["step"] == 1
    trainer.push_to_hub()
    assert repository.commits[-1] == "End of training"
    assert not [name for name in repository.files if name.startswith("checkpoint-")]


@pytest.mark.parametrize("private", [None, True])
def test_private_and_existing_repositories(hub, tmp_path, monkeypatch, private):
    trainer = make(tmp_path / "run", push_to_hub=True, hub_private_repo=private)
    for _ in range(2):
        trainer.push_to_hub()
    assert hub.repositories["tester/policy"].private is bool(private)
    make(tmp_path / "again", push_to_hub=True)  # a repository that exists, and stays as it is
    assert hub.repositories["tester/policy"].private is bool(private)
    tokenizer = AutoTokenizer.from_pretrained("tester/policy", cache_dir=tmp_path / "mine")
    assert tokenizer.chat_template == trainer.processing_class.chat_template
    if private:
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(OSError, match="tester/policy"):
            AutoTokenizer.from_pretrained("tester/policy", cache_dir=tmp_path / "others")


# ----------------------------------------------------------------------------------------------------- pulled and used


@pytest.mark.parametrize("chunk_size", [0, 100_000])
def test_a_full_model_is_pulled_with_transformers(hub, tmp_path, chunk_size):
    hub.large_from, hub.chunk_size = 200_000, chunk_size
    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.push_to_hub()
    sizes = [len(parts) for parts in hub.large_files.values()]
    assert sizes and all(size > 1 for size in sizes) == bool(chunk_size)
    model = AutoModelForCausalLM.from_pretrained("tester/policy")
    assert torch.equal(logits(model), logits(trainer.model))
    tokenizer = AutoTokenizer.from_pretrained("tester/policy")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.fixture
def adapter(hub, base, tmp_path):
    """An adapter that was trained on a model of the hub, and pushed."""
    trainer = make(
        tmp_path / "run", hub_model_id="tester/adapter", model=base, peft_config=LoraConfig(r=2), push_to_hub=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    save_options(tmp_path / "run", trainer.args, search_k=2, system_prompt="no_think")
    trainer.train()
    trainer.push_to_hub()
    return trainer


def test_an_adapter_is_pulled_with_peft_and_merged_into_a_plain_model(hub, adapter, tmp_path):
    files = hub.repositories["tester/adapter"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    data = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert data["library_name"] == "peft" and data["base_model"] == "tester/base"
    expected = logits(adapter.model)
    base = AutoModelForCausalLM.from_pretrained("tester/base", dtype="float32")
    assert not torch.allclose(logits(base), expected)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, "tester/adapter")), expected, atol=1e-5)
    whole = AutoPeftModelForCausalLM.from_pretrained("tester/adapter", dtype="float32")
    assert torch.allclose(logits(whole), expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained("tester/adapter")
    assert tokenizer.chat_template == adapter.processing_class.chat_template
    whole.merge_and_unload().push_to_hub("tester/merged")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained("tester/merged")), expected, atol=1e-4)


def test_an_adapter_on_the_hub_is_trained_further(hub, adapter, tmp_path):
    del hub.repositories["tester/adapter"].files["tokenizer_config.json"]  # then it is that of the base model
    hub.requests.clear()
    more = tiny.make_trainer(
        Trainer, IGPOConfig, tmp_path / "more", model="tester/adapter", processing_class=None,
        model_init_kwargs={"dtype": "float32", "revision": "v2"}, hub_model_id="tester/policy",
    )  # fmt: skip
    at_v2 = [request for request in hub.requests if "/v2" in request]
    assert at_v2 and all("tester/adapter/" in request for request in at_v2)
    assert torch.allclose(logits(more.model), logits(adapter.model), atol=1e-5)
    more.train()
    assert not torch.allclose(logits(more.model), logits(adapter.model), atol=1e-5)
    more.push_to_hub()
    config = json.loads(hub.repositories["tester/policy"].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tester/base"
    with pytest.raises(ValueError, match="is an adapter, which is trained further, and `peft_config`"):
        make(tmp_path / "twice", model="tester/adapter", peft_config=LoraConfig(r=2))


def test_igpo_asks_and_evaluates_what_is_on_the_hub(hub, adapter, tmp_path):
    passages = [{"id": str(i), "title": f"T{i}", "text": f"Paris is the capital number {i}."} for i in range(3)]
    Path(tmp_path / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in passages))
    BM25Index.build(tmp_path / "corpus.jsonl", directory=tmp_path / "index", show_progress=False)
    index = ["--index", str(tmp_path / "index"), "--max-completion-length", "30"]
    asked = CliRunner().invoke(app, ["ask", "--model", "tester/adapter", *index, "Who?"], catch_exceptions=False)
    assert asked.exit_code == 0 and "2 passages of at most 200 words" in asked.output
    assert "igpo.yaml" in asked.output and "Ended by" in asked.output

    Path(tmp_path / "q.jsonl").write_text('{"id": "1", "question": "Who?", "answers": ["I"]}\n')
    words = ["eval", "--model", "tester/base", "--adapter", "tester/adapter", "--data", str(tmp_path / "q.jsonl")]
    evaluated = CliRunner().invoke(app, [*words, *index, "--out", str(tmp_path / "eval")], catch_exceptions=False)
    assert evaluated.exit_code == 0 and (tmp_path / "eval/results.json").is_file()

    config = json.loads(hub.repositories["tester/adapter"].files["adapter_config.json"])
    moved = json.dumps(config | {"base_model_name_or_path": "/home/them/model"}).encode()
    hub.repositories["tester/moved"] = Repository(
        files=hub.repositories["tester/adapter"].files | {"adapter_config.json": moved}, commits=["first"]
    )
    with pytest.raises(FileNotFoundError, match="no such directory: /home/them/model"):
        EvaluationSettings("tester/moved", ["a"], ["b"]).resolve()
    EvaluationSettings("tester/base", ["a"], ["b"], adapter="tester/moved").resolve()  # whose base model is given


def test_a_model_on_the_hub_has_no_options_and_is_no_adapter_unless_it_says_so(hub, base):
    assert saved_options(base) is None and saved_options("tester/absent") is None
    settings = EvaluationSettings(base, ["a"], ["b"])
    settings.resolve()
    assert (settings.model, settings.adapter) == (base, None)


def test_a_base_model_in_a_folder_is_warned_of(hub, tmp_path, caplog):
    tiny.make_model("qwen3").save_pretrained(tmp_path / "mine")
    make(tmp_path / "run", model=str(tmp_path / "mine"), peft_config=LoraConfig(r=2), push_to_hub=True)
    assert "whoever pulls the adapter has to bring that model" in caplog.text
    caplog.clear()
    make(tmp_path / "other", model=str(tmp_path / "mine"), push_to_hub=True)
    assert "whoever pulls" not in caplog.text


# ----------------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "the namespace of somebody else": ({"hub_model_id": "other/policy"}, "this token may not write there"),
    "the repository of somebody else": ({"hub_model_id": "other/theirs"}, "this token may not write there"),
    "a wrong token": ({"hub_token": "hf_wrong"}, "the hub does not know the token, or there is none"),
    "no token": ({}, "the hub does not know the token, or there is none"),
    "no network": ({}, "the hub cannot be reached"),
    "offline": ({}, "HF_HUB_OFFLINE is set"),
    "a fault of the hub": ({}, "the hub refused with status 503 (maintenance)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_refused_before_a_model_is_loaded(hub, tmp_path, monkeypatch, case):
    options, message = REFUSED[case]
    hub.repositories["other/theirs"] = Repository()
    if case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    if case == "no network":
        hub.faults.append(Fault("", 0))
    if case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "a fault of the hub":
        hub.faults.append(Fault("repos/create", 503, message="maintenance"))
    tiny.make_model("qwen3").config.save_pretrained(tmp_path / "model")  # without weights: loading would fail
    with pytest.raises(PushFailed) as caught:
        make(tmp_path / "run", model=str(tmp_path / "model"), push_to_hub=True, **options)
    assert message in str(caught.value) and "`push_to_hub`: nothing can be pushed to" in str(caught.value)
    assert "hf_" not in str(caught.value)


def test_a_hub_that_does_not_know_the_question_is_trusted(hub, tmp_path):
    hub.faults.append(Fault("auth-check", 404))
    make(tmp_path / "run", push_to_hub=True).push_to_hub()
    assert "model.safetensors" in hub.repositories["tester/policy"].files


def test_other_mistakes_make_no_repository(hub, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has 1 questions"):
        make(tmp_path / "run", push_to_hub=True, train_dataset=tiny.make_dataset(1), per_device_train_batch_size=4)
    assert hub.requests == []


# ----------------------------------------------------------------------------------------------------- what goes wrong

FAILURES = {
    "permission lost": (Fault("commit|preupload", 403, message="revoked"), "this token may not write there"),
    "quota": (Fault("/commit/", 413, message="storage limit"), "the hub refused with status 413 (storage limit)"),
    "server error": (
        Fault("/commit/", 500, message="oops"),
        "refused with status 500 (oops). The fault is on its side",
    ),
    "storage error": (Fault("PUT /lfs", 507, message="full"), "refused with status 507 (full)"),
    "gone for good": (Fault("PUT /lfs", 0), "the hub cannot be reached"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_push_that_fails_says_how_to_push_later(hub, tmp_path, caplog, case):
    fault, message = FAILURES[case]
    hub.large_from = 200_000
    trainer = make(tmp_path / "run", push_to_hub=True)
    trainer.train()
    hub.faults.append(fault)
    trainer.save_model()
    assert message in caplog.text
    with pytest.raises(PushFailed) as caught:
        trainer.push_to_hub()
    assert message in str(caught.value) and "\n" not in str(caught.value)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(loaded), logits(trainer.model)) and (tmp_path / "run/README.md").is_file()
    assert str(caught.value).endswith(f"To push it later: {how_to_push(trainer.args, 'tester/policy')}")


def test_the_command_that_pushes_later(hub, tmp_path):
    trainer = make(
        tmp_path / "run", save_strategy="steps", save_steps=1, save_trajectories=True, hub_private_repo=True
    )
    trainer.train()
    hub.faults.append(Fault("", 0))
    with pytest.raises(PushFailed, match="hf upload tester/policy .* --private") as caught:
        trainer.push_to_hub()
    assert (tmp_path / "run/model.safetensors").is_file(), "the model is saved before the hub is asked"
    hub.faults.clear()
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *_words(str(caught.value))]
    variables = os.environ | environment(hub, tmp_path / "other", TOKEN)
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    later = dict(hub.repositories["tester/policy"].files)
    hub.repositories.clear()
    trainer.push_to_hub()
    assert later.keys() == hub.repositories["tester/policy"].files.keys()


def _words(message):
    import shlex

    return shlex.split(message.partition("later: hf ")[2])


def test_a_connection_that_is_lost_once_costs_nothing(hub, tmp_path, caplog):
    hub.large_from, hub.chunk_size = 200_000, 100_000
    hub.faults += [Fault("PUT /lfs/.*/2", 0, times=1), Fault("PUT /lfs/.*/1", 503, times=1)]
    trainer = make(tmp_path / "run")
    trainer.push_to_hub()
    assert all(fault.times == 0 for fault in hub.faults)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("tester/policy")), logits(trainer.model))
    uploads = [each for each in hub.requests if each.startswith("PUT")]
    trainer.push_to_hub()  # again: what the hub has is not sent a second time
    assert [each for each in hub.requests if each.startswith("PUT")] == uploads


def test_pushes_that_fail_while_training_are_warned_of(hub, tmp_path, caplog):
    trainer = make(tmp_path / "run", push_to_hub=True, hub_strategy="every_save", save_strategy="steps", save_steps=1)
    hub.faults.append(Fault("/commit/", 500, message="oops"))
    trainer.train()
    assert trainer.state.global_step == 1
    assert "was not pushed to tester/policy: the hub refused with status 500 (oops)" in caplog.text


# ------------------------------------------------------------------------------------------------------------- secrets


def test_a_token_is_not_pickled_or_shown(tmp_path):
    args = IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token=f"{TOKEN}\n")
    assert f"Bearer {args.hub_token}" == f"Bearer {TOKEN}" == f"Bearer {copy.deepcopy(args).hub_token}"
    torch.save(args, tmp_path / "training_args.bin")
    assert TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert TOKEN not in repr(args) + str(args) + args.to_json_string() + repr([args.hub_token])


@pytest.mark.parametrize("middle", ["\n", " ", "é", "\x01"])
def test_a_token_that_would_be_shown_by_the_error_of_a_client_is_refused(tmp_path, middle):
    with pytest.raises(ValueError, match="`hub_token` has a space, a line break or a letter") as caught:
        IGPOConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token=f"hf_SEC{middle}RET")
    assert "SEC" not in str(caught.value)


def test_a_token_is_not_printed_with_the_command_that_resumes():
    words = ["--config", "a.yaml", "--hub_token", TOKEN, f"--hub-token={TOKEN}", "--max_steps", "2"]
    expected = ["--config", "a.yaml", "--hub_token", "<token>", "--hub-token=<token>", "--max_steps", "2"]
    assert without_token(words) == expected


# ----------------------------------------------------------------------------------------------- from the command line


@pytest.fixture
def words(hub, tmp_path, monkeypatch):
    """A command line that trains and pushes, without a token."""
    monkeypatch.setenv("IGPO_CACHE", str(tmp_path / "igpo"))
    tiny.make_model("qwen3").save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    questions = [{"id": str(i), "question": f"Where was author {i} born?", "answers": ["Paris"]} for i in range(8)]
    passages = [{"id": str(i), "title": f"T{i}", "text": f"Author {i} was born in Paris."} for i in range(4)]
    for name, rows in {"questions": questions, "corpus": passages}.items():
        Path(tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **{name: tmp_path / f"{name}.jsonl" for name in ("questions", "corpus")},
        "model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "run", "num_eval_questions": 2,
        "max_steps": 2, "save_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2, "max_turn_length": 8, "max_completion_length": 200, "use_cpu": "true",
        "bf16": "false", "disable_tqdm": "true", "save_trajectories": "true", "report_to": "none", "beta": 0,
        "search_max_words": 5, "push_to_hub": "true", "hub_model_id": "tester/policy",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_igpo_train_pushes_and_no_file_and_no_line_has_the_token(hub, words, tmp_path, repository):
    hub.large_from = 200_000
    variables = os.environ | environment(hub, tmp_path / "other") | {"HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
    variables["PYTHONPATH"] = os.pathsep.join([str(repository / "src"), os.environ.get("PYTHONPATH", "")])
    variables.pop("HF_TOKEN")
    more = ["--hub_token", TOKEN, "--hub_strategy", "every_save", "--report_to", "tensorboard", "--debug"]
    command = [sys.executable, "-m", "igpo_trl", "train", *words, *more]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.repositories["tester/policy"].files
    assert {"README.md", "model.safetensors", "igpo.yaml", "metrics.jsonl", "evaluation.json"} <= set(files)
    assert not [name for name in files if "optimizer" in name or "trajectories" in name]
    assert {"Model save", "End of training"} <= set(hub.repositories["tester/policy"].commits)
    assert "after training" in files["README.md"].decode(), "the card that was pushed lacks the last evaluation"

    written = {str(file): file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert any(name.endswith("training_args.bin") for name in written)
    assert any("tfevents" in name for name in written)
    for name, content in (written | files | {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}).items():
        assert TOKEN.encode() not in content, name
        assert TOKEN[3:].encode() not in content, name
    options = yaml.safe_load(files["igpo.yaml"])
    assert options["model_name_or_path"] == "tester/policy" and options["search_max_words"] == 5
    assert not [name for name, content in files.items() if b"Where was author" in content]
    for name in ("README.md", "igpo.yaml", "config.json", "tokenizer_config.json", "generation_config.json"):
        assert str(tmp_path).encode() not in files[name], name


def run(words):
    return CliRunner().invoke(app, ["train", *words])


def test_igpo_train_says_at_once_that_it_may_not_push(hub, words, tmp_path):
    result = run([*words, "--hub_token", "hf_wrongWRONG"])
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
    assert "nothing can be pushed to tester/policy: the hub does not know the token" in result.stderr
    assert "hf_wrongWRONG" not in result.output and not (tmp_path / "igpo").exists(), "an index was built before"


def test_igpo_train_finishes_a_run_whose_push_fails(hub, words, tmp_path):
    hub.faults.append(Fault("/commit/", 403, message="revoked"))
    result = run([*words, "--hub_token", TOKEN])
    assert result.exit_code == 1 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and "this token may not write there (revoked)" in last
    assert f"To push it later: hf upload tester/policy {tmp_path / 'run'} ." in last
    assert "after" in json.loads((tmp_path / "run/evaluation.json").read_text())
    again = run([*words, "--hub_token", TOKEN, "--resume_from_checkpoint", "true"])
    assert again.exit_code == 0 and "is done: checkpoint-2 is its last" in again.output
    assert "If it has not been pushed: hf upload tester/policy" in again.output


def test_a_run_without_a_network_says_whose_it_will_be(hub, words, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    words[words.index("--push_to_hub") + 1] = "false"
    result = run(words)
    assert result.exit_code == 0 and hub.requests == []
    card = (tmp_path / "run/README.md").read_text()
    assert "igpo ask --model tester/policy" in card and "\n# policy\n" in card
    assert "model_name_or_path: tester/policy" in (tmp_path / "run/igpo.yaml").read_text()


def test_igpo_train_resumes_without_printing_the_token(hub, words, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(IGPOTrainer, "_compute_loss", fail)
    result = run([*words, "--hub_token", TOKEN])
    notes = " ".join(getattr(result.exception, "__notes__", []))
    assert "To start again:" in notes and "--hub_token '<token>'" in notes
    assert TOKEN not in notes + result.output + str(result.exception)
