"""[`IGPOTrainer`]: TRL's `GRPOTrainer` with turn-level advantages from information gain."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from . import components
from .beliefs.models import changing_positions
from .beliefs.scorer import KVCapture
from .checkpoints import OneRun, checkpoint_to_resume
from .checks import (
    check_before_loading,
    check_datasets,
    check_rollout_output,
    check_tool_names,
    check_trainable,
    probe_environments,
    refuse_images,
    warn_of_single_turns,
)
from .config import IGPOConfig
from .data.rows import plain_rows
from .logs import LogsRollouts, fill_columns
from .records import replace_logged_advantages, trajectories_of
from .rewards import make_answer_reward
from .rollout.chat_templates import edited_templates_accepted
from .rollout.kv_cache import PrefixCache, replaced_generate
from .rollout.loop import SampledTurns
from .rollout.sampling import sample_within_context
from .rollout.state import Rollout
from .rollout.turn_reader import parser_errors_as_value_errors
from .step import Step
from .training.adapters import check_adapter, find_adapter, load_trainable
from .training.card.hooks import MakesCard
from .training.costs import timed
from .training.counterfactuals import evidence_used, foreign_beliefs
from .training.hub import PushesToHub
from .training.resume import ResumesExactly
from .training.sampled_tokens import SampledTokensModel, backbone_of, can_pack, sampled_mask_of
from .training.seams import check_seams
from .training.trained_adapter import adapters_added_plainly, prepare_adapter
from .trajectory import write_jsonl
from .turns import FIRST_SEEN, old_log_probs_of_turn_ratios


class IGPOTrainer(ResumesExactly, MakesCard, PushesToHub, LogsRollouts, GRPOTrainer):
    """
    Trainer for Information Gain-based Policy Optimization (IGPO, arXiv 2510.14967).

    What changes with respect to `trl.GRPOTrainer`, and nothing else does:

    - The policy's teacher-forced belief in the right answer is scored before every turn of a rollout; the rise over a
      turn is that turn's reward, and the sum of the reward functions is the reward of the last turn.
    - `advantages` are (B, T) instead of (B,): each sampled token gets the advantage of its turn. Statistics cover the
      whole group, even if it lies across processes.
    - The rounds of a rollout: all tool calls of all rollouts at once, limits with names, the KV cache kept between
      turns, processes in step ([`RolloutLoop`]).
    - `reward_funcs` may be omitted: [`answer_reward`] then scores the F1 of the last turn's answer.
    - Metrics of gains, beliefs, turns and collapse; optional records of every rollout (`save_trajectories`).

    With `info_gain_weight=0` (and a mode other than `"critic"`) no belief is scored and the advantages are GRPO's,
    bit for bit. Evaluation scores beliefs only with `belief_at_eval`. It reports `eval_f1` and `eval_exact_match`
    whatever the reward functions are; with a dict of data sets `eval_<set>_f1` and so on, and their averages.
    `evaluate` returns every metric, so that `metric_for_best_model` can name any of them.

    The hooks of TRL that are overridden, in the order in which one step calls them. They share one [`Step`].

    | hook | TRL | here | signature since |
    |---|---|---|---|
    | `_generate_and_score_completions` | generates, scores, returns the batch | makes the `Step`; afterwards beliefs → gains → advantages → metrics, records | before 1.8 |
    | `_generate` | renders prompts, samples, parses, runs tools | keeps a KV cache meanwhile; finds the turns | 1.9 |
    | `_generate_single_turn` | samples one turn of each row | limits its length, reuses the KV cache | 1.15 |
    | `_tool_call_loop` | runs tools one rollout at a time | hands the rollouts to [`RolloutLoop`]; scores those that end | before 1.8 |
    | `_get_per_token_logps_and_entropies` | log-probabilities of the completions | computes real tokens only, and the output head at sampled ones; scores beliefs against the cache of the old log-probabilities' forward | 1.15 |
    | `_calculate_rewards` | calls the reward functions, gathers | keeps the result as the outcome | before 1.8 |
    | `_compute_loss` | loss of one microbatch | one ratio per turn with `importance_sampling_level="turn"` | before 1.8 |
    | `compute_loss`, `log` | average metrics over batches | average them over rollouts, tokens or calls | before 1.8 |
    | `create_model_card`, `save_model` | write TRL's card; none | write one made from the run | 1.16 |
    | `push_to_hub`, `init_hf_repo`, `_push_from_checkpoint` | push all of `output_dir`; fail with it | leave out records; lose nothing if they fail | 5.13 |
    | `train`, `_run_epoch`, `_save_checkpoint`, `_save_rng_state`, `_load_from_checkpoint`, `_load_rng_state`, `_get_train_sampler` | resumes from the newest checkpoint, without the rollouts that are left and in the order of the first epoch; one more step at the end | resumes from the last whole one, exactly; takes none | 5.13 |
    | `evaluate`, `evaluation_loop` | evaluate one data set | return every metric; average over sets | before 1.8 |

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): as in `GRPOTrainer`; text models only. A PEFT
            adapter, in a directory or on the hub, is one, and is trained further.
        reward_funcs (*optional*): as in `GRPOTrainer`. Defaults to [`answer_reward`], unless the environment owns the
            reward (`get_reward`).
        args ([`IGPOConfig`], *optional*): configuration.
        train_dataset (`Dataset` or `IterableDataset`): needs the columns `prompt` and `args.answer_column`.
        eval_dataset (*optional*), processing_class (*optional*): as in `GRPOTrainer`.
        reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, tools, rollout_func,
            environment_factory (*optional*): as in `GRPOTrainer`, and in its order.

    Raises:
        `ImportError`: if an overridden method of TRL or transformers has another signature (the message names it).
        `TypeError`, `ValueError`: before the model is loaded, if the processor is multi-modal, the chat template
            is missing or cannot call tools, the answers column is missing, or an answer is empty or not a string
            (the message names the row).
    """  # noqa: E501

    _tag_names = ["trl", "igpo"]
    _name = "IGPO"
    _paper = components.PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: IGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        check_seams()
        check_datasets(train_dataset, eval_dataset)
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = IGPOConfig(f"{model_id.split('/')[-1]}-IGPO")
        elif not isinstance(args, IGPOConfig):
            raise TypeError(f"`args` must be an IGPOConfig, got {type(args).__name__}. It takes all of GRPOConfig.")
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        base, adapter = model, find_adapter(model, revision) if isinstance(model, str) else None
        if adapter is not None:
            (base, model_id), revision = check_adapter(adapter, peft_config), None  # which was the adapter's
        if processing_class is None:
            processing_class = components.load_processing_class(model_id, args, revision)
        environment_factory, environments = probe_environments(environment_factory)
        if not tools and not environments and rollout_func is None:
            warn_of_single_turns()
        default_reward = reward_funcs is None and not any(hasattr(type(e), "get_reward") for e in environments)
        check_before_loading(
            args, processing_class, train_dataset, eval_dataset, tools, environments,
            needs_answers=default_reward, model=base, revision=revision,
        )  # fmt: skip
        if default_reward:
            reward_funcs = make_answer_reward(args.answer_column, args.format_penalty, metric=args.answer_metric)
        args.remove_unused_columns = False  # reward functions may read any column, and beliefs read the answers
        if adapter is not None:
            model = load_trainable(adapter, args, create_model_from_path, quantization_config)
            quantization_config = None
        with edited_templates_accepted(), adapters_added_plainly(model, peft_config):
            super().__init__(
                model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes,
                callbacks, optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory,
            )  # fmt: skip
        prepare_adapter(self, is_new=peft_config is not None)
        # Nobody reports which tools the turns of a `rollout_func` call.
        check_tool_names(args, [] if self.rollout_func is not None else self.tools)
        self._loss_inputs: dict[str, Any] | None = None
        if args.importance_sampling_level == "turn":
            self.importance_sampling_level = "token"  # the parent's part of it, see `_compute_loss`
        self.current_step = Step([], training=False)  # the current generation batch
        components.limit_generation(self)
        self._belief_scorer = components.make_belief_scorer(self)
        self._belief_model = components.make_belief_model(self)
        self._rollout_loop = components.make_rollout_loop(self) if self.tools else None
        self._reuses_prefixes = components.can_reuse_prefixes(self)
        self._packs_rows = can_pack(self.model)
        components.declare_output_head(self)
        self.add_callback(OneRun(self))

    # ----------------------------------------------------------------------------------- one step, from top to bottom

    @timed("other")
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        args, training = self.args, self.is_training
        inputs = [dict(row) for row in inputs]  # to which environments may add their answers
        inputs = inputs if self.rollout_func is not None else plain_rows(inputs)
        step = self.current_step = components.make_step(self, inputs)
        output = super()._generate_and_score_completions(inputs)  # calls the hooks below

        optimizer_step = self.state.global_step
        if step.belief_batch is not None:
            believes = self._belief_model
            model = believes.scoring(self.model, optimizer_step) if believes is not None else nullcontext(self.model)
            with self.accelerator.autocast(), self.costs.part("beliefs"), model as believer:
                if training and args.gain_baseline == "random":
                    step.baseline = foreign_beliefs(step, self._belief_scorer, believer)
                step.score_beliefs(self._belief_scorer, believer)
        if args.info_gain == FIRST_SEEN and (args.credits_turns if training else args.belief_at_eval):
            step.set_first_seen(self._tokenizer)
        if training and self._rollout_loop and args.evidence_every and optimizer_step % args.evidence_every == 0:
            encode = self._rollout_loop.observations.encode
            with self.accelerator.autocast(), self.costs.part("beliefs"):
                step.evidence_used = evidence_used(step, self._belief_scorer, self.model, encode)
        step.gather(self.accelerator)
        metrics = self._metrics[self.mode]
        if training and step.gains is not None:
            gain_weight, outcome_weight = args.weights_at(optimizer_step / max(1, self.state.max_steps))
            step.set_advantages(
                normalization=args.normalization,
                gamma=args.gamma,
                scale=args.scale_rewards,
                info_gain_weight=gain_weight,
                outcome_weight=outcome_weight,
                std_floor=args.std_floor,
                gae_lambda=args.gae_lambda,
            )
            output["advantages"] = step.token_advantages(output["completion_ids"])
            replace_logged_advantages(self._logs["advantages"], step)
            if args.info_gain_weight_end is not None:
                metrics["info_gain_weight"].append(gain_weight)
            if args.outcome_weight_end is not None:
                metrics["outcome_weight"].append(outcome_weight)
        self.log_step(step)
        if training and args.save_trajectories:
            rollout_advantages = output["advantages"] if step.gains is None else None
            records = trajectories_of(step, self._tokenizer, self.reward_func_names, rollout_advantages)
            write_jsonl(Path(args.output_dir, "trajectories", f"rank{step.rank}.jsonl"), records, append=True)
        return output

    @timed("tools")
    def _generate(self, prompts: list[Any]) -> Any:
        step = self.current_step
        step.take_answers(self.environments)
        if self.args.uses_beliefs if step.training else self.args.belief_at_eval:
            step.belief_batch = self._belief_scorer.begin(step.answers)
        if self._reuses_prefixes:
            has_dropout = step.belief_batch is None
            step.kv_cache = PrefixCache(changing_positions(self.model), not self.is_sharded, has_dropout)
        training = self.model.training
        try:
            with parser_errors_as_value_errors(self._tokenizer):
                result = super()._generate(prompts)
        finally:
            step.kv_cache = None  # its memory is needed for training
            if self.model.training != training:  # as continuous batching and some `rollout_func`s leave it
                self.model.train(training)
        prompt_ids, completion_ids, sampled_masks, _, _, extra_fields, *_ = result
        step.set_rollouts(prompt_ids, completion_ids, sampled_masks)
        if self.rollout_func is not None:
            check_rollout_output(extra_fields)
            step.set_last_turns(self._tokenizer)
        if self.tools and self.rollout_func is None:
            metrics = self._metrics[self.mode]
            for name, value in step.round_log.metrics(self.accelerator, step.num_counted_here).items():
                metrics[name].append(value)
        return result

    @timed("sampling")
    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        *,
        rollouts: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
    ) -> Any:
        """As the parent's; `rollouts` are the indices of the rollouts that continue, all of them in the first turn."""
        refuse_images(images)
        if self.use_transformers_continuous_batching:
            if not prompt_ids and not self.is_sharded:
                return [], None
            prompts = prompt_ids or [[self.eos_token_ids[0]]]  # sharded parameters are gathered on all ranks
            return super()._generate_single_turn(prompts, images, multimodal_fields, num_generations)
        sample_prompts = super()._generate_single_turn
        rollouts = range(len(prompt_ids)) if rollouts is None else rollouts
        model = None if self.use_vllm else self.accelerator.unwrap_model(self.model_wrapped)

        def generate(rows: list[int], prompts: list[list[int]], length: int) -> Any:
            # The parent's server samples `num_generations` turns of each different prompt; later pieces differ.
            each = num_generations if prompts == prompt_ids else 1
            if model is None:
                self.vllm_generation.max_completion_length = length
                with components.server_watched(self):
                    return sample_prompts(prompts, None, multimodal_fields, each)
            with replaced_generate(model, self.current_step.kv_cache, [rollouts[i] for i in rows], length):
                return sample_prompts(prompts, None, multimodal_fields, each)

        return sample_within_context(
            generate,
            prompt_ids,
            components.max_turn_length(self) if max_new_tokens is None else max_new_tokens,
            components.context_length(self),
            [*self.eos_token_ids, self._tokenizer.pad_token_id],
            max_over_ranks=self.max_over_ranks if components.samples_in_step(self) else int,
            same_number_on_ranks=self.use_vllm and components.samples_in_step(self),
        )

    def _tool_call_loop(
        self,
        prompts: Any,
        prompt_ids: Any,
        completion_ids: Any,
        completions: Any,
        logprobs: Any,
        images: Any,
        multimodal_fields: Any,
    ) -> Any:
        refuse_images(images)
        assert self._rollout_loop is not None  # the parent comes here only if there are tools
        rollouts = components.make_rollouts(self, prompt_ids, with_logprobs=logprobs is not None)
        first_turns = SampledTurns(completion_ids, logprobs, [messages[0] for messages in completions])
        log = self.current_step.round_log = self._rollout_loop.run(rollouts, first_turns, self._score_ended_rollouts)
        return (
            [rollout.sampled_mask for rollout in rollouts],
            [rollout.messages for rollout in rollouts],
            [rollout.completion_ids for rollout in rollouts],
            None if logprobs is None else [rollout.logprobs for rollout in rollouts],
            log.num_calls,
            sum(log.errors.values()),
            [[] for _ in rollouts],
        )

    def _score_ended_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        # Sharded models score later: their ranks must make equally many forwards, and rollouts end when they like.
        if self._belief_model is None and not self.is_sharded:
            with self.accelerator.autocast(), self.costs.part("beliefs"):
                self.current_step.score_ended_rollouts(self._belief_scorer, self.model, rollouts)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        step, inputs = self.current_step, self._loss_inputs
        backbone = None if self.args.pads_to_longest else backbone_of(model)
        num_computed, num_scored = input_ids.numel(), len(input_ids) * logits_to_keep
        if step.captures_old_log_probs:
            step.captures_old_log_probs = False  # the forwards that follow are those of the reference and of the loss
            assert step.belief_batch is not None  # or nothing would be captured
            longest = input_ids.shape[1] + step.belief_batch.longest_probe
            usable = self._belief_scorer.can_use_cache(self.model, longest, counts_padding=True)
            if not self.max_over_ranks(int(not usable)):  # all ranks or none, because they are in step
                # The same forward, by the parent; its keys and values are kept until its rows are scored.
                padding = (attention_mask.argmax(dim=1) * int(backbone is None)).tolist()
                model = KVCapture(model, lambda *rows: self._score_captured_rows(padding, *rows))
        sampled_mask = sampled_mask_of(inputs) if inputs else step.sampled_mask(logits_to_keep)
        if backbone is not None:
            model = SampledTokensModel(model, backbone, sampled_mask, packs=self._packs_rows)
        with self.costs.part("training" if torch.is_grad_enabled() else "log_probs"):
            log_probs, *others = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if isinstance(model, SampledTokensModel):
            num_computed, num_scored = model.num_computed, model.num_scored
        self.costs.add_forward(num_computed, int(attention_mask.sum()), num_scored)
        if inputs and self.args.importance_sampling_level == "turn":
            old_log_probs = inputs.get("old_per_token_logps", log_probs.detach())  # the same while on-policy
            inputs["old_per_token_logps"] = old_log_probs_of_turn_ratios(log_probs, old_log_probs, sampled_mask)
        return log_probs, *others

    def _score_captured_rows(self, padding: list[int], cache: Any, first: int, size: int) -> None:
        with self.accelerator.autocast(), self.costs.part("beliefs"):
            self.current_step.score_captured_rows(self._belief_scorer, self.model, padding, cache, first, size)

    @timed("rewards")
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        step, rows = self.current_step, self.current_step.with_last_turns(inputs)
        global_rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        fill_columns(self._logs, self._pending_extra_logs, len(completions))
        step.completions = completions
        return step.set_rewards(global_rewards, self.reward_weights, self.reward_func_names)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        # The hook above reads what was sampled, and for ratios of turns changes what the parent reads after it.
        self._loss_inputs = dict(inputs)
        try:
            return super()._compute_loss(model, self._loss_inputs)
        finally:
            self._loss_inputs = None

    # -------------------------------------------------------------------------------------- training and evaluation

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        check_trainable(self.model)
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args)
        return super().train(checkpoint or resume_from_checkpoint, *args, **kwargs)

    @property
    def running_state(self) -> dict[str, Any]:
        return components.running_state(self)

    # ------------------------------------------------------------------------------------------------------- ranks

    @property
    def is_sharded(self) -> bool:
        """Whether every process has to take part in every forward."""
        return bool(self._dist.is_zero3 or self._dist.is_fsdp)

    def max_over_ranks(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
