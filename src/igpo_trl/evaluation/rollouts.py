"""All questions, batch by batch, each batch on disk before the next one."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import set_seed

from ..search import Passage, Searchable, SearchTool, open_search
from ..trajectory import Trajectory
from .questions import Row, questions_digest
from .run import Run
from .settings import EvaluationSettings, load_rows, make_arguments
from .store import Key, append_lines, key_of
from .trainer import make_evaluator


def evaluate(settings: EvaluationSettings, out: str | Path, batch_size: int | None = None) -> list[Trajectory]:
    """
    Rolls out on all questions that the run has no rollout of yet, and returns the rollouts of all of them.

    Every batch is on disk before the next one begins, so that a run which was killed goes on where it was.

    Args:
        settings ([`EvaluationSettings`]): what to do.
        out (`str` or `Path`): directory of the run: new, or that of one with the same settings and questions.
        batch_size (`int`, *optional*): rollouts at a time and process; 16, or 256 with vLLM.

    Raises:
        FileExistsError: the directory holds something else, or a run with other settings or questions.
        ConnectionError: searches fail; what was rolled out before is kept.
        BlockingIOError: another process is at work on the same run.
        FileNotFoundError, ValueError: see [`EvaluationSettings.check`] and [`load_questions`].
    """
    settings.check()
    batch_size = batch_size or (256 if settings.vllm else 16)
    arguments = make_arguments(settings, out, batch_size)
    state = arguments.distributed_state or PartialState()
    rows = load_rows(settings)
    indexes = [open_search(index) for index in settings.indexes]
    run = Run(Path(out))
    with run.lock() if state.is_main_process else nullcontext():
        if state.is_main_process:
            run.open(asdict(settings), questions_digest(rows))
        state.wait_for_everyone()
        done = run.keys()
        if any(key_of_row(row) not in done for row in rows):
            _roll_out(settings, run, indexes, rows, done, batch_size)
        state.wait_for_everyone()
        return run.trajectories() if state.is_main_process else []


def key_of_row(row: Row) -> Key:
    """What the rollout of this row is found by."""
    return Key(row["dataset"], row["id"], row["sample"])


def _roll_out(
    settings: EvaluationSettings,
    run: Run,
    indexes: Sequence[Searchable],
    rows: Sequence[Row],
    done: set[Key],
    batch_size: int,
) -> None:
    """
    Rolls out on the rows that are not done, batch by batch.

    Batches are those of a run that nothing interrupts. One that is on disk in part is made again as a whole, with the
    same seed, and gives what was missing.
    """
    switch = _Switch(indexes)
    tool = SearchTool(switch, k=settings.k, max_words=settings.max_words, many_queries=settings.many_queries)
    trainer = make_evaluator(settings, run.folder, tool, batch_size)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    f1: list[float] = []
    quiet = {"disable": True} if rank else {}
    with tqdm(total=len(rows), initial=len(done), desc="rollouts", unit="", **quiet) as bar:
        for at in sorted({row["index"] for row in rows}):
            switch.at = at
            of_index = [row for row in rows if row["index"] == at]
            for first in range(0, len(of_index), batch_size * world):
                batch = of_index[first : first + batch_size * world]
                missing = [row for row in batch if key_of_row(row) not in done]
                if not missing:
                    continue
                each = -(-len(batch) // world)
                mine = batch[rank * each : (rank + 1) * each]
                # Every process brings the same number: one without enough of its own repeats a question.
                filled = mine + batch[:1] * (each - len(mine))
                set_seed(_seed(settings.seed, filled[0], rank))
                made = trainer.rollouts(filled, settings)[: len(mine)]
                made = [trajectory for trajectory in made if key_of(trajectory) not in done]
                append_lines(run.file(rank), [trajectory.to_json() for trajectory in made])
                f1 += [trajectory.info["f1"] for trajectory in made]
                bar.update(len(missing))
                bar.set_postfix(f1=f"{100 * sum(f1) / max(1, len(f1)):.1f}")


def _seed(seed: int, row: Row, rank: int) -> int:
    """The same for the same batch, also in a run that was interrupted."""
    text = f"{seed}|{row['dataset']}|{row['id']}|{row['sample']}|{rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class _Switch:
    """The index of the data set at hand."""

    def __init__(self, indexes: Sequence[Searchable]):
        self.indexes, self.at = indexes, 0

    def search(self, query: str, k: int = 3) -> list[Passage]:
        return self.indexes[self.at].search(query, k)

    def search_batch(self, queries: Sequence[str], k: int = 3) -> list[list[Passage]]:
        return self.indexes[self.at].search_batch(queries, k)
