"""`warm_start`: traces, training, and what changed on held-out questions."""

import gc
import json
import logging
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..beliefs.probes import DEFAULT_TEMPLATE, NO_THINK_TEMPLATE
from ..data import hold_out, load_questions, resolve_system_prompt
from ..data.questions import order_by_hash
from ..evaluation import EvaluationSettings, load_run, roll_out, score_run
from ..evaluation.run import differing_settings, write_json
from ..evaluation.scores import AVERAGE
from ..evaluation.settings import save_options
from ..files import check_writable, looks_like_path
from ..search import SearchTool, open_search
from ..training.adapters import check_adapter, find_adapter
from .encoding import TraceEncoder
from .fitting import computes_in_bfloat16, fit
from .templates import prepare_tokenizer
from .traces import STYLES, Traces, make_traces, read_traces

logger = logging.getLogger(__name__)

REPORT_FILE, TRACES_FILE, HELD_OUT_FILE = "warm_start.json", "traces.jsonl", "held_out.jsonl"


def warm_start(
    model: str,
    out: str | Path,
    *,
    index: str | Path,
    data: str | Path | Sequence[str | Path] | None = None,
    eval_data: str | Path | None = None,
    traces: int = 400,
    traces_file: str | Path | None = None,
    system_prompt: str | None = "no_think",
    thoughts: float | None = None,
    styles: Sequence[str] = STYLES,
    k: int = 2,
    max_words: int | None = 50,
    lora_r: int | None = 32,
    epochs: float = 3.0,
    max_steps: int | None = None,
    minutes: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    eval_questions: int = 60,
    eval_before: bool = True,
    max_turns: int = 6,
    save_adapter: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Teaches a model that does not search yet the form of it, and saves it in a directory that every command loads.

    It makes traces from questions ([`make_traces`]), trains on them with TRL's `SFTTrainer`, on the assistant's tokens
    only, and evaluates the model before and after on questions of which no trace was made. Where the model's chat
    template cannot call tools, it gets one that can. A run that was interrupted resumes when it is called again with
    the same arguments; one that is complete returns its report.

    Args:
        model (`str`): A model, or an adapter to train further, on the hub or in a directory.
        out (`str` or `Path`): Where to save everything.
        index (`str` or `Path`): What to search: the directory of an index, or the address of a search server.
        data (`str`, `Path` or sequence of these, *optional*): Questions, see [`load_questions`]. Supporting
            titles make better traces.
        eval_data (`str` or `Path`, *optional*): Questions to evaluate on. Defaults to some of `data`, which then give
            no traces ([`hold_out`]).
        traces (`int`, *optional*, defaults to `400`): How many traces to make.
        traces_file (`str` or `Path`, *optional*): Traces of your own instead, see [`read_traces`].
        system_prompt (`str`, *optional*, defaults to `"no_think"`): As in [`load_questions`].
        thoughts (`float`, *optional*), styles (sequence of `str`, *optional*, defaults to `STYLES`): See
            [`make_traces`].
        k (`int`, *optional*, defaults to `2`), max_words (`int`, *optional*, defaults to `50`):
            Passages per search, and words of each. Train with the same ones later.
        lora_r (`int`, *optional*, defaults to `32`): Rank of the adapter; `None` trains all weights. One that is
            trained further keeps its own.
        epochs (`float`, *optional*, defaults to `3.0`), max_steps (`int`, *optional*), minutes (`float`, *optional*):
            How long to train; whichever ends first.
        learning_rate (`float`, *optional*): Its peak. Defaults to 5e-4 for an adapter, 5e-5 for all weights.
        batch_size (`int`, *optional*, defaults to `4`): Traces per step.
        micro_batch_size (`int`, *optional*): Traces at a time. Defaults to 1 on a CPU, to 4 on a GPU.
        eval_questions (`int`, *optional*, defaults to `60`): How many questions to evaluate on; 0 for none.
        eval_before (`bool`, *optional*, defaults to `True`): Whether to evaluate the model before training too.
        max_turns (`int`, *optional*, defaults to `6`): Turns of a rollout in these evaluations.
        save_adapter (`bool`, *optional*, defaults to `False`): Also save the adapter apart, in `adapter/`.
        seed (`int`, *optional*, defaults to `0`): Seed of traces and training.

    Returns:
        `dict`, also in `warm_start.json`: `settings`, `traces`, `training`, `before` and `after`. The last two hold
        `first_calls` (the share of first turns with a readable call), `f1`, `em`, `answered`, `searches`,
        `in_evidence`, `belief_start` and `belief_end`.

    Raises:
        FileExistsError: `out` has other files, or a run with other arguments.
        FileNotFoundError, ValueError: A file does not exist or is malformed, or no question gave a trace.
    """
    settings = json.loads(json.dumps({key: value for key, value in locals().items() if key != "out"}, default=str))
    out = Path(out)
    report = _open(out, settings)
    if "complete" in report:
        logger.info("%s is complete: nothing is left to do.", out)
        return report
    _check(settings)
    adapter = find_adapter(model)
    base, tokenizer_name = (model, model) if adapter is None else check_adapter(adapter, None)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    report["chat_template"] = "Qwen2.5's" if prepare_tokenizer(tokenizer) else "its own"
    prompt = resolve_system_prompt(system_prompt)
    questions, held_out = _questions(data, eval_data, eval_questions, prompt)
    tool = SearchTool(open_search(index), k=k, max_words=max_words)
    if traces_file is not None:
        made = read_traces(traces_file)
    else:
        made = _make_traces(questions, tool, traces, thoughts=thoughts, styles=styles, seed=seed)
    check_writable(out, "the model's directory")
    write_json(out / REPORT_FILE, report)
    made.save(out / TRACES_FILE)
    tokenizer.save_pretrained(out)
    report["traces"] = made.summary
    logger.info("%s.", made.summary)
    thinks = _mean("<think>" in str(record["messages"][-1]["content"]) for record in made.records) > 0.5
    options = _rollout_options(prompt, k, max_words, max_turns, thinks)
    sources = {"questions": data, "eval_questions": eval_data, "index": index}
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in sources.items()
        if value is not None
    }
    save_options(out, **texts, **options)

    if held_out is not None:
        _write_questions(out / HELD_OUT_FILE, held_out)
        if eval_before:
            logger.info("Evaluating on %d questions before training.", len(held_out))
            report["before"] = _evaluate(model, out, "before", index, options, seed, tokenizer=str(out))
    if "training" not in report:
        encoder = TraceEncoder(tokenizer, [tool])
        examples = [encoder.encode(record["messages"]) for record in made.records]
        mean = _mean(len(example["labels"]) for example in examples)
        limit = "" if minutes is None else f", for at most {minutes:g} minutes"
        logger.info("Training on %d traces of %d tokens%s.", len(examples), mean, limit)
        trained, training = fit(
            base,
            tokenizer,
            examples,
            out / "training",
            adapter=adapter,
            lora_r=lora_r,
            epochs=epochs,
            max_steps=max_steps,
            minutes=minutes,
            learning_rate=learning_rate or (5e-4 if lora_r else 5e-5),
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
        )
        if lora_r:
            if save_adapter:
                _save_adapter(trained, out / "adapter")
                tokenizer.save_pretrained(out / "adapter")
            trained = trained.float().merge_and_unload()
        trained.to(torch.bfloat16).save_pretrained(out)
        del trained
        report["training"] = training
        write_json(out / REPORT_FILE, report)
    if held_out is not None:
        logger.info("Evaluating on %d questions after training.", len(held_out))
        report["after"] = _evaluate(str(out), out, "after", index, options, seed)
    report["complete"] = True
    write_json(out / REPORT_FILE, report)
    return report


def _open(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of a run that is resumed, or a new one."""
    file = out / REPORT_FILE
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} is not empty and is not a warm start. Choose another directory.")
        return {"settings": settings}
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if changes := differing_settings(report["settings"], settings):
        told = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changes.items())
        raise FileExistsError(
            f"{out} holds a warm start with other settings ({told}). Resume it with the same settings, or choose "
            "another directory."
        )
    return report


def _check(settings: dict[str, Any]) -> None:
    """Raises errors that would otherwise occur late, or not be understood."""
    model, batch, micro = (settings[name] for name in ("model", "batch_size", "micro_batch_size"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a warm start runs in one process, got several. Start it without a launcher.")
    if settings["data"] is None and settings["traces_file"] is None:
        raise ValueError("give questions (`data`) to make traces from, or traces of your own (`traces_file`).")
    if micro is not None and batch % micro:
        raise ValueError(f"`batch_size` must be a multiple of `micro_batch_size`, got {batch} and {micro}.")
    if unknown := set(settings["styles"]) - set(STYLES):
        raise ValueError(f"`styles` must be some of {', '.join(STYLES)}, got {', '.join(sorted(unknown))}.")
    if looks_like_path(model) and not Path(model).is_dir():
        raise FileNotFoundError(f"no such directory: {model}. Expected a model, or its name on the hub.")
    if settings["lora_r"] is None and find_adapter(model) is not None:
        raise ValueError(
            f"{model} is an adapter, which is trained further. Leave out `--full`, which trains all weights."
        )


def _questions(
    data: str | Path | Sequence[str | Path] | None, eval_data: str | Path | None, number: int, prompt: str | None
) -> tuple[Any, Any]:
    """Questions for traces, and held-out ones; `None` where there are none."""
    questions = None if data is None else load_questions(data, prompt, split="train")
    if not number or (questions is None and eval_data is None):
        return questions, None
    if eval_data is None:
        assert questions is not None
        return hold_out(questions, min(number, len(questions) // 2))
    others = load_questions(eval_data, prompt)
    return questions, others.select(order_by_hash(others["id"][:])[:number])


def _make_traces(questions: Any, tool: Any, number: int, *, seed: int, **options: Any) -> Traces:
    rows = questions.to_list()
    random.Random(seed).shuffle(rows)
    made = make_traces(rows, tool, number, seed=seed, **options)
    if not made.records:
        raise ValueError(f"no question gave a trace: {made.summary}. Is this the index of these questions?")
    if len(made.records) < number:
        logger.warning("%d traces were asked for, and the questions gave %d.", number, len(made.records))
    return made


def _save_adapter(model: Any, folder: Path) -> None:
    """In bfloat16, which halves it."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(folder)


def _rollout_options(
    prompt: str | None, k: int, max_words: int | None, max_turns: int, thinks: bool
) -> dict[str, Any]:
    """Options of a rollout in the form of the traces, by their names in `igpo train`."""
    turn = 192 if thinks else 96
    observation = k * (2 * (max_words or 200) + 24) + 24  # a word is up to two tokens
    length = max_turns * (turn + observation)
    return {
        "system_prompt": prompt or "none",
        "search_k": k,
        "search_max_words": max_words,
        "answer_template": DEFAULT_TEMPLATE if thinks else NO_THINK_TEMPLATE,
        "max_turns": max_turns,
        "max_turn_length": turn,
        "max_completion_length": -(-length // 256) * 256,
    }


def _write_questions(path: Path, questions: Any) -> None:
    columns = ("answers", "dataset", "id", "hops", "supporting_titles")
    rows = ({"question": row["prompt"][-1]["content"]} | {name: row[name] for name in columns} for row in questions)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _evaluate(
    model: str, out: Path, name: str, index: str | Path, options: dict[str, Any], seed: int, **more: Any
) -> dict[str, float | None]:
    """Greedy rollouts on the held-out questions, and their scores."""
    named = {"system_prompt": options["system_prompt"], "k": options["search_k"]}
    settings = EvaluationSettings(
        model=model,
        sources=[str(out / HELD_OUT_FILE)],
        indexes=[str(index)],
        max_words=options["search_max_words"],
        seed=seed,
        dtype="bfloat16" if computes_in_bfloat16() else "float32",
        rollout={key: value for key, value in options.items() if key.startswith(("max_", "answer_"))},
        **named,
        **more,
    )
    folder = out / "evaluation" / name
    roll_out(settings, folder)
    gc.collect()  # the trainer and its model, which refer to each other
    rollouts = load_run(folder)
    metrics = score_run(rollouts).sets[AVERAGE].metrics
    shown = ("f1", "em", "answered", "searches", "in_evidence", "belief_start", "belief_end")
    first = sum(bool(rollout.info["first_call"]) for rollout in rollouts) / len(rollouts)
    scores = {key: metrics[key].mean if key in metrics else None for key in shown}
    return {"questions": len(rollouts), "first_calls": first, **scores}


def _mean(values: Iterable[int]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
