"""The diagnosis while a run is training."""

import logging
from typing import Any

from transformers import TrainerCallback

from ...records import trajectories_of
from .diagnosis import Diagnosis, diagnose
from .facts import Facts, RunFacts

logger = logging.getLogger(__name__)

#: Batches that are looked at for one diagnosis, and most of them that are kept whole.
BATCHES, KEPT = 5, 100


class DoctorCallback(TrainerCallback):
    """
    Says while training what `igpo doctor` says of a run: a warning the first time that a signature is seen.

    It looks at the main process's part of every few batches, so that it needs no records on disk and takes next to no
    time.

    ```python
    trainer.add_callback(DoctorCallback(trainer))
    ```

    Args:
        trainer ([`IGPOTrainer`]): the trainer to which it is added.
        every (`int`, *optional*, defaults to `20`): optimizer steps between two diagnoses.
    """

    def __init__(self, trainer: Any, every: int = 20):
        self.trainer, self.every = trainer, every
        self.batches: list[list[Facts]] = []
        self.said: set[str] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        step = self.trainer.current_step
        if step.training and state.global_step % max(1, self.every // BATCHES) == 0:
            records = trajectories_of(step, self.trainer._tokenizer, self.trainer.reward_func_names)
            self.batches.append([Facts.of(each) for each in records])
            if len(self.batches) > 2 * KEPT:  # what is long ago becomes sparse
                del self.batches[1:-KEPT:2]
        if self.batches and state.global_step % self.every == 0:
            self._say(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.batches and state.global_step % self.every:
            self._say(state)

    def _say(self, state: Any) -> None:
        for finding in self.diagnosis(state).findings:
            if finding.name not in self.said:
                self.said.add(finding.name)
                first, last = finding.steps
                logger.warning(
                    "%s (steps %d to %d): %s. %s", finding.name, first, last, finding.evidence, finding.change
                )

    def diagnosis(self, state: Any) -> Diagnosis:
        """What has been found so far."""
        facts = [each for batch in self.batches for each in batch]
        return diagnose(RunFacts(facts, state.log_history, vars(self.trainer.args)))
