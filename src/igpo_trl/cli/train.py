"""
Trains a search agent with IGPO: a language model that searches a corpus of passages and answers questions.

Every argument of the configuration file can be overridden on the command line, as in `--learning_rate 1e-6`.
"""

import hashlib
import json
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..config import IGPOConfig
from ..data import check_questions, find_sources, hold_out, load_questions, resolve_system_prompt
from ..evaluation import check_retrieval
from ..files import cache_dir, looks_like_path
from ..search import BM25Index, Searchable, SearchTool, open_search
from ..trainer import IGPOTrainer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class ScriptArguments:
    """Arguments of `igpo train`, besides those of the trainer (`IGPOConfig`) and the model (TRL's `ModelConfig`)."""

    questions: str = field(
        metadata={
            "help": "Training questions: a file, or sets by name, such as `hotpotqa` or `nq,hotpotqa` (docs/data.md)."
        }
    )
    corpus: str | None = field(
        default=None, metadata={"help": "Passages to search, .jsonl or .jsonl.gz with `id`, `title` and `text`."}
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": "What to search: the directory of an index of any kind (`igpo index`), or the address of a search "
            "server (`igpo serve`). If the directory has no index yet, a BM25 index of `corpus` is built there. "
            "Defaults to a BM25 index of `corpus` in the cache ($IGPO_CACHE or ~/.cache/igpo_trl)."
        },
    )
    eval_questions: str | None = field(
        default=None,
        metadata={"help": "Evaluation questions, given in the same way. Defaults to some of `questions`, held out."},
    )
    num_eval_questions: int = field(
        default=100,
        metadata={"help": "Questions to evaluate on before and after training; 0 for no evaluation."},
    )
    system_prompt: str = field(
        default="think",
        metadata={"help": "`think`, `no_think`, `none`, a text file, or the text of a system prompt."},
    )
    search_k: int = field(default=3, metadata={"help": "Passages that one search returns."})
    search_max_words: int = field(default=200, metadata={"help": "Longest passage shown, in words."})
    search_many_queries: bool = field(
        default=False,
        metadata={"help": "Whether one search may have several queries, as in the IGPO authors' agent."},
    )
    method: str = field(
        default="igpo",
        metadata={
            "help": "`igpo`, or `grpo` for GRPO with the same arguments, rollouts and evaluation: IGPO's trainer with "
            "`info_gain_weight` 0, whose advantages are then exactly GRPO's."
        },
    )


def check_arguments(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Raises errors that would otherwise occur only after the model is loaded."""
    if not model.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: the name of a model on the hub, or a directory.")
    if looks_like_path(model.model_name_or_path) and not Path(model.model_name_or_path).is_dir():
        raise FileNotFoundError(
            f"no such model directory: {model.model_name_or_path}. To make a tiny model for a CPU, run: "
            "igpo tiny-model DIR --corpus FILE --questions FILE"
        )
    if script.corpus is None and script.index is None:
        raise ValueError("give `corpus` (passages) or `index` (an index of them, or a search server).")
    index = script.index or ""
    builds_index = not ("://" in index or Path(index, "manifest.json").is_file())  # otherwise the corpus is not read
    if script.corpus is not None and builds_index and not Path(script.corpus).is_file():
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
            f"{training.output_dir} has checkpoints of an earlier run. Add --resume_from_checkpoint true to resume "
            "it, or choose another --output_dir."
        )


def checkpoint_to_resume(training: IGPOConfig) -> str | None:
    """The directory named by `resume_from_checkpoint`; for `true` the last checkpoint, or `None` if there is none."""
    choice = str(training.resume_from_checkpoint or "false")
    if choice.lower() == "false":
        return None
    if choice.lower() == "true":
        return get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if not Path(choice).is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint`: no such directory: {choice}. Give one, or `true`.")
    return choice


def load_data(script: ScriptArguments) -> tuple["Dataset", "Dataset | None"]:
    """Loads the training and evaluation questions."""
    questions = load_questions(script.questions, script.system_prompt, split="train")
    if script.num_eval_questions == 0:
        return questions, None
    if script.eval_questions is None:
        return hold_out(questions, script.num_eval_questions)
    return questions, load_questions(script.eval_questions, script.system_prompt, limit=script.num_eval_questions)


def split_by_set(questions: "Dataset") -> "dict[str, Dataset] | Dataset":
    """Splits questions of several sets, so that each set gets its own scores; a single set is returned as is."""
    names = list(dict.fromkeys(questions["dataset"][:]))
    if len(names) == 1:
        return questions
    return {name: questions.filter(lambda own, name=name: own == name, input_columns="dataset") for name in names}


def open_or_build_index(script: ScriptArguments) -> Searchable:
    """Opens what to search. If there is no index yet, builds a BM25 index of the corpus first."""
    if script.index is not None and "://" in script.index:
        server = open_search(script.index)
        server.search("Is anybody there?", 1)  # raises an error before a model is loaded if the server is unusable
        return server
    if script.index is not None:
        directory = Path(script.index)
    else:
        corpus = Path(str(script.corpus)).resolve()
        stamp = f"{corpus}|{corpus.stat().st_size}|{corpus.stat().st_mtime_ns}"
        directory = cache_dir("bm25", hashlib.sha256(stamp.encode()).hexdigest()[:16])
    while True:
        try:
            return open_search(directory)
        except FileNotFoundError:
            # With a manifest the index exists, and it is its embedding model that is missing.
            if script.corpus is None or (directory / "manifest.json").exists():
                raise
        except ValueError:
            if script.index is not None:
                raise
        try:
            return BM25Index.build(str(script.corpus), directory=directory)
        except BlockingIOError:  # another run, or this run on another machine, is building it
            time.sleep(1)


def record_evaluation(trainer: IGPOTrainer, name: str) -> None:
    """Evaluates the trainer, prints the scores, and adds them under `name` to `evaluation.json`."""
    metrics = trainer.evaluate()
    sets = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    columns = {
        "f1": "f1",
        "exact_match": "exact_match",
        "reward": "reward",
        "searches": "tools/call_frequency",
        "tokens": "completions/mean_length",
    }

    def scores_under(prefix: str) -> dict[str, float]:
        return {key: metrics[f"{prefix}_{of}"] for key, of in columns.items() if f"{prefix}_{of}" in metrics}

    scores = {set_name: scores_under(f"eval_{set_name}") for set_name in sets} or {"": scores_under("eval")}
    mean = {key: sum(row[key] for row in scores.values()) / len(scores) for key in next(iter(scores.values()))}
    if trainer.accelerator.is_main_process:
        path = Path(trainer.args.output_dir) / "evaluation.json"
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[name] = mean | ({"sets": scores} if sets else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for set_name, of_set in (*scores.items(), *([("mean", mean)] if sets else [])):
        label = f"{name} training" + (f", {set_name}" if set_name else "")
        trainer.accelerator.print(f"{label}: " + ", ".join(f"{key} {value:.4f}" for key, value in of_set.items()))


def run_training(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Loads questions and index, then trains, evaluates and saves."""
    check_arguments(script, training, model)
    checkpoint = checkpoint_to_resume(training)
    train_dataset, eval_dataset = load_data(script)
    if PartialState().is_main_process:
        check_questions(train_dataset, eval_dataset)
    with PartialState().main_process_first():
        index = open_or_build_index(script)
    if PartialState().is_main_process:
        check_retrieval(index, train_dataset, script.search_k)

    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    if script.method == "grpo":  # without beliefs, `IGPOTrainer` trains with GRPO's own advantages
        training.info_gain_weight, training.info_gain_weight_end = 0.0, None
        training.normalization = "separate"
    trainer = IGPOTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=None if eval_dataset is None else split_by_set(eval_dataset),
        tools=[SearchTool(index, script.search_k, script.search_max_words, many_queries=script.search_many_queries)],
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.accelerator.print(
        f"{len(train_dataset)} questions to train on, {len(eval_dataset or [])} to evaluate on, "
        + (f"{len(index)} passages." if isinstance(index, Sized) else f"searching at {script.index}.")
    )
    if eval_dataset is not None and checkpoint is None:
        record_evaluation(trainer, "before")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if eval_dataset is not None:
        record_evaluation(trainer, "after")
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"Saved to {training.output_dir}.")
    trainer.accelerator.end_training()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with the arguments of a command line, such as `["--config", FILE]`; by default that of this process."""
    name = {} if arguments is None else {"prog": "igpo train"}
    parser = TrlParser((ScriptArguments, IGPOConfig, ModelConfig), description=__doc__, **name)
    run_training(*parser.parse_args_and_config(None if arguments is None else list(arguments)))
