"""`igpo warm-start`: traces from questions, their tokens, training that resumes, and what is reported."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_tiny_model import world, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from typer.testing import CliRunner

from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.beliefs import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE
from igpo_trl.cli.app import app
from igpo_trl.data import load_questions
from igpo_trl.evaluation import has_answer
from igpo_trl.search import BM25Index, SearchTool
from igpo_trl.warm_start import make_traces, read_traces, warm_start
from igpo_trl.warm_start.encoding import IGNORE, TraceEncoder
from igpo_trl.warm_start.fitting import Clock, WarmStartTrainer
from igpo_trl.warm_start.templates import prepare_tokenizer
from igpo_trl.warm_start.traces import STYLES

# ChatML without tools, as SmolLM2's own template.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
YES_NO = {
    "question": "Was Ada Byron born in Tacoma?",
    "answers": ["yes"],
    "supporting_titles": ["Ada Byron", "Tacoma"],
    "dataset": "rivers",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of random weights whose template has no tools, an index, questions."""
    folder = tmp_path_factory.mktemp("files")
    passages, questions = world()
    BM25Index.build(write(folder / "corpus.jsonl", passages), show_progress=False).save(folder / "index")
    tiny.make_model("qwen2").save_pretrained(folder / "model")
    tiny.make_tokenizer(PLAIN_CHATML).save_pretrained(folder / "model")
    write(folder / "questions.jsonl", [question | {"dataset": "rivers"} for question in questions])
    return folder


@pytest.fixture(scope="module")
def tool(files):
    return SearchTool(BM25Index.load(files / "index"), k=1, max_words=40)


def rows(files, *more, system_prompt="no_think"):
    path = write(files / "all.jsonl", [*read(files / "questions.jsonl"), *more])
    return load_questions(path, system_prompt).to_list()


def read(path):
    return list(map(json.loads, path.read_text().splitlines()))


def words(text):
    return re.findall(r"\w+", text.casefold())


def queries(record):
    return [m["tool_calls"][0]["function"]["arguments"]["query"] for m in record["messages"] if "tool_calls" in m]


@pytest.mark.parametrize("style", STYLES)
def test_queries_use_only_what_was_seen_and_results_are_real(files, tool, style):
    records = [
        record
        for seed in range(4)
        for record in make_traces(rows(files, YES_NO), tool, styles=[style], seed=seed).records
    ]
    assert len(records) > 20 and {record["style"] for record in records} == {style}
    for record in records:
        system, user, *turns, final = record["messages"]
        seen = words(user["content"])
        for call, result in zip(turns[::2], turns[1::2], strict=True):
            (query,) = queries({"messages": [call]})
            assert set(words(query)) <= set(seen), (query, seen)
            assert result == {"role": "tool", "name": "search", "content": tool(query)}
            seen += words(result["content"])
        results = [message["content"] for message in turns[1::2]]
        assert final["content"] in [NO_THINK_TEMPLATE.format(answer=answer) for answer in record["answers"]]
        assert record["answers"] == ["yes"] or has_answer(results, record["answers"])
        assert len(set(queries(record))) == len(queries(record))


def test_styles_and_seeds_change_the_queries(files, tool):
    first = {
        style: [queries(record)[0] for record in make_traces(rows(files), tool, styles=[style]).records]
        for style in STYLES
    }
    people = [question["supporting_titles"][0] for question in world()[1]]
    assert set(first["title"]) <= set(people)
    assert all("water" in query or "born" in query for query in first["words"])
    assert all(any(query.startswith(person + " ") for person in people) for query in first["both"])
    again = make_traces(rows(files), tool)
    assert again.records == make_traces(rows(files), tool).records != make_traces(rows(files), tool, seed=1).records
    assert again.records[:3] == make_traces(rows(files), tool, 3).records


def test_a_title_that_was_not_seen_is_not_searched(tool):
    row = {
        "prompt": [{"role": "user", "content": "At which water lies the birthplace of the author?"}],
        **{"answers": ["Puget Sound"], "supporting_titles": ["Ada Byron", "Tacoma"], "dataset": "x", "id": "1"},
    }
    traces = make_traces([row], tool)
    assert not traces.records and traces.dropped == {"whose passages the searches did not find": 1}
    assert "1 questions gave none (1 whose passages" in traces.summary


def test_a_search_without_use_is_followed_by_another(files):
    """The index finds nothing for words of the question: the title comes next."""
    answers = {"Ada Byron": "[1] Ada Byron\nShe was born in Tacoma.", "Tacoma": "[1] Tacoma\nAt the Puget Sound."}

    def search(query: str) -> str:
        found = (text for title, text in answers.items() if query.startswith(title))
        return next(found, "No passage matches this query. Try other words.")

    row = rows(files)[0]
    (record,) = make_traces([row], search, styles=["words"]).records
    asked = queries(record)
    assert [search(query)[:4] for query in asked] == ["No p", "[1] ", "[1] "]


def test_without_titles_searching_ends_at_the_answer(files, tool):
    row = rows(files)[0] | {"supporting_titles": []}
    (record,) = make_traces([row | {"answers": ["Tacoma"]}], tool).records
    assert len(queries(record)) == 1
    yes = row | {"answers": ["yes"]}
    assert make_traces([yes], tool).dropped == {"of yes or no, whose passages the searches did not find": 1}


def test_an_alias_that_was_read_is_the_answer(files, tool):
    (record,) = make_traces([rows(files)[0] | {"answers": ["Ocean Sound", "Puget Sound"]}], tool).records
    assert record["messages"][-1]["content"] == NO_THINK_TEMPLATE.format(answer="Puget Sound")


def test_traces_think_where_the_prompt_asks_for_it(files, tool):
    for record in make_traces(rows(files, system_prompt="think"), tool).records:
        turns = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
        assert all(turn.startswith("<think>\n") and "\n</think>" in turn for turn in turns)
        assert turns[-1] in [DEFAULT_TEMPLATE.format(answer=answer) for answer in record["answers"]]
        assert all(query in turn for query, turn in zip(queries(record), turns, strict=False))
    none = make_traces(rows(files, system_prompt="think"), tool, thoughts=0.0)
    some = [record for seed in range(4) for record in make_traces(rows(files), tool, thoughts=0.5, seed=seed).records]
    assert not any("<think>" in str(record["messages"][1:]) for record in none.records)
    assert {"<think>" in str(record["messages"][1:]) for record in some} == {True, False}


@pytest.mark.parametrize("system_prompt", ["no_think", "think"])
def test_tokens_are_those_of_a_rollout_that_says_the_same(files, tool, tmp_path, system_prompt):
    """The trainer's own loop runs the turns of each trace; its ids and its mask are those of the encoder."""
    questions = load_questions(files / "questions.jsonl", system_prompt)
    records = make_traces(questions.to_list(), tool, 4).records
    tokenizer = tiny.make_tokenizer()

    class Trainer(tiny.Scripted, IGPOTrainer):
        scripts = []

    by_id = {row["id"]: row for row in questions}
    trainer = tiny.make_trainer(
        *(Trainer, IGPOConfig, tmp_path),
        model=tiny.make_model("qwen2", max_position_embeddings=8192),
        processing_class=tokenizer,
        tools=[tool],
        train_dataset=questions.select(range(2)),
        num_generations=2,
        max_completion_length=8192,
    )
    encoder = TraceEncoder(tokenizer, [tool])
    encoded = [encoder.encode(record["messages"]) for record in records]
    trainer.scripts = [[tokenizer.decode(turn[:-1]) for turn in turns_of(example["labels"])] for example in encoded]
    trainer._generate_and_score_completions([by_id[record["id"]] for record in records])
    step = trainer.current_step
    for i, example in enumerate(encoded):
        assert [*step.prompt_ids[i], *step.completion_ids[i]] == example["input_ids"]
        sampled = (step.turn_index[i] >= 0).tolist()[: len(step.completion_ids[i])]
        assert [label != IGNORE for label in example["labels"]] == [False] * len(step.prompt_ids[i]) + sampled
    assert trainer.current_step.round_log.stops == ["answered"] * 4


def turns_of(labels):
    """Runs of labels."""
    turns, open_turn = [], False
    for label in labels:
        if label == IGNORE:
            open_turn = False
        elif open_turn:
            turns[-1].append(label)
        else:
            turns.append([label])
            open_turn = True
    return turns


def test_traces_of_your_own(tmp_path):
    turn = {"role": "assistant", "content": "<answer>Paris</answer>"}
    good = [{"messages": [{"role": "user", "content": "Where?"}, turn]}]
    assert read_traces(write(tmp_path / "a.jsonl", good)).records == good
    for bad, problem in (
        ({"prompt": "Where?"}, "expected `messages`"),
        ({"messages": ["Where?"]}, "expected `messages`"),
        ({"messages": [turn]}, "expected a message of the user"),
        ({"messages": [turn, {"role": "user", "content": "Where?"}]}, "an assistant's at the end"),
    ):
        with pytest.raises(ValueError, match=rf"b.jsonl:2: {problem}|b.jsonl:2: .*{problem}"):
            read_traces(write(tmp_path / "b.jsonl", [*good, bad]))
    with pytest.raises(ValueError, match="holds no traces"):
        read_traces(write(tmp_path / "c.jsonl", []))


def test_a_template_without_tools_is_replaced_and_another_is_kept():
    plain, own = tiny.make_tokenizer(PLAIN_CHATML), tiny.make_tokenizer()
    template = own.chat_template
    assert prepare_tokenizer(plain) and not prepare_tokenizer(own)
    assert plain.chat_template == template == own.chat_template
    assert plain.response_template == own.response_template is not None
    # Base models end a text, not a turn.
    base = tiny.make_tokenizer()
    base.eos_token = "<|endoftext|>"
    assert not prepare_tokenizer(base) and base.eos_token == "<|im_end|>"
    none = tiny.make_tokenizer(None)
    assert prepare_tokenizer(none) and none.chat_template == template
    other = tiny.make_tokenizer(PLAIN_CHATML.replace("<|im_start|>", "[S]").replace("<|im_end|>", "[E]"))
    kept, vocabulary = other.chat_template, other.get_vocab()
    other.get_vocab = lambda: {key: value for key, value in vocabulary.items() if key != "<|im_start|>"}
    with pytest.raises(ValueError, match=r"can call tools.* the marker <\|im_start\|> is not in the vocabulary"):
        prepare_tokenizer(other)
    assert other.chat_template == kept


OPTIONS = {"eval_questions": 2, "max_words": 40, "k": 1, "max_turns": 2, "lora_r": 4, "learning_rate": 1e-3}


def run(files, out, **options):
    options = {"data": files / "questions.jsonl", "index": files / "index"} | OPTIONS | options
    return warm_start(str(files / "model"), out, **options)


def test_a_run_saves_a_model_that_loads_and_reports_both_sides(files, tmp_path):
    report = run(files, tmp_path / "out", max_steps=2, save_adapter=True)
    assert report["complete"] and report["chat_template"] == "Qwen2.5's" and report["training"]["steps"] == 2
    for side in ("before", "after"):
        assert report[side]["questions"] == 2 and report[side]["first_calls"] == 0.0
        assert 0 < report[side]["belief_start"] < 1
    assert json.loads((tmp_path / "out/warm_start.json").read_text()) == report
    # No trace was made of a held-out question.
    held_out, traced = (
        {row["id"] for row in read(tmp_path / "out" / f"{name}.jsonl")} for name in ("held_out", "traces")
    )
    assert len(held_out) == 2 and traced and not held_out & traced

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template == tiny.make_tokenizer().chat_template
    start = AutoModelForCausalLM.from_pretrained(files / "model")
    merged = {name: weight.float() for name, weight in model.state_dict().items()}
    changed = {name for name, weight in start.state_dict().items() if not torch.allclose(weight, merged[name], 2e-2)}
    assert changed and all("proj" in name for name in changed)
    from peft import PeftModel

    apart = PeftModel.from_pretrained(start, tmp_path / "out/adapter").merge_and_unload().state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(apart[name], weight, rtol=1e-2, atol=1e-2)

    # It is complete: nothing is done again. Other settings are another run.
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert run(files, tmp_path / "out", max_steps=2, save_adapter=True) == report
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="max_steps was 2, is 3; save_adapter was True, is False"):
        run(files, tmp_path / "out", max_steps=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(FileExistsError, match="is not empty and is not a warm start"):
        run(files, tmp_path / "other")


def test_an_adapter_is_trained_further(files, tmp_path):
    from peft import PeftModel

    run(files, tmp_path / "first", max_steps=1, save_adapter=True, eval_questions=0)
    first = tmp_path / "first/adapter"
    options = {"data": files / "questions.jsonl", "index": files / "index"} | OPTIONS
    options |= {"max_steps": 2, "eval_questions": 0, "save_adapter": True}
    report = warm_start(str(first), tmp_path / "second", **options)
    assert report["training"]["steps"] == 2
    second = tmp_path / "second/adapter"
    # Still one adapter, of the same rank and on the same base, with other weights.
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (first, second)]
    assert configs[0]["base_model_name_or_path"] == configs[1]["base_model_name_or_path"] == str(files / "model")
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert {name: tensor.shape for name, tensor in old.items()} == {name: tensor.shape for name, tensor in new.items()}
    moved = {name: (new[name].float() - old[name].float()).abs().max() for name in old}
    assert max(moved.values()) > 0
    assert all(moved[name] < 0.3 * old[name].abs().max() for name in old if "lora_A" in name), "It did not start anew."
    # The model that is saved has it.
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    apart = PeftModel.from_pretrained(base, second).merge_and_unload().state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "second").state_dict().items():
        torch.testing.assert_close(apart[name], weight.float(), rtol=1e-2, atol=1e-2)


def test_an_interrupted_run_resumes_at_its_checkpoint(files, tmp_path, monkeypatch):
    steps, original = [], Clock.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        original(self, args, state, control, **kwargs)
        if state.global_step == 12 and 12 not in steps[:-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "on_step_end", interrupt)
    options = {"max_steps": 13, "epochs": 100, "eval_questions": 0, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path, **options)
    assert steps == [*range(1, 13)] and not (tmp_path / "model.safetensors").exists()
    report = run(files, tmp_path, **options)
    assert steps[12:] == [11, 12, 13] and report["training"]["steps"] == 13
    assert (tmp_path / "model.safetensors").exists() and "after" not in report


def test_the_loss_of_a_cpu_is_trls_without_the_tokens_that_have_no_label(files, tool, tmp_path):
    tokenizer = tiny.make_tokenizer()
    encoder = TraceEncoder(tokenizer, [tool])
    examples = [encoder.encode(record["messages"]) for record in make_traces(rows(files), tool, 2).records]
    trainer = WarmStartTrainer(
        model=tiny.make_model("qwen2", max_position_embeddings=4096),
        args=SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            max_length=None,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[Clock(None)],
    )
    (batch,) = trainer.get_train_dataloader()
    number = (batch["labels"] != IGNORE).sum()
    assert len({len(example["labels"]) for example in examples}) == 2  # one of them is padded
    own, gradients, heads = [], [], []
    trainer.model.lm_head.register_forward_hook(lambda head, inputs, output: heads.append(output.shape[1]))
    for compute in (trainer.compute_loss, super(WarmStartTrainer, trainer).compute_loss):
        loss = compute(trainer.model, dict(batch), num_items_in_batch=number)
        loss.backward()
        own.append(loss.item())
        gradients.append(trainer.model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        trainer.model.zero_grad()
    assert own[0] == pytest.approx(own[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert heads and heads[0] < batch["labels"].shape[1] / 2


def test_minutes_end_training_and_count_from_before():
    clock = Clock(1.0, spent=59.0)
    assert 0.98 < clock.progress < 1 and Clock(None, spent=1e9).progress == 0
    restored = Clock(**clock.state()["args"])
    assert restored.seconds >= 59.0


def test_minutes_bring_the_learning_rate_down(files, tmp_path, monkeypatch):
    """Whatever the number of epochs: here a second of the clock passes at every step."""
    ticks = SimpleNamespace(monotonic=iter(range(10_000)).__next__)
    monkeypatch.setattr("igpo_trl.warm_start.fitting.time", ticks)
    report = run(files, tmp_path, minutes=0.5, epochs=1000, eval_questions=0, batch_size=1)
    log = json.loads(next(tmp_path.glob("training/checkpoint-*/trainer_state.json")).read_text())["log_history"]
    rates = [entry["learning_rate"] / OPTIONS["learning_rate"] for entry in log if "learning_rate" in entry]
    assert 5 <= report["training"]["steps"] <= 30 and max(rates) > 0.5 and rates[-1] < 0.25, rates


def test_the_command_takes_own_traces_and_all_weights(files, tmp_path):
    records = make_traces(rows(files), SearchTool(BM25Index.load(files / "index"), k=1)).records
    write(tmp_path / "own.jsonl", [{"messages": record["messages"]} for record in records])
    words = ["warm-start", str(files / "model"), "--index", str(files / "index"), "--out", str(tmp_path / "out")]
    more = ["--traces-file", str(tmp_path / "own.jsonl"), "--full", "--max-steps", "1", "--batch-size", "2"]
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, result.output
    assert f"igpo train --config {tmp_path}/out/igpo.yaml" in result.output.replace("\n", "")
    assert not (tmp_path / "out/held_out.jsonl").exists()
    result = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "new")])
    assert result.exit_code == 1 and "give questions (`data`)" in result.output


def test_the_styles_of_the_queries_are_an_option(files, tmp_path):
    words = [str(files / "model"), "--data", str(files / "questions.jsonl"), "--index", str(files / "index")]
    words += ["--k", "1", "--lora-r", "4", "--max-steps", "1", "--eval-questions", "0", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["warm-start", *words, "--styles", "title", "--styles", "both"])
    assert result.exit_code == 0, result.output
    assert {record["style"] for record in read(tmp_path / "traces.jsonl")} == {"title", "both"}


def test_questions_of_another_corpus_give_an_error_that_says_so(files, tmp_path):
    random.seed(0)
    question = {"question": "Who?", "answers": ["Nobody"], "supporting_titles": ["Nothing"]}
    path = write(tmp_path / "q.jsonl", [question, question | {"question": "When?"}])
    with pytest.raises(ValueError, match="no question gave a trace: 0 traces .* Is this the index"):
        warm_start(str(files / "model"), tmp_path / "out", data=path, index=files / "index", eval_questions=0)


def test_mistakes_are_told_before_anything_is_written(files, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny.make_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    for model, problem in (
        (tmp_path / "nowhere", "no such directory: .*nowhere. Expected a model"),
        (tmp_path / "adapter", "is an adapter, which is trained further. Leave out `--full`"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=problem):
            warm_start(
                str(model), tmp_path / "out", data=files / "questions.jsonl", index=files / "index", lora_r=None
            )
    with pytest.raises(FileNotFoundError, match="no index in"):
        run(files, tmp_path / "out", index=tmp_path / "adapter")
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of `micro_batch_size`, got 4 and 3"):
        run(files, tmp_path / "out", micro_batch_size=3)
    with pytest.raises(ValueError, match="`styles` must be some of title, words, both, got long"):
        run(files, tmp_path / "out", styles=["title", "long"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a warm start runs in one process"):
        run(files, tmp_path / "out")
    assert not any((tmp_path / "out").glob("*"))


def test_the_options_of_the_run_are_a_configuration_of_training(files, tmp_path):
    from igpo_trl.cli.arguments import TrainParser

    run(files, tmp_path, max_steps=1, eval_questions=0)
    script, training, model = TrainParser().parse_args_and_config(
        ["--config", str(tmp_path / "igpo.yaml"), "--output_dir", str(tmp_path / "rl"), "--use_cpu", "true"]
    )
    assert (script.search_k, script.search_max_words, training.max_turns) == (1, 40, 2)
    assert script.questions == str(files / "questions.jsonl") and script.index == str(files / "index")
    assert training.answer_template == NO_THINK_TEMPLATE and model.model_name_or_path == str(tmp_path)
    assert Path(model.model_name_or_path, "model.safetensors").is_file()
