"""What `igpo train` refuses before a model is loaded."""

import difflib
import importlib.util
import json
import platform
import warnings
from pathlib import Path

from transformers import AutoConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import ModelConfig

from ..checkpoints import find_checkpoints, is_cut_off
from ..config import IGPOConfig
from ..data import find_sources, resolve_system_prompt
from ..files import check_writable, looks_like_path
from ..search import open_search
from ..tools import make_stop_tools
from ..training.adapters import check_adapter, find_adapter
from .arguments import ScriptArguments

#: Options that need a package.
_PACKAGES = {
    "use_vllm": ("vllm", 'pip install "igpo-trl[vllm]"'),
    "use_liger_kernel": ("liger_kernel", "pip install liger-kernel"),
    "load_in_4bit": ("bitsandbytes", 'pip install "igpo-trl[quantization]"'),
    "load_in_8bit": ("bitsandbytes", 'pip install "igpo-trl[quantization]"'),
}


def check_arguments(script: ScriptArguments, training: IGPOConfig, model: ModelConfig) -> None:
    """Raises errors that would otherwise occur only after the model is loaded."""
    if script.corpus is None and script.index is None:
        raise ValueError("give `corpus` (passages) or `index` (an index of them, or a search server).")
    check_index(script)
    for name in ("questions", "eval_questions"):
        if (source := getattr(script, name)) is not None:
            try:
                find_sources(source)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"`{name}`: {error}") from error
    resolve_system_prompt(script.system_prompt)
    if make_stop_tools(training.stop_tools) and script.system_prompt in ("think", "no_think"):
        warnings.warn(
            f"The system prompt `{script.system_prompt}` asks for an answer inside <answer> and </answer>, and "
            "`stop_tools` has final_answer. Give a `system_prompt` that asks for a call of final_answer.",
            UserWarning,
            stacklevel=2,
        )
    if script.method not in ("igpo", "grpo"):
        raise ValueError(f"`method` must be igpo or grpo, got {script.method!r}.")
    if script.num_eval_questions < 0:
        raise ValueError(f"`num_eval_questions` must not be negative, got {script.num_eval_questions}.")
    for name in ("search_k", "search_max_words"):
        if getattr(script, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(script, name)}.")
    for name, (package, command) in _PACKAGES.items():
        if getattr(training, name, getattr(model, name, False)) and importlib.util.find_spec(package) is None:
            raise ImportError(f"`{name}` needs {package}, which is not installed. Install it with: {command}")
    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Expected some of {', '.join(INTEGRATION_TO_CALLBACK)}."
            raise ValueError(f"`report_to`: {name} is not known. {hint}")
    check_precision(training, model)
    check_model(model, training)
    check_output_dir(training)


def check_precision(training: IGPOConfig, model: ModelConfig) -> None:
    """Warns of a training in bfloat16 on a processor that has no instructions for it."""
    from ..warm_start.fitting import computes_in_bfloat16

    asked = training.bf16 or model.dtype == "bfloat16"
    if asked and training.use_cpu and platform.machine() in ("x86_64", "AMD64") and not computes_in_bfloat16():
        warnings.warn(
            "This processor computes bfloat16 several times more slowly than float32. Set `--bf16 false --dtype "
            "float32`.",
            UserWarning,
            stacklevel=2,
        )


def check_index(script: ScriptArguments) -> None:
    """Raises an error unless there is an index, a search server's address, or a corpus to index."""
    index = script.index or ""
    if index and "://" not in index and not Path(index).exists():
        if script.corpus is not None and not Path(script.corpus).is_file():
            raise FileNotFoundError(f"`corpus`: no such file: {script.corpus}, and `index`: nothing at {index}.")
        try:
            open_search(index)
        except FileNotFoundError as error:
            siblings = [path.parent.name for path in Path(index).absolute().parent.glob("*/manifest.json")]
            near = difflib.get_close_matches(Path(index).name, siblings, n=1, cutoff=0.5)
            raise FileNotFoundError(
                f"`index`: no index in {index}. "
                + (f"Did you mean {Path(index).with_name(near[0])}? " if near else "")
                + f"To build one there: igpo index --corpus {script.corpus or 'FILE'} --out {index}"
            ) from error
    if not index and not Path(str(script.corpus)).is_file():
        problem = "this is a directory" if Path(str(script.corpus)).is_dir() else "no such file"
        raise FileNotFoundError(f"`corpus`: {problem}: {script.corpus}")


def check_model(model: ModelConfig, training: IGPOConfig) -> None:
    """Raises an error unless there is a model, or an adapter, of this name."""
    name = model.model_name_or_path
    if not name:
        raise ValueError("`model_name_or_path` is missing: the name of a model on the hub, or a directory.")
    if looks_like_path(name) and not Path(name).is_dir():
        problem = "this is a file, not a model's directory" if Path(name).exists() else "no such model directory"
        raise FileNotFoundError(
            f"`model_name_or_path`: {problem}: {name}. To make a tiny model for a CPU, run: "
            "igpo tiny-model DIR --corpus FILE --questions FILE"
        )
    for file in Path(name).glob("*.safetensors"):
        if is_cut_off(file):
            raise ValueError(f"`model_name_or_path`: {file} is cut off. Copy or save the model again.")
    if (adapter := find_adapter(name, model.model_revision)) is not None:
        check_adapter(adapter, model.use_peft)
        return
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"`model_name_or_path`: no config.json in {name}: it is not a model.")
    try:
        AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=training.trust_remote_code)
    except (OSError, ValueError) as error:
        where = (
            "" if Path(name).is_dir() else " is neither a directory here nor a model that can be loaded from the hub"
        )
        raise type(error)(f"`model_name_or_path`: {name}{where}: {error}") from error


def check_output_dir(training: IGPOConfig) -> None:
    """Raises an error if the directory cannot be written, or has checkpoints that nobody asked to resume."""
    folder = Path(training.output_dir or "")
    checkpoints = find_checkpoints(folder)
    if checkpoints and training.resume_from_checkpoint is None:
        finished = " that is finished" if is_finished(str(checkpoints[0]), training) else ""
        raise FileExistsError(
            f"{folder} has checkpoints of an earlier run{finished}. Add --resume_from_checkpoint true to resume "
            "it, or choose another --output_dir."
        )
    check_writable(folder, "`output_dir`")


def is_finished(checkpoint: str, training: IGPOConfig) -> bool:
    """Whether a checkpoint, or the state of a run, is from the last step that the configuration asks for."""
    try:
        state = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
        if training.max_steps > 0:
            return bool(state["global_step"] >= training.max_steps)
        return bool(
            state["global_step"] >= state["max_steps"] and state["num_train_epochs"] >= training.num_train_epochs
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_best_metric(training: IGPOConfig, metrics: dict[str, float]) -> None:
    """Raises `ValueError` if the evaluation does not report the metric that chooses the best checkpoint."""
    name = training.metric_for_best_model
    if not training.load_best_model_at_end or name is None:
        return
    if name not in metrics and f"eval_{name}" not in metrics:
        near = difflib.get_close_matches(name if name.startswith("eval_") else f"eval_{name}", metrics)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Expected one of {', '.join(metrics)}."
        raise ValueError(f"`metric_for_best_model`: the evaluation reports no {name}. {hint}")
