"""One rollout at a time, shown while it is made."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from ..data import resolve_system_prompt
from ..report import beliefs_after, plain_text, render_belief, render_observation, render_turn
from ..rewards import f1_score
from ..search import SearchTool, open_search
from ..trajectory import StopReason, Trajectory, Turn
from .rollouts import make_arguments, make_trainer
from .settings import EvaluationSettings

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_CHARACTERS = 300  # of each result


class Asker:
    """
    Asks a model questions, with the rollout loop, template and tools of `igpo eval`, and shows what it does.

    Args:
        settings ([`EvaluationSettings`]): The model, the index and the limits of a rollout.
        console (`rich.console.Console`): Where to show it.
        output_dir (`str`): A folder for the trainer, which writes nothing into it.
        full (`bool`, *optional*, defaults to `False`): Show results whole, and not their beginnings.

    Raises:
        FileNotFoundError, ValueError: See [`EvaluationSettings.resolve`] and [`open_search`].
    """

    def __init__(self, settings: EvaluationSettings, console: "Console", output_dir: str, full: bool = False):
        settings.resolve()
        self.settings, self.console = settings, console
        self.system_prompt = resolve_system_prompt(settings.system_prompt)
        self._longest = 10**9 if full else SHOWN_CHARACTERS
        index = open_search(settings.indexes[0])
        tool = SearchTool(index, k=settings.k, max_words=settings.max_words, many_queries=settings.many_queries)
        self.trainer: Any = make_trainer(settings, make_arguments(settings, output_dir, batch_size=1), tool)
        self._sample, self.trainer._generate_single_turn = self.trainer._generate_single_turn, self._show_sampling
        self._context: list[int] = []  # that has been shown
        self._num_turns = 0
        set_seed(settings.seed)  # once: the same question, asked again, may be answered in another way

    def ask(self, question: str, answers: Sequence[str] = ()) -> Trajectory:
        """
        Rolls out one question.

        Args:
            question (`str`): The question.
            answers (sequence of `str`, *optional*): Right answers, to score the belief in them before every turn.

        Returns:
            [`Trajectory`]: The rollout.

        Raises:
            ConnectionError: A search has failed.
        """
        self._context, self._num_turns = [], 0
        self.trainer.args.belief_at_eval = bool(answers)
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        row = {
            "prompt": [*system, {"role": "user", "content": question}],
            "answers": list(answers) or ["-"],  # a right answer is needed, though nothing is compared with it
            **{"dataset": "asked", "id": "0", "sample": 0, "hops": None},
        }
        (rollout,) = self.trainer.rollouts([row], self.settings)
        if last := rollout.turns[self._num_turns - 1].observation:  # after which there was no room for another turn
            self.console.print(render_observation(last, self._longest))
        rollout.answers = list(answers)
        self._show_end(rollout)
        return rollout

    def _show_sampling(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Sample a turn as the trainer does, and show what the policy reads before it, and its text as it comes."""
        from rich.live import Live

        (context,) = prompt_ids
        decode = self.trainer._tokenizer.decode
        if self._context:
            self.console.print(render_observation(decode(context[len(self._context) :]), self._longest))
        self._num_turns += 1
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        generate, instance_attribute = model.generate, vars(model).get("generate")

        def rendered(ids: Sequence[int]) -> Any:
            return render_turn(self._num_turns, Turn(decode(list(ids)), num_tokens=len(ids)))

        # Only a terminal can replace what it has shown.
        with Live(console=self.console, refresh_per_second=8) if self.console.is_terminal else nullcontext() as live:
            show = (lambda ids: live.update(rendered(ids))) if live is not None else (lambda ids: None)
            model.generate = partial(generate, streamer=_Streamer(show))
            try:
                turns, logprobs = self._sample(prompt_ids, *args, **kwargs)
            finally:
                if instance_attribute is None:
                    del model.generate
                else:
                    model.generate = instance_attribute
            show(turns[0])
        if live is None:
            self.console.print(rendered(turns[0]))
        self._context = [*context, *turns[0]]
        return turns, logprobs

    def _show_end(self, rollout: Trajectory) -> None:
        from rich.text import Text

        answer = rollout.info["prediction"]
        line = Text.assemble(
            "\n", ("Answer    ", "bold"), (plain_text(answer or "none"), "bold magenta" if answer else "dim")
        )
        if rollout.answers:
            f1 = f1_score(answer, rollout.answers, self.settings.variant)
            line.append(f"  F1 {f1:.2f}", style="green" if f1 else "red")
        self.console.print(line)
        if rollout.stop_reason != StopReason.ANSWERED:
            self.console.print(Text.assemble(("Ended by  ", "bold"), str(rollout.stop_reason)))
        if rollout.turns[0].belief is None:
            return
        self.console.print(Text(f"\nBelief in {' | '.join(rollout.answers)}", style="bold"))
        steps: list[tuple[str, float, float | None]] = [("before the first turn", rollout.turns[0].belief, None)]
        for number, (turn, after) in enumerate(zip(rollout.turns, beliefs_after(rollout), strict=True), start=1):
            if after is not None:
                steps.append((f"after turn {number}", after, turn.info_gain))
        for when, belief, gain in steps:
            self.console.print(Text(f"{when:<22}"), render_belief(belief, gain), sep="")


class _Streamer(BaseStreamer):
    """Shows the tokens of one row so far, whenever there is another one."""

    def __init__(self, show: Any):
        self._show = show
        self._ids: list[int] | None = None  # until the prompt has come

    def put(self, value: Any) -> None:
        if self._ids is None:
            self._ids = []
        else:
            self._ids += value.flatten().tolist()
            self._show(self._ids)

    def end(self) -> None:
        pass
