"""Checkpoints of a run: which of them are whole, where to resume, and the records of rollouts that belong to them."""

import json
import logging
import re
import socket
import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from .files import move_aside
from .trajectory import drop_later

logger = logging.getLogger(__name__)

_TORCH_FILES = re.compile(r"(pytorch_model|adapter_model|training_args|optimizer).*\.bin|.*\.(pt|pth)")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def find_damage(checkpoint: str | Path, *, only_model: bool = False) -> str | None:
    """
    What keeps training from resuming at a checkpoint, or `None` if it is whole.

    A whole checkpoint has the trainer's state, weights (one file, an index with all its shards, an adapter, or what
    FSDP or DeepSpeed write), and, unless `only_model` (`save_only_model`), the states of optimizer, scheduler and
    random numbers. None of its files is cut off. The files of tensors are not read, so this is fast.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such directory"
    try:
        if not isinstance(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"], int):
            return "trainer_state.json has no step"
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    for file in sorted(folder.rglob("*")):
        if file.is_file() and is_cut_off(file):
            return f"{file.relative_to(folder)} is cut off"
    names = {path.name for path in folder.iterdir()}
    sharded = [name for name in names if name.startswith("global_step")]  # DeepSpeed's directories
    if sharded:
        return _damage_of_deepspeed(folder)
    if (damage := _damage_of_weights(folder, names)) is not None or only_model:
        return damage
    if not any(re.fullmatch(r"optimizer(\.pt|\.bin|_\d+)", name) for name in names):
        return "optimizer.pt is missing"
    if "scheduler.pt" not in names:
        return "scheduler.pt is missing"
    if not any(re.fullmatch(r"rng_state(_\d+)?\.pth", name) for name in names):
        return "rng_state.pth is missing"
    return None


def is_cut_off(file: Path) -> bool:
    """Whether a file of tensors ends too early. Other files never do."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="np"):  # compares the sizes in the header with that of the file
                return False
        except (SafetensorError, OSError):
            return True
    # `torch.save` writes a zip file, whose directory is at its end.
    return _TORCH_FILES.fullmatch(file.name) is not None and not zipfile.is_zipfile(file)


def _damage_of_weights(folder: Path, names: set[str]) -> str | None:
    for index in sorted(name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        try:
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{index} is damaged"
        missing = sorted(shards - names)
        return f"{missing[0]} is missing" if missing else None
    for path in sorted(folder.glob("pytorch_model_fsdp_*")):
        if not (path / ".metadata").is_file() or not list(path.glob("*.distcp")):
            return f"{path.name} is incomplete"
    adapters = [path for name in _WEIGHTS[2:] for path in folder.glob(f"*/{name}")]
    if names.isdisjoint({*_WEIGHTS, "pytorch_model_fsdp.bin"}) and not adapters:
        if not list(folder.glob("pytorch_model_fsdp_*")):
            return f"{_WEIGHTS[2] if 'adapter_config.json' in names else _WEIGHTS[0]} is missing"
    return None


def _damage_of_deepspeed(folder: Path) -> str | None:
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return "`latest` is missing"  # it is written last
    for kind in ("model_states", "optim_states"):
        if not list(Path(folder, name).glob(f"*{kind}.pt")):
            return f"{name}/*{kind}.pt is missing"
    return None


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a directory, the newest first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def last_whole_checkpoint(output_dir: str | Path, *, only_model: bool = False) -> str | None:
    """
    The newest whole checkpoint in a directory; `None` if there are no checkpoints. Logs what is wrong with newer ones.

    Raises:
        ValueError: There are checkpoints, and none is whole.
    """
    damaged: list[str] = []
    for checkpoint in find_checkpoints(output_dir):
        damage = find_damage(checkpoint, only_model=only_model)
        if damage is None:
            if damaged and PartialState().is_main_process:
                logger.warning("%s. Resuming from %s, the last whole checkpoint.", "; ".join(damaged), checkpoint)
            return str(checkpoint)
        damaged.append(f"{checkpoint} is not whole: {damage}")
    if damaged:
        raise ValueError(
            f"no checkpoint can be resumed: {'; '.join(damaged)}. Restore the files, or remove these directories to "
            "start again."
        )
    return None


def checkpoint_to_resume(choice: str | bool | None, args: Any) -> str | None:
    """
    The checkpoint that a value of `resume_from_checkpoint` means: `True` (or `"true"`) is the last whole one in
    `output_dir`, `False` or `None` is none, and anything else is the path of one.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: The checkpoint, or every one in `output_dir`, is damaged.
    """
    if str(choice).lower() in ("none", "false", ""):
        return None
    if str(choice).lower() == "true":
        return last_whole_checkpoint(args.output_dir, only_model=args.save_only_model)
    if not Path(str(choice)).is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint`: no such directory: {choice}. Give one, or `true`.")
    if damage := find_damage(str(choice), only_model=args.save_only_model):
        raise ValueError(
            f"`resume_from_checkpoint`: {choice} is not a whole checkpoint: {damage}. With `true`, the last whole one "
            "is taken."
        )
    return str(choice)


class OneRun(TrainerCallback):
    """
    Keeps runs apart: a finished run takes no further steps, and `output_dir/trajectories` has records of one run.

    When training resumes, the records of the steps that it repeats are removed. When it starts from the beginning, the
    records of an earlier run are moved to `trajectories-1`, `trajectories-2` and so on. What an evaluation before
    training logs to TensorBoard goes where training logs.

    Args:
        trainer (`Trainer`): the trainer to which it is added.
    """

    def __init__(self, trainer: Any):
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # As the callback itself does when training begins; until then it would write to ./runs.
                name = f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}"
                callback.logging_dir = str(Path(trainer.args.output_dir, "runs", name))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, "trajectories")
        if state.is_world_process_zero:
            records = list(folder.glob("*.jsonl"))
            if state.global_step > 0:
                for path in records:
                    drop_later(path, state.global_step)
            elif records:
                earlier = move_aside(folder)
                logger.warning("The records of an earlier run in %s are now in %s.", folder, earlier)
        PartialState().wait_for_everyone()
        if state.global_step >= state.max_steps > 0:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "Nothing is left to train: the checkpoint is from step %d of %d. To train longer, raise "
                    "`max_steps` or `num_train_epochs`.",
                    *(state.global_step, state.max_steps),
                )
