"""Every block of code in the documents runs, or its commands are read by the programs that they are for."""

import argparse
import doctest
import gzip
import http.server
import importlib
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import test_data_hub
import tiny
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from hub_server import TOKEN, Repository, environment, running_hub, use_hub
from peft import LoraConfig, get_peft_model
from test_search_dense import make_model
from test_serve import PASSAGES, Running, post
from transformers import AutoModelForCausalLM, GenerationMixin

import igpo_trl
import igpo_trl.search
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.cli import train as training
from igpo_trl.cli.app import app
from igpo_trl.data import QUESTION_SETS
from igpo_trl.evaluation.settings import saved_options
from igpo_trl.rollout.chat_templates import prepare_for_tools
from igpo_trl.search import BM25Index, DenseIndex, WebSearch
from igpo_trl.training.hub import how_to_push
from igpo_trl.trajectory import Trajectory, Turn, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NOT_CODE = ("text", "bibtex", "json")  # diagrams, the citation, a response that is compared with the server's


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(str(page.relative_to(ROOT)), text[: match.start()].count("\n") + 1, match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_every_block_has_a_language_that_is_checked_here():
    assert {block.language for block in BLOCKS} <= {"python", "bash", *NOT_CODE}
    assert len(BLOCKS) == sum(page.read_text(encoding="utf-8").count("\n```") for page in PAGES) / 2


# ------------------------------------------------------------------------------------------------------------- Python

# What is too large, or not on this machine, and what takes its place.
SUBSTITUTES = {
    '"Qwen/Qwen2.5-3B-Instruct"': '"tiny-model"',
    "gradient_accumulation_steps=16,": "gradient_accumulation_steps=1, max_turn_length=8, max_steps=1, use_cpu=True, "
    "bf16=False, report_to='none', disable_tqdm=True,",
}


CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_turn_length": 8}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The files of somebody who reads the documents, small; the sets of the hub; nothing can be pushed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERPER_API_KEY", "none")
    monkeypatch.setattr(IGPOTrainer, "push_to_hub", lambda trainer: None)  # tests/test_hub.py pushes
    questions = [{"id": str(i), "question": f"Who wrote Dune {i}?", "answers": ["Frank Herbert"]} for i in range(8)]
    for name, rows in {"corpus.jsonl.gz": PASSAGES, "questions.jsonl.gz": questions}.items():
        with gzip.open(name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    Path("more.csv").write_text("question,answers\nWho?,I\n")
    Path("prompts").mkdir()
    Path("prompts/mine.txt").write_text("Answer.")
    tiny.make_model("qwen2", max_position_embeddings=8192).save_pretrained("tiny-model")
    tiny.make_tokenizer().save_pretrained("tiny-model")
    info = {"dataset": "nq", "id": "1", "sample": 0}
    rollout = Trajectory("Who?", [Turn("<answer>I</answer>", "", 3)], ["I"], stop_reason="answered", info=info)
    for run in ("outputs/eval/run", "outputs/run"):
        write_jsonl(f"{run}/trajectories/rank0.jsonl", [rollout])
    Path("outputs/run/metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "belief/final": 0.1}\n')
    for repository, files in test_data_hub.repositories().items():
        for path, body in files.items():
            file = Path("hub", repository, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(body)
    for name, one in QUESTION_SETS.items():
        monkeypatch.setitem(QUESTION_SETS, name, one._replace(repository=str(tmp_path / "hub" / one.repository)))


CALL = {"name": "search", "arguments": {"query": "Who wrote Dune?"}}
PUSH = IGPOTrainer.push_to_hub
TURNS = [f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", tiny.answer("Frank Herbert")]


@pytest.fixture
def trained(reader, monkeypatch):
    """What training leaves, an index, and somebody who says `TURNS`: the model, and a server in the form of vLLM's."""
    tokenizer, model = tiny.make_tokenizer(), tiny.make_model("qwen2", max_position_embeddings=8192)
    prepare_for_tools(tokenizer)
    model.save_pretrained("outputs/run")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "outputs/run"
    adapted.save_pretrained("outputs/adapter")
    for folder in ("outputs/run", "outputs/adapter"):
        tokenizer.save_pretrained(folder)
    BM25Index.build("corpus.jsonl.gz", directory="outputs/index", show_progress=False)
    turns = [*TURNS]

    def generate(self, input_ids, **options):
        said = [*tokenizer.encode(turns.pop(0)), tokenizer.eos_token_id]
        return torch.cat([input_ids, torch.tensor([said])], dim=1)

    class Completions(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            turn = turns.pop(0)
            if self.path == "/v1/chat/completions":
                assert request["tools"][0]["function"]["name"] == "search"
                message = {"role": "assistant", "content": turn, "tool_calls": []}
                if turn != TURNS[-1]:
                    function = {"name": "search", "arguments": json.dumps(CALL["arguments"])}
                    message |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
                choice = {"index": 0, "message": message}
            else:
                assert self.path == "/v1/completions"
                assert tokenizer.decode(request["prompt"]).endswith("<|im_start|>assistant\n")
                choice = {"index": 0, "text": turn}
            body = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def published(reader, tmp_path, monkeypatch):
    """A hub with the model of the examples, on which the reader is logged in as `you`."""
    with running_hub() as server:
        use_hub(server, monkeypatch, tmp_path / "cache", TOKEN)
        server.users[TOKEN] = "you"
        files = {file.name: file.read_bytes() for file in Path("tiny-model").iterdir()}
        server.repositories["Qwen/Qwen2.5-3B-Instruct"] = Repository(files=files, commits=["first"])
        yield server


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_the_page_about_the_hub_pushes_pulls_and_merges(published, monkeypatch):
    monkeypatch.setattr(IGPOTrainer, "push_to_hub", PUSH)  # which `reader` has replaced
    blocks = [block for block in BLOCKS if is_of_hub(block)]
    assert len(blocks) == 2
    for block in blocks:
        code = block.code.replace(*next(iter(list(SUBSTITUTES.items())[1:])))
        names = {"__name__": "example"}
        exec(compile(code, str(block), "exec"), names)
    searcher, merged = (published.repositories[name] for name in ("you/searcher", "you/searcher-merged"))
    assert {"adapter_config.json", "adapter_model.safetensors", "igpo.yaml", "README.md"} <= searcher.files.keys()
    assert searcher.private and merged.private and {"config.json", "tokenizer.json"} <= merged.files.keys()
    assert names["plain"].num_parameters() == tiny.make_model("qwen2", max_position_embeddings=8192).num_parameters()
    assert saved_options("you/searcher") is not None
    printed = how_to_push(IGPOConfig("outputs/run", hub_model_id="you/searcher", hub_private_repo=True, **CPU))
    (shown,) = [b.code for b in BLOCKS if b.page == "docs/hub.md" and b.code.startswith("hf upload you/searcher out")]
    assert shlex.split(shown.replace("\\\n", "")) == shlex.split(printed)


def is_of_hub(block):
    return block.page == "docs/hub.md" and block.language == "python"


def is_of_inference(block):
    return block.page == "docs/inference.md" and block.language == "python"


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_of_inference(block)], ids=str)
def test_a_trained_model_is_used_by_itself(block, trained, capsys):
    names = {"__name__": "example"}
    exec(compile(block.code.replace("http://127.0.0.1:8000/v1", trained), str(block), "exec"), names)
    if "messages" in names:
        roles = [message["role"] for message in names["messages"]]
        assert roles == ["system", "user", "assistant", "tool", "assistant"]
        assert names["messages"][3]["content"] == names["search"](query="Who wrote Dune?")
        assert capsys.readouterr().out == "Frank Herbert\n"
    elif "save_options" in names:
        assert saved_options("outputs/run") is not None
    else:
        assert AutoModelForCausalLM.from_pretrained("outputs/merged").num_parameters() > 0


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python" and not is_of_inference(b) and not is_of_hub(b)], ids=str
)
def test_python_runs_by_itself(block, reader, monkeypatch):
    """In a namespace of its own: what a block needs and does not import is a NameError for who copies it."""
    code = block.code
    for original, substitute in SUBSTITUTES.items():
        code = code.replace(original, substitute)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    names = {"__name__": "example"}
    exec(compile(code, str(block), "exec"), names)
    if "Geography" in names:
        config = IGPOConfig("out", max_steps=1, num_generations=2, per_device_train_batch_size=2, **CPU)
        trainer = IGPOTrainer("tiny-model", args=config, environment_factory=names["Geography"])
        trainer.train()
        assert set(trainer.current_step.answers) <= {tuple(answers) for answers in names["CAPITALS"].values()}
    if "look_up" in names:
        assert names["look_up"]("Dune") == names["look_up_many"](["Dune"])[0] != names["look_up"]("Rome")


def examples() -> Iterator[doctest.DocTest]:
    """The examples of docstrings, which the reference on the site shows."""
    for module in pkgutil.walk_packages(igpo_trl.__path__, "igpo_trl."):
        source = Path(module.module_finder.path, f"{module.name.split('.')[-1]}.py")
        if source.is_file() and ">>> " in source.read_text(encoding="utf-8"):
            for found in doctest.DocTestFinder().find(importlib.import_module(module.name), module.name):
                if found.examples and found.examples[0].source.strip():
                    yield found


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_examples_of_docstrings_run(example, reader, monkeypatch):
    make_model(Path("encoder"))
    BM25Index.build("corpus.jsonl.gz", directory="bm25", show_progress=False)
    DenseIndex.build("corpus.jsonl.gz", "dense", model="encoder", show_progress=False)
    monkeypatch.setattr(WebSearch, "search", lambda self, query, k: [])  # tests/test_search_web.py has a service
    example.globs.update({name: getattr(igpo_trl.search, name) for name in igpo_trl.search.__all__})
    with Running(BM25Index.load("bm25")) as server:
        for each in example.examples:
            each.source = each.source.replace("http://127.0.0.1:8000", server.url)
            each.source = each.source.replace("intfloat/e5-base-v2", "encoder").replace('"index/"', '"bm25/"')
            shown = each.want.split("```")[0]  # the end of the block
            each.want = "...\n" if "…" in shown else shown  # what is shortened cannot be compared
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(example, clear_globs=False)
    assert runner.tries == len(example.examples) and not runner.failures


# --------------------------------------------------------------------------------------------------------------- bash


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs a block in a real shell, in a copy of the checkout whose programs only write down how they were called."""
    checkout, programs, records = tmp_path / "checkout", tmp_path / "programs", tmp_path / "records"
    for folder in (checkout / ".venv/bin", checkout / "igpo-trl", checkout / "my-encoder", programs, records):
        folder.mkdir(parents=True)
    for name in ("configs", "accelerate_configs", "benchmarks", "tests", "train.py", "Makefile"):
        (checkout / name).symlink_to(ROOT / name)
    recorder = '#!/bin/bash\nprintf "%s\\0" "${0##*/}" "$@" > "$(mktemp "$RECORDS/XXXXXX")"\n'
    for name in ("igpo", "accelerate", "python", "pip", "make", "git", "curl", "hf"):
        (programs / name).write_text(recorder)
        (programs / name).chmod(0o755)
    (checkout / ".venv/bin/python").symlink_to(programs / "python")
    (checkout / ".venv/bin/activate").touch()
    for name in ("run", "grpo", "igpo"):
        (checkout / "outputs/eval" / name).mkdir(parents=True)
    for path in ("corpus/hotpotqa.jsonl.gz", "questions/hotpotqa.jsonl.gz"):
        file = tmp_path / "shared/data" / path
        file.parent.mkdir(parents=True)
        file.touch()
    rollouts = checkout / "outputs/demo-quick/igpo_critic/trajectories/rank0.jsonl"  # what `igpo demo --quick` leaves
    rollouts.parent.mkdir(parents=True)
    rollouts.touch()
    monkeypatch.chdir(checkout)

    def run(code: str) -> list[list[str]]:
        for record in records.iterdir():
            record.unlink()
        code = code.replace("<address of this repository>", "https://host/repository.git")
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code + "\nwait"],
            env={"PATH": f"{programs}:/usr/bin:/bin", "RECORDS": str(records), "LC_ALL": "C.UTF-8"},
            check=True,
            timeout=60,
        )
        return sorted(file.read_text(encoding="utf-8").split("\0")[:-1] for file in records.iterdir())

    return run


class Parsed(BaseException):
    """Ends a program as soon as it has read its arguments."""


def parse_igpo(arguments, monkeypatch):
    """By the real command line, whose commands do nothing."""
    if arguments[:1] == ["train"]:
        return parse_training(arguments[1:], monkeypatch)
    calls = []

    def disarm(command, name):
        command.callback = lambda **options: calls.append(name)
        for child, each in getattr(command, "commands", {}).items():
            disarm(each, child)

    command = typer.main.get_command(app)
    disarm(command, "igpo")
    command.main(arguments, prog_name="igpo", standalone_mode=False)
    assert calls or arguments == ["--help"]


def parse_training(arguments, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "run_training", lambda script, config, model: calls.append((script, config, model)))
    monkeypatch.setattr(
        training, "print_estimate", lambda wanted, config, model: calls.append((wanted, config, model))
    )
    training.main([*arguments, "--use_cpu", "true", "--bf16", "false"])
    ((_, _, model),) = calls
    assert model.model_name_or_path


def parse_accelerate(arguments, monkeypatch):
    assert arguments[0] == "launch"
    options = launch_command_parser().parse_args(arguments[1:])
    assert options.config_file is None or Path(options.config_file).is_file()
    if options.module:
        assert options.training_script == "igpo_trl"
        parse_igpo(options.training_script_args, monkeypatch)
    else:
        assert options.training_script == "train.py"
        parse_training(options.training_script_args, monkeypatch)


def parse_python(arguments, monkeypatch):
    if arguments[:2] == ["-m", "pytest"]:
        assert Path(arguments[2]).is_file()
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse_args(self, *given)
        raise Parsed

    script = Path(arguments[0])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.syspath_prepend(str(script.resolve().parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def parse_pip(arguments, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert arguments[0] == "install"
    for named in re.findall(r"(?:^\.|^igpo-trl)\[(.+)\]", "\n".join(arguments), re.MULTILINE):
        assert set(named.split(",")) <= extras.keys()


def parse_make(arguments, monkeypatch):
    done = subprocess.run(
        ["make", "-n", f"PYTHON={sys.executable}", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_curl(arguments, monkeypatch):
    """The server's answer has the form that the block after it shows."""
    page, (address, option, body) = "docs/search_network.md", arguments
    assert option == "-d" and address.startswith("http://127.0.0.1:8000/")
    (shown,) = [json.loads(block.code) for block in BLOCKS if (block.page, block.language) == (page, "json")]
    index = BM25Index.build(PASSAGES, show_progress=False)
    with Running(index) as server:
        status, answer = post(server.url, body.encode(), address.removeprefix("http://127.0.0.1:8000"))
    assert status == 200

    def form(value):
        if isinstance(value, dict):
            return {name: form(each) for name, each in value.items()}
        return [form(each) for each in value] if isinstance(value, list) else type(value)

    assert form(answer) == form(shown)


def run_hf(arguments, monkeypatch):
    """By the real program, on a hub with what the page has pushed."""
    if arguments[:2] == ["auth", "login"]:
        arguments.append("--help")  # it asks for a token
    for file in ("run/config.json", "run/trajectories/rank0.jsonl", "warm/config.json", "warm/traces.jsonl"):
        path = Path("outputs", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    with running_hub() as server:
        server.users[TOKEN] = "you"
        files = {"igpo.yaml": b"a: 1\n", "last-checkpoint/trainer_state.json": b"{}"}
        server.repositories["you/searcher"] = Repository(files=dict(files), commits=["first"])
        done = subprocess.run(
            [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments],
            env=os.environ | environment(server, Path("cache").absolute(), TOKEN),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        pushed = {name: set(repository.files) - files.keys() for name, repository in server.repositories.items()}
    if arguments[0] == "upload":
        name, folder = arguments[1:3]
        assert pushed[name] == {"rank0.jsonl" if folder.endswith("trajectories") else "config.json"}
    if arguments[0] == "download":
        (place,) = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--local-dir"]
        assert any(Path(place, name).is_file() for name in files)


PROGRAMS = {
    "igpo": parse_igpo,
    "accelerate": parse_accelerate,
    "python": parse_python,
    "pip": parse_pip,
    "make": parse_make,
    "curl": run_curl,
    "hf": run_hf,
    "git": lambda arguments, monkeypatch: None,  # clones from a placeholder
}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_commands_are_read_by_their_programs(block, commands, monkeypatch):
    called = commands(block.code)
    assert called
    for program, *arguments in called:
        with monkeypatch.context() as patch:
            PROGRAMS[program](arguments, patch)


def test_a_wrong_option_in_a_document_would_be_noticed(commands, monkeypatch):
    for code in (
        "igpo index --corpus a --outt b",
        "igpo evaluate",
        "accelerate launch train.py --config configs/hotpotqa_cpu.yaml --questionz x",
        "accelerate launch --config_file accelerate_configs/none.yaml train.py --config configs/hotpotqa_cpu.yaml",
        "python benchmarks/learning.py --seedz 5",
        'pip install "igpo-trl[vlm]"',
        "make tested",
    ):
        ((program, *arguments),) = commands(code)
        with pytest.raises((Exception, SystemExit)), monkeypatch.context() as patch:
            PROGRAMS[program](arguments, patch)
