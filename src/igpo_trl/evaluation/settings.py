"""What an evaluation runs: the model, the questions, what they are searched in, and the limits of a rollout."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..data import load_questions, resolve_system_prompt
from ..data.questions import order_by_hash
from ..files import looks_like_path
from ..rewards import Variant
from ..tools import make_stop_tools
from ..training.adapters import base_of_adapter, file_on_hub, find_adapter

Row = dict[str, Any]

#: Beside a trained model: the options of its training that define a rollout, as in a configuration of `igpo train`.
OPTIONS_FILE = "igpo.yaml"

# Fields of `IGPOConfig` that define a rollout, or how it is made.
_ROLLOUT_FIELDS = {
    *("max_turns", "max_turn_length", "max_completion_length", "max_tool_calling_iterations"),
    *("max_tool_response_tokens", "forced_answer", "forced_answer_prompt", "forced_answer_length"),
    *("on_malformed_tool_call", "stop_tools", "max_concurrent_tool_calls", "tool_timeout", "reuse_prefixes"),
    *("chat_template_kwargs", "generation_kwargs", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("answer_template", "alias_reduction", "max_answer_tokens", "belief_method", "belief_tokens_per_batch"),
}
# Options of train.py, and the settings of an evaluation that they set.
_TRAINING_OPTIONS = {
    **{f"search_{name}": name for name in ("k", "max_words", "many_queries")},
    **{name: name for name in ("system_prompt", "attn_implementation", "dtype")},
}


@dataclass
class EvaluationSettings:
    """
    Everything that the rollouts of an evaluation depend on. A run can be resumed only with the same settings.

    Attributes:
        model (`str`): name on the hub, or a directory, which may be that of a PEFT adapter.
        sources (`list[str]`): sources of questions, see [`load_questions`].
        indexes (`list[str]`): what to search, one for all sources or one for each, see [`open_search`].
        adapter (`str` or `None`): PEFT adapter on top of the model.
        tokenizer (`str` or `None`): directory of a tokenizer that replaces the model's, such as one with another chat
            template.
        limit (`int` or `None`): questions per data set, see [`choose_questions`].
        num_samples (`int`): rollouts per question.
        temperature (`float`): sampling temperature; 0 takes the most likely token.
        seed (`int`): seed of the sampling.
        k (`int`): passages per search.
        max_words (`int` or `None`): longest passage shown, in words; `None` shows all of it.
        many_queries (`bool`): whether one search may have several queries, see [`SearchTool`].
        system_prompt (`str`): `"think"`, `"no_think"`, `"none"`, a text, or a file with a text.
        beliefs (`bool`): whether to score the belief in the right answer before every turn.
        calibration (`int` or `None`): answers to sample before every turn, as if it were the last one, to compare
            their share of right ones with the belief.
        variant (`str`): scorer of the `f1` and `em` in the records; tables can be made with either scorer.
        vllm (`bool`): whether to sample with vLLM, in the same process.
        dtype (`str` or `None`): type of the weights; by default bfloat16 on a GPU, float32 elsewhere.
        attn_implementation (`str` or `None`): as in transformers.
        rollout (`dict`): more fields of [`IGPOConfig`], such as `max_turns`.
    """

    model: str
    sources: list[str]
    indexes: list[str]
    adapter: str | None = None
    limit: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    k: int = 3
    max_words: int | None = 200
    many_queries: bool = False
    system_prompt: str = "think"
    beliefs: bool = True
    calibration: int | None = None
    variant: Variant = "squad"
    vllm: bool = False
    dtype: str | None = None
    attn_implementation: str | None = None
    tokenizer: str | None = None
    rollout: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> None:
        """
        Checks the settings. A model that is an adapter becomes the adapter and its base model.

        Raises:
            FileNotFoundError: The model or the adapter is a path that does not exist.
            ValueError: A number is out of range, or the numbers of sources and indexes do not match.
        """
        for name, low in (
            ("limit", 1),
            ("num_samples", 1),
            ("temperature", 0),
            ("k", 1),
            ("max_words", 1),
            ("calibration", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.num_samples} samples at temperature 0 are all the same. Give a temperature.")
        if self.calibration is not None and (self.vllm or not self.beliefs):
            raise ValueError("`calibration` compares answers with beliefs: it needs both, and no vLLM.")
        pair_sources(self.sources, self.indexes)
        make_stop_tools(self.rollout.get("stop_tools"))
        for path in (self.model, self.adapter):
            if path and looks_like_path(path) and not Path(path).is_dir():
                raise FileNotFoundError(f"no such directory: {path}. Expected a model, or its name on the hub.")
        if self.adapter is None:
            if (adapter := find_adapter(self.model)) is not None:
                self.adapter, self.model = adapter, base_of_adapter(adapter)
        elif (adapter := find_adapter(self.adapter)) is not None:
            self.adapter = adapter
            base_of_adapter(adapter, self.model)
        elif Path(self.adapter).is_dir():
            base_of_adapter(self.adapter)  # says what is missing


def make_settings(options: Mapping[str, Any], config: str | Path | None = None) -> EvaluationSettings:
    """
    Settings from options, then from the configuration of a training run, then the defaults of `igpo eval`.

    Options have the names of fields of [`EvaluationSettings`] and [`IGPOConfig`]. Other names are ignored, and `None`
    or an empty tuple (typer's list) means that the option is not given.
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    from_file = settings_of_training(config) if config is not None else {}
    settings = from_file | {each.name: given[each.name] for each in fields(EvaluationSettings) if each.name in given}
    limits = {"max_turns": 8, "max_completion_length": 8192} | from_file.get("rollout", {})
    rollout = limits | {name: value for name, value in given.items() if name in _ROLLOUT_FIELDS}
    return EvaluationSettings(**settings | {"rollout": rollout})


def settings_of_training(config: str | Path) -> dict[str, Any]:
    """The [`EvaluationSettings`] in a training configuration: limits, template, prompt, search and model options."""
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{config} holds {type(values).__name__}, expected the options of a training run.")
    settings = {_TRAINING_OPTIONS[name]: value for name, value in values.items() if name in _TRAINING_OPTIONS}
    rollout = {name: values[name] for name in values if name in _ROLLOUT_FIELDS or name.startswith("vllm_")}
    return settings | {"rollout": rollout}


def save_options(directory: str | Path, *configs: Any, **options: Any) -> None:
    """
    Write the options that define a rollout beside a model, so that it can be used as it was trained.

    Args:
        directory (`str` or `Path`): Of the model.
        configs: What has the options as attributes, such as an [`IGPOConfig`].
        options: More of them, by their names in `igpo train`, such as `search_k`.
    """
    names = [*_TRAINING_OPTIONS, *sorted(_ROLLOUT_FIELDS)]
    options = {name: getattr(config, name) for name in names for config in configs if hasattr(config, name)} | options
    if "system_prompt" in options:  # and not a file that others do not have
        options["system_prompt"] = resolve_system_prompt(options["system_prompt"]) or "none"
    head = "# The options with which this model was trained to search.\n"
    text = yaml.safe_dump({"model_name_or_path": str(directory), **options}, sort_keys=False, allow_unicode=True)
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, OPTIONS_FILE).write_text(head + text, encoding="utf-8")


def saved_options(model: str, adapter: str | None = None) -> Path | None:
    """The file of [`save_options`] beside an adapter or a model, here or on the hub, or beside a checkpoint's run."""
    for name in (adapter, model):
        folders = [Path(name), Path(name).absolute().parent] if name and Path(name).is_dir() else []
        if folders and not folders[0].name.startswith(("checkpoint-", "adapter")):
            del folders[1:]
        for folder in folders:
            if (folder / OPTIONS_FILE).is_file():
                return folder / OPTIONS_FILE
        if name and not folders and (file := file_on_hub(name, OPTIONS_FILE)) is not None:
            return file
    return None


def load_rows(settings: EvaluationSettings) -> list[Row]:
    """
    The questions, one row per rollout: `sample` is the number of the sample, `index` that of the index to search.

    Raises as [`load_questions`], and `ValueError` where two sources have the same question.
    """
    rows: list[Row] = []
    seen: dict[tuple[str, str], str] = {}
    for source, index in pair_sources(settings.sources, settings.indexes):
        for row in choose_questions(load_questions(source, settings.system_prompt).to_list(), settings.limit):
            dataset, name = row["dataset"], row["id"]
            if (dataset, name) in seen:
                raise ValueError(f"the question {name} of {dataset} is in {seen[dataset, name]} and in {source}.")
            seen[dataset, name] = source
            rows.append(row | {"index": settings.indexes.index(index)})
    return [row | {"sample": sample} for row in rows for sample in range(settings.num_samples)]


def pair_sources(sources: Sequence[str], indexes: Sequence[str]) -> list[tuple[str, str]]:
    """Each source with its index. Raises `ValueError` unless there is one index, or one for each source."""
    if not sources or len(indexes) not in (1, len(sources)):
        raise ValueError(
            f"got {len(sources)} sources of questions and {len(indexes)} indexes. Expected one index for all sources, "
            "or one for each, in the same order."
        )
    return list(zip(sources, indexes if len(indexes) > 1 else [*indexes] * len(sources), strict=True))


def choose_questions(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """
    Up to `limit` questions of each data set: those whose ids have the smallest hashes, as in [`hold_out`].

    A smaller choice is part of a larger one. Raises `ValueError` unless `limit` is positive.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    if limit is None:
        return list(rows)
    groups = by_dataset(rows).values()
    return [group[i] for group in groups for i in order_by_hash([row["id"] for row in group])[:limit]]


def by_dataset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each data set, in the order in which the sets first occur."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    return groups


def questions_digest(rows: Iterable[Row]) -> str:
    """Digest of questions, prompts and answers, whatever their order."""
    names = ("dataset", "id", "sample", "prompt", "answers", "index")
    lines = sorted(json.dumps([row.get(name) for name in names]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
