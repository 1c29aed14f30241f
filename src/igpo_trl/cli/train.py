"""
Train a search agent with IGPO: a language model that searches a corpus of passages and answers questions.

Every argument of the configuration file can be overridden on the command line, as in `--learning_rate 1e-6`.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..config import IGPOConfig
from ..data import check_questions, find_sources, hold_out, load_questions, resolve_system_prompt
from ..rewards import exact_match, extract_answer, make_answer_reward
from ..search import BM25Index, Searchable, SearchTool, open_search
from ..trainer import IGPOTrainer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class ScriptArguments:
    """Arguments of `igpo train`; those of the trainer are `IGPOConfig`'s, those of the model TRL's `ModelConfig`'s."""

    questions: str = field(
        metadata={
            "help": "Training questions: a file, or sets by name, as `hotpotqa` or `nq,hotpotqa` (docs/data.md)."
        }
    )
    corpus: str | None = field(
        default=None, metadata={"help": "Passages to search, .jsonl or .jsonl.gz with `id`, `title` and `text`."}
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "What to search: the directory of an index of any kind (`igpo index`), or the address of a search "
            "server (`igpo serve`). A BM25 index of `corpus` is built in a directory that has none yet. By default "
            "the BM25 index of `corpus` is kept in a cache ($IGPO_CACHE, or else ~/.cache/igpo_trl)."
        },
    )
    eval_questions: str | None = field(
        default=None,
        metadata={"help": "Questions to evaluate on, likewise. By default some of `questions` are held out."},
    )
    num_eval_questions: int = field(
        default=100,
        metadata={"help": "Questions to evaluate on before and after training; 0 for no evaluation at all."},
    )
    system_prompt: str = field(
        default="think",
        metadata={"help": "`think`, `no_think`, `none`, a text file, or the text of a system prompt."},
    )
    search_k: int = field(default=3, metadata={"help": "Passages that one search returns."})
    search_max_words: int = field(default=200, metadata={"help": "Longest passage shown, in words."})
    search_many_queries: bool = field(
        default=False,
        metadata={"help": "Whether one search may carry several queries, as in the IGPO authors' agent."},
    )
    method: str = field(default="igpo", metadata={"help": "`igpo`, or `grpo` for plain GRPO with the same arguments."})


def check_arguments(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Errors that would otherwise come late."""
    if not model.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: the name of a model on the hub, or a directory.")
    name = model.model_name_or_path
    looks_like_path = name.startswith((".", "/", "~", "outputs/")) or name.count("/") > 1  # else a name on the hub
    if looks_like_path and not Path(model.model_name_or_path).is_dir():
        raise FileNotFoundError(
            f"no such model directory: {model.model_name_or_path}. A tiny model for a CPU is made by: "
            "igpo tiny-model DIR --corpus FILE --questions FILE"
        )
    if script.corpus is None and script.index is None:
        raise ValueError("give `corpus` (passages) or `index` (an index of them, or a search server).")
    if script.corpus is not None and not Path(script.corpus).is_file():
        raise FileNotFoundError(f"`corpus`: no such file: {script.corpus}")
    for name in ("questions", "eval_questions"):
        if (source := getattr(script, name)) is not None:
            try:
                find_sources(source)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"`{name}`: {error}") from error
    resolve_system_prompt(script.system_prompt)
    if script.method not in ("igpo", "grpo"):
        raise ValueError(f"`method` must be igpo or grpo, got {script.method!r}.")
    if script.num_eval_questions < 0:
        raise ValueError(f"`num_eval_questions` must not be negative, got {script.num_eval_questions}.")
    for name in ("search_k", "search_max_words"):
        if getattr(script, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(script, name)}.")
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if last is not None and training.resume_from_checkpoint is None:
        raise FileExistsError(
            f"{training.output_dir} holds checkpoints of an earlier run. Add --resume_from_checkpoint true to go on "
            "with it, or choose another --output_dir."
        )


def checkpoint_to_resume(training: IGPOConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means: `true` is the last one, or a fresh start without one."""
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() == "true":
        return get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if not Path(wanted).is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint`: no such directory: {wanted}. Give one, or `true`.")
    return wanted


def load_data(script: ScriptArguments) -> tuple["Dataset", "Dataset | None"]:
    """Training and evaluation questions."""
    questions = load_questions(script.questions, script.system_prompt, split="train")
    if script.num_eval_questions == 0:
        return questions, None
    if script.eval_questions is None:
        return hold_out(questions, script.num_eval_questions)
    return questions, load_questions(script.eval_questions, script.system_prompt, limit=script.num_eval_questions)


def by_set(questions: "Dataset") -> "dict[str, Dataset] | Dataset":
    """Questions of several sets as one data set for each, so that each has scores of its own."""
    names = list(dict.fromkeys(questions["dataset"][:]))
    if len(names) == 1:
        return questions
    return {name: questions.filter(lambda of, name=name: of == name, input_columns="dataset") for name in names}


def load_index(script: ScriptArguments) -> Searchable:
    """What to search; a BM25 index is built first where there is none yet."""
    if script.index is not None and "://" in script.index:
        server = open_search(script.index)
        server.search("Is anybody there?", 1)  # or an error that says what is wrong, before a model is loaded
        return server
    if script.index is not None:
        directory = Path(script.index)
    else:
        corpus = Path(str(script.corpus)).resolve()
        stamp = f"{corpus}|{corpus.stat().st_size}|{corpus.stat().st_mtime_ns}"
        cache = Path(os.environ.get("IGPO_CACHE") or Path.home() / ".cache" / "igpo_trl")
        directory = cache / "bm25" / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    while True:
        try:
            return open_search(directory)
        except FileNotFoundError:
            if script.corpus is None or (directory / "manifest.json").exists():  # it is there, but its model is not
                raise
        except ValueError:
            if script.index is not None:
                raise
        try:
            return BM25Index.build(str(script.corpus), directory=directory)
        except BlockingIOError:  # another run, or a process of this one on another machine
            time.sleep(1)


def exact_match_reward(completions: list[Any], answers: list[list[str]], **_: Any) -> list[float]:
    """Exact match of the answer in the last assistant turn."""
    last = [completion[-1] for completion in completions]
    texts = [m.get("content") or "" if m["role"] == "assistant" and not m.get("tool_calls") else "" for m in last]
    return [exact_match(extract_answer(text), truth) for text, truth in zip(texts, answers, strict=True)]


def evaluate(trainer: GRPOTrainer, name: str) -> None:
    """Rolls out on the evaluation questions, and adds the scores to `evaluation.json` under a name."""
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    columns = {
        "f1": "eval_rewards/f1/mean",
        "exact_match": "eval_rewards/exact_match/mean",
        "reward": "eval_reward",
        "searches": "eval_tools/call_frequency",
        "tokens": "eval_completions/mean_length",
    }
    scores: dict[str, dict[str, float]] = {}
    for set_name, questions in sets.items():
        trainer.evaluate(questions)
        # What TRL's trainer returns lacks the metrics of the rollouts; what it has logged has them.
        logged = next(row for row in reversed(trainer.state.log_history) if "eval_reward" in row)
        scores[set_name] = {key: logged[column] for key, column in columns.items() if column in logged}
    mean = {key: sum(of[key] for of in scores.values()) / len(sets) for key in next(iter(scores.values()))}
    if trainer.accelerator.is_main_process:
        path = Path(trainer.args.output_dir) / "evaluation.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[name] = mean | ({"sets": scores} if len(sets) > 1 else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for set_name, of_set in (*scores.items(), *([("mean", mean)] if len(sets) > 1 else [])):
        label = f"{name} training" + (f", {set_name}" if set_name else "")
        trainer.accelerator.print(f"{label}: " + ", ".join(f"{key} {value:.4f}" for key, value in of_set.items()))


def train(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Loads, trains, evaluates, saves."""
    check_arguments(script, training, model)
    checkpoint = checkpoint_to_resume(training)
    train_dataset, eval_dataset = load_data(script)
    if PartialState().is_main_process:
        check_questions(train_dataset, eval_dataset)
    with PartialState().main_process_first():
        index = load_index(script)

    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    # F1 is learned from; F1 without the penalty and exact match are only measured.
    f1 = make_answer_reward(training.answer_column, format_penalty=0.0)
    f1.__name__ = "f1"
    exact_match_reward.__name__ = "exact_match"
    rewards = [make_answer_reward(training.answer_column, training.format_penalty), f1, exact_match_reward]
    training.reward_weights = [1.0, 0.0, 0.0]
    trainer_class = IGPOTrainer if script.method == "igpo" else GRPOTrainer
    trainer = trainer_class(
        model=model.model_name_or_path,
        reward_funcs=rewards,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=None if eval_dataset is None else by_set(eval_dataset),
        tools=[SearchTool(index, script.search_k, script.search_max_words, many_queries=script.search_many_queries)],
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.accelerator.print(
        f"{len(train_dataset)} questions to train on, {len(eval_dataset or [])} to evaluate on, "
        + (f"{len(index)} passages." if isinstance(index, Sized) else f"searching at {script.index}.")
    )
    if eval_dataset is not None and checkpoint is None:
        evaluate(trainer, "before")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if eval_dataset is not None:
        evaluate(trainer, "after")
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"Saved to {training.output_dir}.")
    trainer.accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Trains as the command line says.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Words of the command line, `--config FILE` first among them; by default those of this process.
    """
    name = {} if arguments is None else {"prog": "igpo train"}
    parser = TrlParser((ScriptArguments, IGPOConfig, ModelConfig), description=__doc__, **name)
    train(*parser.parse_args_and_config(None if arguments is None else list(arguments)))
