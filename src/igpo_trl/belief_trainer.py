"""
Rollouts with the policy's belief before each turn, scored against keys and values that are there anyway.

[`BeliefTrainer`] gives [`BeliefPass`] the caches of the rollout and of TRL's own forward, and turns what it scores
into beliefs and gains of the global batch.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .beliefs import CachedContexts
from .beliefs.probes import fit_template
from .beliefs.scorer import BeliefPass, KeepsKeysAndValues
from .checks import answers_of, check_tool_names
from .rollout.kv_cache import PrefixCache
from .rollout.loop import MultiTurnTrainer, Rollout
from .step import TurnBatch
from .turns import gain_spans, turn_spans


class BeliefTrainer(MultiTurnTrainer):
    """`MultiTurnTrainer` that scores beliefs; takes the belief arguments of [`IGPOConfig`]."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Nobody tells the tools that the turns of a `rollout_func` call.
        check_tool_names(self.args.info_gain_tools, [] if self.rollout_func is not None else self.tools)
        template = fit_template(self.args.answer_template, self._generation_prompt())
        self._belief_pass = BeliefPass(self.args, self._tokenizer, template, self._most_of_all_processes)
        self._belief_seconds = 0.0
        # Token ids of prompts and completions and the sampled-token masks of the batch, between rollout and scoring.
        self._generated: tuple[list[list[int]], list[list[int]], list[list[int]] | None] | None = None
        self._awaits_old_log_probs = False  # whether TRL's forward for them is still to come in this batch

    def _generation_prompt(self) -> str:
        if self.processing_class.chat_template is None:
            return ""
        return self.processing_class.apply_chat_template(
            [{"role": "user", "content": ""}],
            add_generation_prompt=True,
            tokenize=False,
            chat_template=self.chat_template,
            **self.chat_template_kwargs,
        )

    # ----------------------------------------------------------------------------------------------- parent's hooks

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        args = self.args
        training = self.model.training
        scores = args.uses_beliefs if training else args.belief_at_eval
        self._belief_pass.begin(
            [answers_of(row, args.answer_column) for row in inputs] if scores else [], every_turn=not training
        )
        self._belief_seconds = 0.0
        # The parent's own condition, which has no name there.
        self._awaits_old_log_probs = scores and (
            args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) != 0
            or (self.use_vllm and self.vllm_importance_sampling_correction)
        )
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._generated = None
        batch = TurnBatch(output, self._log_of_rounds.called if self._log_of_rounds else ())
        mode = "train" if training else "eval"
        turns = self.accelerator.gather(batch.num_turns).float()
        self._metrics[mode]["rollout/turns/mean"].append(turns.mean().item())
        self._metrics[mode]["rollout/turns/max"].append(turns.max().item())
        if scores:
            self._score_turns(batch, mode)
        self._finish_batch(inputs, output, batch)
        return output

    def _finish_batch(self, inputs: list[dict[str, Any]], output: dict[str, Any], batch: TurnBatch) -> None:
        """For subclasses: what becomes of a batch whose beliefs, where they are wanted, have been scored."""

    def _generate(self, prompts: list[Any]) -> Any:
        result = super()._generate(prompts)
        self._generated = result[:3]
        return result

    @property
    def _sharded(self) -> bool:
        """Whether every process has to take part in every forward."""
        return bool(self._dist.is_zero3 or self._dist.is_fsdp)

    @property
    def _scores_rollouts(self) -> bool:
        """Whether rollouts are scored when they end: not on sharded models, for they end when they like."""
        return bool(self.tools) and self._reuses_prefixes and not self._sharded

    def _before_release(self, rollouts: Sequence[Rollout], cache: PrefixCache) -> None:
        """Score rollouts that have ended against the keys and values that they leave."""
        longest = max(len(rollout.prompt) + len(rollout.ids) for rollout in rollouts)
        if self._sharded or not self._belief_pass.can_use_held(self.model, longest):
            return
        scored = []
        for rollout in rollouts:
            sequence = rollout.prompt + rollout.ids
            row, padding, length = cache.cached_row(rollout.index, sequence)
            bounds = self._boundaries_to_score(rollout.prompt, rollout.ids, rollout.mask, rollout.called)
            if bounds := [bound for bound in bounds if bound <= length]:
                scored.append((rollout.index, sequence, bounds, row, padding))
        if scored:
            numbers, sequences, boundaries, rows, paddings = map(list, zip(*scored, strict=True))
            # `generate` counts positions from a row's first token.
            cached = CachedContexts(cache.cache, rows, paddings, [0] * len(rows))
            with self._belief_clock(), self.accelerator.autocast():
                self._belief_pass.score_held(self.model, cached, numbers, sequences, boundaries)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        awaited, self._awaits_old_log_probs = self._awaits_old_log_probs, False
        if awaited and not self._scores_rollouts:
            usable = self._belief_pass.can_use_held(self.model, input_ids.shape[1], offset=True)
            if not self._most_of_all_processes(int(not usable)):  # all processes or none, for they are in step
                # The same forward, by the parent; its keys and values are kept until its rows are scored.
                padding = attention_mask.argmax(dim=1).tolist()
                model = KeepsKeysAndValues(model, lambda *rows: self._score_rows(padding, *rows))
        return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

    def _score_rows(self, padding: list[int], cache: Any, first: int, size: int) -> None:
        """Score rows of the batch against the keys and values of TRL's forward of them."""
        assert self._generated is not None  # or there would be no such forward
        prompts, completions, masks = self._generated
        called = self._log_of_rounds.called if self._log_of_rounds else []
        rows = range(first, first + size)
        sequences = [[*prompts[i], *completions[i]] for i in rows]
        boundaries = [
            self._boundaries_to_score(
                prompts[i],
                completions[i],
                masks[i] if masks else [1] * len(completions[i]),
                called[i] if called else (),
            )
            for i in rows
        ]
        # TRL counts positions from a row's first slot.
        skips = [padding[i] for i in rows]
        cached = CachedContexts(cache, range(size), skips, skips)
        with self._belief_clock(), self.accelerator.autocast():
            self._belief_pass.score_held(self.model, cached, rows, sequences, boundaries, in_step=True)

    # ------------------------------------------------------------------------------------------------------- scores

    def _boundaries_to_score(
        self, prompt: Sequence[int], completion: Sequence[int], sampled_mask: Sequence[int], called: Sequence[Any]
    ) -> list[int]:
        """Context lengths of one rollout at which the belief is needed."""
        _, starts, num_turns = turn_spans(torch.tensor([sampled_mask]), torch.tensor([len(completion)]))
        turns = self._belief_pass.turns_to_score(int(num_turns), called)
        return [len(prompt) + int(starts[0, turn]) for turn in turns]

    def _score_turns(self, batch: TurnBatch, mode: str) -> None:
        """
        Set the gains, beliefs and turn counts of the global batch, (N, K), (N, K) and (N,), on the CPU: they are
        small, and not every accelerator has float64. NaN where there is none.
        """
        args, scorer = self.args, self._belief_pass
        counts = batch.num_turns.tolist()
        turns = [scorer.turns_to_score(n, called) for n, called in zip(counts, batch.called, strict=True)]
        boundaries = [[bounds[k] for k in of] for bounds, of in zip(batch.boundaries, turns, strict=True)]
        with self._belief_clock(), self.accelerator.autocast():
            values = scorer.score(self.model, batch.sequences, boundaries)

        log_belief = torch.full(batch.starts.shape, torch.nan)
        gain = torch.full(batch.starts.shape, torch.nan)
        for i, of in enumerate(turns):
            log_belief[i, of] = values[i]
        level = log_belief if args.info_gain == "log_prob_diff" else log_belief.exp()
        for i, (n, called) in enumerate(zip(counts, batch.called, strict=True)):
            for a, b in gain_spans(n, called, every=args.info_gain_every, tools=args.info_gain_tools):
                gain[i, b - 1] = level[i, b] - level[i, a]
        batch.gain, batch.belief = gain, log_belief.exp()
        # K differs between processes: pad to the longest, then every process sees the whole batch.
        local = torch.stack([gain, batch.belief], dim=-1).to(self.accelerator.device)
        shared = self.accelerator.gather(
            self.accelerator.pad_across_processes(local, dim=1, pad_index=torch.nan)
        ).cpu()
        batch.gains, batch.beliefs = shared[..., 0].contiguous(), shared[..., 1].contiguous()
        batch.counts = self.accelerator.gather(batch.num_turns).cpu()
        self._metrics[mode]["belief/seconds"].append(self._belief_seconds)
        self._log_beliefs(mode, batch)

    def _log_beliefs(self, mode: str, batch: TurnBatch) -> None:
        metrics = self._metrics[mode]
        assert batch.gains is not None and batch.beliefs is not None and batch.counts is not None
        gains, first = batch.gains[~batch.gains.isnan()], batch.beliefs[:, 0]
        if len(gains):
            metrics["info_gain/mean"].append(gains.mean().item())
            metrics["info_gain/std"].append(gains.std(correction=0).item())
            metrics["info_gain/positive"].append((gains > 0).float().mean().item())
        if not first.isnan().all():
            metrics["belief/prompt"].append(first.nanmean().item())
            metrics["belief/final"].append(batch.beliefs.gather(1, (batch.counts - 1)[:, None]).nanmean().item())

    @contextmanager
    def _belief_clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._belief_seconds += time.perf_counter() - started

    def _most_of_all_processes(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
