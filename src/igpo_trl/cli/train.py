"""
Trains a search agent with IGPO: a language model that searches a corpus of passages and answers questions.

Every argument of the configuration file can be overridden on the command line, as in `--learning_rate 1e-6`.
"""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..checkpoints import checkpoint_to_resume
from ..config import IGPOConfig
from ..data import check_questions, hold_out, load_questions
from ..evaluation import check_answerable, check_retrieval
from ..evaluation.doctor import DoctorCallback
from ..evaluation.settings import save_options
from ..search import Searchable, SearchTool, open_search
from ..tools import make_stop_tools
from ..trainer import IGPOTrainer
from ..training.console import MetricsFile, StepLines
from ..training.hub import check_can_push, how_to_push
from .arguments import ScriptArguments as ScriptArguments
from .arguments import TrainParser, UsageError
from .checks import check_arguments, check_best_metric, is_finished
from .errors import debugging, fail, keep_trace, one_line_errors
from .estimate import print_estimate, take_estimate
from .interrupts import say_how_to_resume
from .search import index_of_corpus

if TYPE_CHECKING:
    from datasets import Dataset


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
    """Opens what to search. Without `index`, that is a BM25 index of the corpus in the cache, built if need be."""
    if script.index is not None:
        index = open_search(script.index)
        if "://" in script.index:
            index.search("Is anybody there?", 1)  # raises an error before a model is loaded if the server is unusable
        return index
    return index_of_corpus(str(script.corpus))


def audit_command(script: ScriptArguments) -> str:
    """The command that finds the training questions that the corpus cannot answer."""
    place = ["--index", script.index] if script.index is not None else ["--corpus", str(script.corpus)]
    words = ["igpo", "data", "audit", script.questions, "--split", "train", *place]
    return shlex.join([*words, "--keep", "answerable", "answerable.jsonl.gz"])


def record_evaluation(trainer: IGPOTrainer, name: str) -> dict[str, float]:
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
    return metrics


def run_training(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Loads questions and index, then trains, evaluates and saves."""
    check_arguments(script, training, model)
    checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training)
    if checkpoint is not None and is_complete(script, training):
        if PartialState().is_main_process:
            print(
                f"{training.output_dir} is done: {Path(checkpoint).name} is its last, the model is saved. To train "
                "longer, raise `max_steps` or `num_train_epochs`."
                + (f" If it has not been pushed: {how_to_push(training)}" if training.push_to_hub else "")
            )
        return
    repository = check_can_push(training) or training.hub_model_id
    train_dataset, eval_dataset = load_data(script)
    if PartialState().is_main_process:
        check_questions(train_dataset, eval_dataset)
    with PartialState().main_process_first():
        index = open_or_build_index(script)
    if PartialState().is_main_process:
        check_retrieval(index, train_dataset, script.search_k)
        check_answerable(index, train_dataset, command=audit_command(script))

    if PartialState().is_main_process:
        name = {"model_name_or_path": repository} if repository else {}  # for whoever pulls it
        save_options(str(training.output_dir), script, training, model, **name)
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
        tools=[
            SearchTool(index, script.search_k, script.search_max_words, many_queries=script.search_many_queries),
            *make_stop_tools(training.stop_tools),
        ],
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.data_sources = {"Questions": script.questions, "Searched": script.index or script.corpus or ""}
    trainer.accelerator.print(
        f"{len(train_dataset)} questions to train on, {len(eval_dataset or [])} to evaluate on, "
        + (f"{len(index)} passages." if isinstance(index, Sized) else f"searching at {script.index}.")
    )
    if script.doctor_every:
        trainer.add_callback(DoctorCallback(trainer, script.doctor_every))
    keep_tensorboard_folder(trainer, resumes=checkpoint is not None)
    trainer.add_callback(MetricsFile())
    trainer.add_callback(StepLines(trainer))
    if eval_dataset is not None and checkpoint is None and trainer.is_deepspeed_enabled:
        trainer.add_callback(EvaluateFirst(trainer))
    elif eval_dataset is not None and checkpoint is None:
        with keep_trace():
            metrics = record_evaluation(trainer, "before")
        check_best_metric(training, metrics)
    with keep_trace(when=lambda: trainer.optimizer is not None):  # without one, training has not begun
        trainer.train(resume_from_checkpoint=checkpoint)
    with keep_trace():
        trainer.save_model()
        trainer.save_state()
        if eval_dataset is not None:
            record_evaluation(trainer, "after")
            trainer.create_model_card()  # with these scores
    if training.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.print(f"Saved to {training.output_dir}.")
    trainer.accelerator.end_training()


class EvaluateFirst(TrainerCallback):
    """Evaluates once training has set up the model: DeepSpeed cannot train what it has evaluated before."""

    def __init__(self, trainer: IGPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record_evaluation(self.trainer, "before")


def is_complete(script: ScriptArguments, training: IGPOConfig) -> bool:
    """Whether a run has been trained, saved and evaluated."""
    evaluation = Path(str(training.output_dir), "evaluation.json")
    evaluated = script.num_eval_questions == 0 or (
        evaluation.is_file() and "after" in json.loads(evaluation.read_text(encoding="utf-8"))
    )
    return evaluated and is_finished(str(training.output_dir), training)  # the state is saved after the model


def keep_tensorboard_folder(trainer: IGPOTrainer, resumes: bool) -> None:
    """Makes a run that resumes write where it wrote before."""
    folders = Path(str(trainer.args.output_dir), "runs").glob("*")
    earlier = sorted(folders, key=lambda path: path.stat().st_mtime) if resumes else []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and earlier:
            callback.logging_dir = str(earlier[-1])


@contextmanager
def log_lines() -> Iterator[None]:
    """
    Prints what the package logs: notes by the main process, warnings by all.

    What other packages say of each other's future versions is left out.
    """
    handler, log = logging.StreamHandler(), logging.getLogger("igpo_trl")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains with the arguments of a command line, such as `["--config", FILE]`; by default that of this process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = TrainParser(prog="igpo train" if arguments is not None else Path(sys.argv[0]).name)
    if not {"-h", "--help", "--help-all"}.isdisjoint(words):
        print(parser.format_help(everything="--help-all" in words), end="")
        return
    # With a value, `--debug` is an option of transformers.
    flags = [i for i, word in enumerate(words) if word == "--debug" and "".join(words[i + 1 : i + 2])[:1] in ("", "-")]
    debug, options = bool(flags), [word for i, word in enumerate(words) if i not in flags]
    with debugging(debug), one_line_errors(also=(RuntimeError, TypeError)), log_lines():
        try:
            wanted, options = take_estimate(options)
            parsed = parser.parse_args_and_config(options)
        except UsageError as error:
            if debug:
                raise
            fail(error, status=2)
        if wanted is not None:
            print_estimate(wanted, *parsed[1:])
            return
        with say_how_to_resume(words, parsed[1]):
            run_training(*parsed)
