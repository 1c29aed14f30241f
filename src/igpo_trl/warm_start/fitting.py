"""Training on traces with TRL's `SFTTrainer`: LoRA or all weights, for some epochs, steps or minutes."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig, SFTTrainer

from ..checkpoints import last_whole_checkpoint
from .encoding import IGNORE

_WARMUP = 0.05
"""Share of training in which the learning rate rises."""


_LARGE = 1_000_000_000
"""
Parameters of a model from which activations are computed twice, to save memory.

In one of 135 M parameters, a trace of 700 tokens takes 0.8 GB more without that, and 27 % less time.
"""


def computes_in_bfloat16() -> bool:
    """Whether the device that trains computes in bfloat16 at full speed."""
    if torch.accelerator.is_available():
        return bool(is_torch_bf16_gpu_available())
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def fit(
    model: Any,
    tokenizer: Any,
    examples: Sequence[dict[str, list[int]]],
    folder: Path,
    *,
    adapter: str | None = None,
    lora_r: int | None = None,
    epochs: float = 1.0,
    max_steps: int | None = None,
    minutes: float | None = None,
    micro_batch_size: int | None = None,
    batch_size: int = 4,
    show_progress: bool = True,
    **options: Any,
) -> tuple[Any, dict[str, float]]:
    """
    Trains on encoded traces, from the last checkpoint in `folder` if there is one.

    Args:
        model (`str` or `PreTrainedModel`): A directory, a name on the hub, or the model itself.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        examples (sequence of `dict`): What [`TraceEncoder`] makes of traces.
        folder (`Path`): For checkpoints.
        adapter (`str`, *optional*): Directory of an adapter of the model, to train further in place of a new one.
        lora_r, epochs, max_steps, minutes, batch_size, micro_batch_size: As for [`warm_start`].
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        options: More of TRL's `SFTConfig`.

    Returns:
        The model, with its adapter still apart, and `steps`, the final `loss` and `seconds`.
    """
    on_cpu = not torch.accelerator.is_available()
    micro = micro_batch_size or (1 if on_cpu else math.gcd(4, batch_size))
    bf16 = computes_in_bfloat16()
    if isinstance(model, str):
        # Weights that stay as they are need no more digits than they are saved with; those that are trained do.
        dtype = torch.bfloat16 if bf16 and lora_r else torch.float32
        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    defaults = {
        "train_sampling_strategy": "random" if micro == 1 else "group_by_length",
        "gradient_checkpointing": model.num_parameters() > _LARGE,
        "logging_steps": 5,
        "save_steps": 10 if on_cpu else 50,
        "save_total_limit": 1,
    }
    clock = Clock(minutes, shows=show_progress and minutes is not None)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch_size // micro,
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        max_length=None,
        bf16=bf16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=clock.shows or not show_progress,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        **defaults | options,
    )
    peft_config = None
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    elif lora_r:
        from peft import LoraConfig

        peft_config = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = WarmStartTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(list(examples)),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)  # takes the place of a progress bar
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    loss = sum(losses[-3:]) / max(1, len(losses[-3:]))
    return trainer.model, {"steps": trainer.state.global_step, "loss": loss, "seconds": round(trainer.clock.seconds)}


class Clock(TrainerCallback, ExportableState):
    """
    Ends training after some minutes, those before an interruption included.

    Args:
        minutes (`float`, *optional*): How long. `None` is no limit.
        spent (`float`, *optional*, defaults to `0.0`): Seconds that were spent already.
        shows (`bool`, *optional*, defaults to `False`): Whether to show how much of the time, or of the steps, has
            passed.
    """

    def __init__(self, minutes: float | None, spent: float = 0.0, shows: bool = False):
        self.minutes, self.spent, self.shows, self._since = minutes, spent, shows, time.monotonic()
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        """Seconds spent so far."""
        return self.spent + time.monotonic() - self._since

    @property
    def progress(self) -> float:
        """Share of the time that is spent."""
        return 0.0 if self.minutes is None else self.seconds / (60 * self.minutes)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        self._bar = tqdm(total=100, desc="Warm start", unit="%", disable=not self.shows)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = self.progress
        if progress >= 1:
            control.should_training_stop = control.should_save = True
        passed = max(progress, state.global_step / state.max_steps)
        self._bar.update(int(100 * min(1.0, passed)) - self._bar.n)
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), float("nan"))
        self._bar.set_postfix(step=state.global_step, loss=f"{loss:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()

    def state(self) -> dict[str, Any]:
        return {"args": {"minutes": self.minutes, "spent": self.seconds, "shows": self.shows}, "attributes": {}}


class WarmStartTrainer(SFTTrainer):
    """
    `SFTTrainer` with a learning rate that rises over the first twentieth and then falls to zero, over the steps or the
    time, whichever ends first; and with an output head that a CPU, too, runs at the tokens with labels alone.
    """

    @property
    def clock(self) -> Clock:
        """The clock of this run. Resuming replaces it by one that knows the time before."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        def factor(step: int) -> float:
            progress = max(step / num_training_steps, self.clock.progress)
            return max(0.0, min(progress / _WARMUP + 0.02, (1 - progress) / (1 - _WARMUP)))

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.args.use_cpu or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        kept = (labels != IGNORE).any(dim=0).nonzero().flatten()  # a tenth of a trace
        others = {name: value for name, value in inputs.items() if name != "labels"}
        logits = model(**others, use_cache=False, logits_to_keep=kept).logits
        targets = labels[:, kept].flatten()
        loss = cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
        return loss / ((targets != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch)
