"""What a model card says: what a run was made of, and what came out."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments
from transformers.utils import get_json_schema

from ...files import looks_like_path
from ..metric_table import describe
from .base_model import Origin, origin_of
from .pictures import is_number
from .scores import evaluation_of
from .snippet import make_snippet

_METRICS = (
    "reward", "belief/prompt", "belief/final", "info_gain/mean", "tools/call_frequency", "rollout/turns/mean",
    "collapse/outcome", "collapse/advantage", "kl", "entropy",
)  # fmt: skip
# Options that every card gives, and those of transformers that it gives if they are not the defaults.
_CORE = (
    "normalization", "info_gain", "info_gain_weight", "gamma", "answer_template", "learning_rate", "max_steps",
    "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length",
    "max_turns", "max_turn_length", "temperature", "beta", "loss_type", "seed",
)  # fmt: skip
_ALSO = ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "bf16", "optim")
# What is derived from other options, what only this machine needs, and what only logs.
_HIDDEN = re.compile(r"vllm_.*|log_.*|.*_path|.*_kwargs|.*print.*|.*generation_batch.*|steps_per_.*|use_vllm|save_.*")
_TRL_CITATION = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and others},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


def make_card(trainer: Any, folder: Path, model_name: str, pictures: Mapping[str, str] | None = None) -> ModelCard:
    """
    The card of a run.

    Args:
        trainer ([`IGPOTrainer`]): the run.
        folder (`Path`): where the card will be. Trackers' links and tags are kept of the card that TRL has left there.
        model_name (`str`): the card's title.
        pictures (`dict[str, str]`, *optional*): what each picture in the folder shows, by its file.
    """
    data, badges = _of_trl(folder / "README.md", trainer)
    data.model_name = model_name
    if hasattr(trainer.model, "peft_config"):  # TRL says transformers, whose code the hub would then show
        data.library_name = "peft"
    origin = origin_of(getattr(trainer.model.config, "_name_or_path", "") or "")
    data.base_model = origin.hub
    repository = trainer.hub_model_id or trainer.args.hub_model_id or folder.absolute().name
    sections = {
        "Use": make_snippet(trainer, folder, repository),
        "Tools": _tools(trainer.tools or ()),
        "Data": _data(trainer),
        "Training": _training(trainer, badges),
        "What changed": _changes(trainer.state.log_history, pictures or {}),
        "Evaluation": evaluation_of(trainer, folder),
        "Versions": ", ".join(_versions()) + ".",
        "Citation": f"```bibtex\n{trainer._paper['citation']}\n```\n\n```bibtex\n{_TRL_CITATION}\n```",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {model_name}\n\n{_about(trainer, origin)}\n\n{body}\n")


def _of_trl(file: Path, trainer: Any) -> tuple[ModelCardData, list[str]]:
    """Metadata and trackers' badges of the card that TRL, or PEFT, has written."""
    tags = ["generated_from_trainer", *trainer._tag_names]
    try:
        card = ModelCard.load(file, ignore_metadata_errors=True)
        values = card.data.to_dict()
        values.pop("licence", None)  # which TRL's template says without naming one
        data = ModelCardData(ignore_metadata_errors=True, **values)
        own = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]  # with paths, from PEFT
        data.tags = [*dict.fromkeys([*tags, *own])]
        badges = re.findall(r"^\[<img .*\)", card.text, re.MULTILINE)
    except (OSError, ValueError):
        data, badges = ModelCardData(library_name="transformers", tags=tags), []
    return data, badges


def _about(trainer: Any, origin: Origin) -> str:
    base = f"[{origin.hub}](https://huggingface.co/{origin.hub})" if origin.hub else f"`{origin.label}`"
    paper = trainer._paper
    text = (
        f"A language model that calls tools over several turns and then answers, made from {base}. It was trained "
        f"with IGPO, a method introduced in [{paper['title']}](https://huggingface.co/papers/{paper['id']})"
    )
    if trainer.args.uses_beliefs:
        return f"{text}: each turn is rewarded by how much it raised the model's own belief in the right answer."
    return f"{text}, here without its reward of turns (`info_gain_weight` 0): only the outcome was rewarded."


def _tools(tools: Iterable[Any]) -> str:
    lines = []
    for tool in tools:
        try:
            schema = get_json_schema(tool)["function"]
            name, about = schema["name"], schema["description"]
            arguments = ", ".join(schema["parameters"].get("properties", {}))
        except Exception:  # a tool may be described by its environment alone
            name, about, arguments = getattr(tool, "__name__", str(tool)), (tool.__doc__ or "").strip(), "…"
        lines.append(f"- `{name}({arguments})`: {' '.join(about.split())}")
    return "\n".join(lines)


def _data(trainer: Any) -> str:
    sources = {name: _public(value) for name, value in trainer.data_sources.items() if value}
    sets = {"Training": trainer.train_dataset}
    evaluation = trainer.eval_dataset
    sets |= evaluation if isinstance(evaluation, dict) else {"Evaluation": evaluation}
    for name, dataset in sets.items():
        if dataset is None or not hasattr(dataset, "__len__"):
            continue
        names = dataset.unique("dataset") if "dataset" in (dataset.column_names or ()) else []
        of = ", ".join(sorted(_public(str(each)) for each in names)) if len(names) <= 20 else f"{len(names)} sets"
        sources[name] = f"{len(dataset):,} questions" + (f" of {of}" if of else "")
    return "\n".join(f"- {name}: {value}" for name, value in sources.items())


def _public(value: str) -> str:
    """A source without the folders of this machine, and without the address of a server."""
    parts = []
    for part in map(str.strip, value.split(",")):
        path = looks_like_path(part) or Path(part).exists()
        parts.append("a search server" if "://" in part else Path(part).name if path else part)
    return ", ".join(parts)


def _training(trainer: Any, badges: Sequence[str]) -> str:
    rows = [f"| `{name}` | {_cell(value)} |" for name, value in settings_of(trainer.args).items()]
    state = trainer.state
    number = trainer.args.world_size
    head = f"{state.global_step} steps" + (f" on {number} processes" if number > 1 else "")
    adapter = next(iter(getattr(trainer.model, "peft_config", {}).values()), None)
    if adapter is not None:
        head += f", adapter {adapter.peft_type.value} of rank {getattr(adapter, 'r', '?')}"
    table = "| setting | value |\n|---|---|\n" + "\n".join(rows)
    return "\n\n".join([f"{head}. Settings that are not listed have their defaults.", table, *badges])


def settings_of(args: Any) -> dict[str, Any]:
    """The options that define the method and the rollout: those that every card gives, others if not the defaults."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)} - {*_ALSO}
    settings = {name: getattr(args, name) for name in _CORE if name in fields}
    for name, field in fields.items():
        if name in settings or name in inherited or _HIDDEN.fullmatch(name):
            continue
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if (value := getattr(args, name)) != default and value is not None:
            settings[name] = value
    return settings


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = " ".join(getattr(value, "value", text).split()) if isinstance(value, str) else text
    text = Path(text).name if isinstance(value, str) and text.startswith(("/", "~")) else text
    return "`" + text[:200].replace("|", "\\|").replace("`", "'") + "`" if text else "–"


def _changes(logs: Sequence[Mapping[str, Any]], pictures: Mapping[str, str]) -> str:
    rows = []
    for name in _METRICS:
        values = [log[name] for log in logs if is_number(log.get(name))]
        if values:
            size = math.ceil(len(values) / 10)
            first, last = sum(values[:size]) / size, sum(values[-size:]) / size
            entry = describe(name)
            meaning = "" if entry is None else re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", entry.meaning).split(": ")[0]
            rows.append(f"| `{name}` | {first:.3g} | {last:.3g} | {meaning} |")
    if not rows:
        return ""
    head = "Means over the first and the last tenth of what was logged, on the training questions.\n\n"
    table = "| metric | first | last | what it is |\n|---|---:|---:|---|\n" + "\n".join(rows)
    return head + "\n\n".join([table, *(f"![{text}]({file})" for file, text in pictures.items())])


def _versions() -> Iterable[str]:
    names = ("igpo-trl", "trl", "transformers", "torch", "datasets", "tokenizers", "peft")
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
