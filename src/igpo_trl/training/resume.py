"""What a run carries from step to step besides weights: saved with every checkpoint, so that resuming is exact."""

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from .belief_model import Snapshot

logger = logging.getLogger(__name__)

#: Of each process, and of all together: copies of weights.
STATE_FILE, WEIGHTS_FILE = "igpo_state_{rank}.pt", "igpo_weights.pt"


class CheckpointNotSaved(OSError):
    """The disk did not take a checkpoint."""


class ResumesExactly(Trainer):
    """
    The part of [`IGPOTrainer`] that saves and loads what a checkpoint of `GRPOTrainer` lacks.

    That is, of every process: the rollouts that are still to be trained on (`num_iterations`, `steps_per_generation`)
    and how often they have been, metrics and losses not logged yet, and the attributes that the objects in
    `running_state` name in `carried`; and of all together the weights of a belief snapshot and of a reference model
    that is synchronized. The order of the questions is that of the epoch in which training resumes.
    """

    _step: int
    _buffered_inputs: list[dict[str, Any]] | None
    _metrics: dict[str, dict[str, list[float]]]
    _belief_model: Any
    num_iterations: int
    ref_model: Any

    @property
    def running_state(self) -> dict[str, Any]:
        """The objects that change from batch to batch, by name."""
        raise NotImplementedError

    @property
    def is_sharded(self) -> bool:
        """Whether no process has whole weights."""
        raise NotImplementedError

    def max_over_ranks(self, number: int) -> int:
        """The maximum of a number over all processes."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # An earlier one of this name is not whole while it is overwritten. This file is written last.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with self._disk_errors(folder):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        left = self._step % (self.args.steps_per_generation * self.num_iterations) > 0
        state = {
            "batches": self._batches,
            "step": self._step,
            "rollouts": self._buffered_inputs if left else None,
            "metrics": dict(self._metrics["train"]),
            "loss": (self._tr_loss, self._globalstep_last_logged),
            "carried": {
                name: {attribute: _plain(getattr(each, attribute)) for attribute in each.carried}
                for name, each in self.running_state.items()
            },
        }
        torch.save(state, Path(output_dir, STATE_FILE.format(rank=self.args.process_index)))
        if (weights := self._more_weights) and self.args.should_save:
            torch.save(weights, Path(output_dir, WEIGHTS_FILE))
        self.accelerator.wait_for_everyone()  # what makes a checkpoint whole is written next, by one process

    @property
    def _more_weights(self) -> dict[str, list[torch.Tensor]]:
        """Weights that change with the steps and that no other file has."""
        weights = {"snapshot": self._belief_model.weights if isinstance(self._belief_model, Snapshot) else []}
        if self.args.sync_ref_model and not self.is_sharded:
            weights["reference"] = [parameter.data for parameter in self.ref_model.parameters()]
        return {name: tensors for name, tensors in weights.items() if tensors}

    @contextmanager
    def _disk_errors(self, folder: Path) -> Iterator[None]:
        """Says what a disk that is full has done to a checkpoint, and removes what has been written of it."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            # All that torch says of a disk that takes no more.
            if isinstance(error, RuntimeError) and not re.search(
                "inline_container|iostream|PytorchStream", str(error)
            ):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free / 2**20
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointNotSaved(
                f"{folder} could not be saved ({reason}): {free:.1f} MB were free. Training has stopped after step "
                f"{self.state.global_step}; what was written of this checkpoint is removed, and earlier ones are as "
                "they were. Make room, or lower `save_total_limit`, and resume."
            ) from error

    # ------------------------------------------------------------------------------------------------------- loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        # Before 5.23, transformers loads, of several adapters, only those in folders of their own. The trained one,
        # beside which TRL keeps a copy as reference, is in the checkpoint itself.
        saved = Path(resume_from_checkpoint, "adapter_config.json").is_file()
        if saved and not self.is_sharded and len(getattr(model, "peft_config", ())) > 1:
            model.load_adapter(resume_from_checkpoint, "default", is_trainable=model.active_adapter == "default")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called once when training resumes, right before the first batch.
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        state = self._read_state(checkpoint, self.args.process_index)
        # All processes go the same way: one that sampled while another trains would leave both waiting.
        if self.max_over_ranks(int(state.get("batches") != self._batches)):
            state = self._state_of_all(checkpoint)
        self._step, self._buffered_inputs = state["step"], state["rollouts"]
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        if "loss" in state:
            self._tr_loss, self._globalstep_last_logged = state["loss"]
        for name, each in self.running_state.items():
            for attribute, value in state["carried"].get(name, {}).items():
                _set(each, attribute, value)
        weights, device = Path(checkpoint, WEIGHTS_FILE), self.accelerator.device
        saved = torch.load(weights, map_location="cpu", weights_only=True) if weights.is_file() else {}
        if isinstance(self._belief_model, Snapshot):
            self._belief_model.weights = [each.to(device) for each in saved.get("snapshot", [])]
        if self.args.sync_ref_model and "reference" in saved:
            for parameter, value in zip(self.ref_model.parameters(), saved["reference"], strict=True):
                parameter.data.copy_(value)

    @property
    def _batches(self) -> dict[str, int]:
        """What rollouts that are left only fit to."""
        names = "per_device_train_batch_size gradient_accumulation_steps steps_per_generation num_iterations"
        return {"num_processes": self.args.world_size} | {name: getattr(self.args, name) for name in names.split()}

    def _read_state(self, checkpoint: str, rank: int) -> dict[str, Any]:
        file, device = Path(checkpoint, STATE_FILE.format(rank=rank)), self.accelerator.device
        if not file.is_file():
            return {}
        # `cpu:0`, as it is called in one of several processes, is not a place that tensors are loaded to.
        state: dict[str, Any] = torch.load(
            file, map_location="cpu" if device.type == "cpu" else device, weights_only=True
        )
        return state

    def _state_of_all(self, checkpoint: str) -> dict[str, Any]:
        """What a checkpoint holds for any number of processes: what its first one carried, but for metrics."""
        state = self._read_state(checkpoint, 0)
        saved = {} if self.max_over_ranks(int(not state)) else state.get("batches", {})
        carried = state["carried"] if saved else {}
        pairs = [(name, was, self._batches[name]) for name, was in saved.items()]
        changed = [f"`{name}` was {was} and is {now}" for name, was, now in pairs if was != now]
        logger.warning(
            "%s: %s. Training resumes, but not exactly as if it had not stopped: rollouts that were left are sampled "
            "anew.",
            checkpoint,
            ", ".join(changed) or "some process has no igpo_state_RANK.pt, or one of an earlier version",
        )
        return {
            "step": self.state.global_step * self.args.gradient_accumulation_steps,
            "rollouts": None,
            "metrics": {},
            "carried": {name: each for name, each in carried.items() if name != "metric_weights"},
        }

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        checkpoint = kwargs["resume_from_checkpoint"]
        if self.control.should_training_stop:  # `OneRun` stops a finished run, which the parent would continue
            self._load_rng_state(checkpoint)
            return
        if checkpoint is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            # The parent's sampler shuffles anew whenever it begins, with a generator that starts at the seed.
            for _ in range(kwargs["epochs_trained"] if getattr(self, "_train_sampler", None) is not None else 0):
                next(iter(self._train_sampler), None)
        super()._run_epoch(*args, **kwargs)


def _plain(value: Any) -> Any:
    """What `torch.load` reads without unpickling classes."""
    return dict(value) if isinstance(value, Mapping) else sorted(value) if isinstance(value, set) else value


def _set(owner: Any, attribute: str, value: Any) -> None:
    current = getattr(owner, attribute)
    if isinstance(current, dict):
        current.clear()
        current.update(value)
    else:
        setattr(owner, attribute, set(value) if isinstance(current, set) else value)
