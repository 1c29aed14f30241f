"""What an evaluation is: the model, the questions, the limits of a rollout."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import IGPOConfig
from ..data import load_questions
from ..rewards import Variant
from .questions import Row, pair, select

# Fields of `IGPOConfig` that say what a rollout is, or how it is made.
_ROLLOUT = {
    *("max_turns", "max_turn_length", "max_completion_length", "max_tool_calling_iterations"),
    *("max_tool_response_tokens", "forced_answer", "forced_answer_prompt", "forced_answer_length"),
    *("on_malformed_tool_call", "max_concurrent_tool_calls", "tool_timeout", "reuse_prefixes"),
    *("chat_template_kwargs", "generation_kwargs", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("answer_template", "alias_reduction", "max_answer_tokens", "belief_method", "belief_tokens_per_batch"),
}


@dataclass
class EvaluationSettings:
    """
    What the rollouts of an evaluation depend on; a run is resumed with the same only.

    Attributes:
        model (`str`): name on the hub, or directory; that of an adapter is resolved to its base model.
        sources (list of `str`): question sources, see [`load_questions`].
        indexes (list of `str`): what to search, one for all sources or one for each, see [`open_search`].
        adapter (`str`, *optional*): PEFT adapter on top of the model.
        limit (`int`, *optional*): questions per data set, chosen by a hash of their ids as [`hold_out`] does.
        num_samples (`int`): rollouts per question.
        temperature (`float`): 0 takes the likeliest token.
        seed (`int`): of the sampling.
        k (`int`), max_words (`int`): passages per search, and the longest passage in words.
        many_queries (`bool`): whether one search may have several queries, see [`SearchTool`].
        system_prompt (`str`): `think`, `no_think`, `none`, a text or a file with one.
        beliefs (`bool`): whether to score the belief in the answer before every turn.
        variant (`str`): scorer of the `f1` and `em` in the records; tables can use the other one as well.
        vllm (`bool`): sample with vLLM in the same process.
        dtype (`str`, *optional*): of the weights; by default bfloat16 on a GPU, float32 elsewhere.
        attn_implementation (`str`, *optional*): as in transformers.
        rollout (`dict`): further fields of [`IGPOConfig`] (`max_turns`, `max_completion_length`, …).
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
    variant: Variant = "squad"
    vllm: bool = False
    dtype: str | None = None
    attn_implementation: str | None = None
    rollout: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """
        Resolves the model, and refuses what would fail later.

        Raises:
            FileNotFoundError: the model or the adapter is a path, and there is none.
            ValueError: a number is out of range, or there are other numbers of sources and indexes.
        """
        for name, low in (("limit", 1), ("num_samples", 1), ("temperature", 0), ("k", 1), ("max_words", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.num_samples} samples at temperature 0 are all the same. Give a temperature.")
        pair(self.sources, self.indexes)
        for path in (self.model, self.adapter):
            if (
                path
                and (path.startswith((".", "/", "~", "outputs/")) or path.count("/") > 1)
                and not Path(path).is_dir()
            ):
                raise FileNotFoundError(f"no such directory: {path}. Expected a model, or its name on the hub.")
        configuration = Path(self.model, "adapter_config.json")
        if self.adapter is None and configuration.is_file():
            self.adapter = self.model
            self.model = json.loads(configuration.read_text(encoding="utf-8"))["base_model_name_or_path"]
        elif self.adapter is not None and Path(self.adapter).is_dir():
            if not Path(self.adapter, "adapter_config.json").is_file():
                raise FileNotFoundError(f"no adapter_config.json in {self.adapter}: it is no PEFT adapter.")


def load_rows(settings: EvaluationSettings) -> list[Row]:
    """
    The questions, each with the number of its index as `index`, and as `sample` which of its samples it is.

    Raises:
        FileNotFoundError, ValueError: as [`load_questions`], and where two sources have the same question.
    """
    rows: list[Row] = []
    seen: dict[tuple[str, str], str] = {}
    for source, index in pair(settings.sources, settings.indexes):
        for row in select(load_questions(source, settings.system_prompt).to_list(), settings.limit):
            name = row["dataset"], row["id"]
            if name in seen:
                raise ValueError(f"the question {name[1]} of {name[0]} is in {seen[name]} and in {source}.")
            seen[name] = source
            rows.append(row | {"index": settings.indexes.index(index)})
    return [row | {"sample": sample} for row in rows for sample in range(settings.num_samples)]


def settings_of_training(config: str | Path) -> dict[str, Any]:
    """
    The settings that a training configuration has for its rollouts: limits, template, prompt, search, model.

    Args:
        config (`str` or `Path`): YAML file of `train.py`.

    Returns:
        `dict`: arguments of [`EvaluationSettings`].

    Raises:
        ValueError: the file holds no mapping.
    """
    values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{config} holds {type(values).__name__}, expected the options of a training run.")
    names = {f"search_{name}": name for name in ("k", "max_words", "many_queries")} | {
        name: name for name in ("system_prompt", "attn_implementation", "dtype")
    }
    settings = {names[name]: value for name, value in values.items() if name in names}
    rollout = {name: values[name] for name in values if name in _ROLLOUT or name.startswith("vllm_")}
    return settings | {"rollout": rollout}


def make_arguments(settings: EvaluationSettings, output_dir: str | Path, batch_size: int) -> IGPOConfig:
    """The trainer's arguments; raises `TypeError` or `ValueError` for options of the rollout that are none."""
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": 2,  # what a training batch would be: two rollouts of a question at least
        "num_generations": 2,
        "num_generations_eval": 1,
        "info_gain_weight": 0.0,
        "belief_at_eval": settings.beliefs,
        "temperature": settings.temperature or 1.0,
        "seed": settings.seed,
        "use_vllm": settings.vllm,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),
        **settings.rollout,
        # There is no loss whose ratios would need it.
        "vllm_importance_sampling_correction": False,
    }
    if settings.temperature == 0:
        nothing = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"))
        greedy = {"temperature": 0.0} if settings.vllm else {"do_sample": False, **nothing}
        options["generation_kwargs"] = {**(options.get("generation_kwargs") or {}), **greedy}
    return IGPOConfig(**options)
