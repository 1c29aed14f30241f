"""[`IGPOTrainer`]: TRL's `GRPOTrainer` with turn-level advantages from information gain."""

import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import get_config_model_id

from .advantages import turn_advantages
from .belief_trainer import BeliefTrainer
from .checks import (
    answers_of,
    check_answers,
    check_conversational,
    check_processing_class,
    check_tool_names,
    check_trl_version,
    environment_rewards,
    named_datasets,
)
from .config import IGPOConfig
from .rewards import exact_match, extract_answer, f1_score, last_assistant_text, make_answer_reward
from .rollout.observations import ObservationEncoder
from .step import TurnBatch, number_or_none
from .trajectory import Trajectory, drop_later, write_jsonl
from .turns import expand_to_tokens


class _ForgetLaterRollouts(TrainerCallback):
    """Removes records of rollouts that were sampled after the checkpoint that training goes on from."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            if state.is_world_process_zero:
                for path in Path(args.output_dir, "trajectories").glob("*.jsonl"):
                    drop_later(path, state.global_step)
            PartialState().wait_for_everyone()


class IGPOTrainer(BeliefTrainer):
    """
    Trainer for Information Gain-based Policy Optimization (IGPO, arXiv 2510.14967).

    What changes with respect to `trl.GRPOTrainer`, and nothing else does:

    - After a rollout, the policy's teacher-forced belief in the right answer is scored before every turn; the rise
      over a turn is that turn's reward, and the sum of the reward functions that of the last turn.
    - `advantages` are (B, T) instead of (B,): each sampled token gets the advantage of its turn. Statistics are those
      of the whole group, also where it lies across processes.
    - The rounds of a rollout: all tool calls of all rollouts at once, limits with names, the KV cache kept between
      turns, processes in step ([`igpo_trl.rollout.loop`]).
    - `reward_funcs` may be left out: [`answer_reward`] then scores the F1 of the last turn's answer.
    - Metrics of gains, beliefs, turns and collapse; optional records of every rollout (`save_trajectories`).

    With `info_gain_weight=0` (and a mode other than `"critic"`) no belief is scored and the advantages are GRPO's,
    bit for bit. Evaluation scores beliefs only with `belief_at_eval`.

    Evaluation reports `eval_f1` and `eval_exact_match` of the answers whatever the reward functions are, and with a
    dict of data sets `eval_<set>_f1` and so on, with their averages over the sets as `eval_f1` and so on. `evaluate`
    returns every metric, so that `metric_for_best_model` can name any of them.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): as in `GRPOTrainer`; text models only.
        reward_funcs (*optional*): as in `GRPOTrainer`. Defaults to [`answer_reward`] on `args.answer_column`, unless
            the environment owns the reward (`get_reward`).
        args ([`IGPOConfig`], *optional*): configuration.
        train_dataset (`Dataset` or `IterableDataset`): needs the columns `prompt` and `args.answer_column`.
        eval_dataset (*optional*), processing_class (*optional*): as in `GRPOTrainer`.
        kwargs: every other argument of `GRPOTrainer` (`tools`, `environment_factory`, `rollout_func`, `peft_config`,
            `callbacks`, …).

    Raises:
        `ImportError`: if TRL's minor version is another than the supported one.
        `TypeError`, `ValueError`: before the model is loaded, if the processor is multi-modal, the chat template
            is missing or cannot call tools, the answers column is missing, or an answer is empty or not a string
            (the message names the row).
    """

    _tag_names = ["trl", "igpo"]
    _name = "IGPO"
    _paper = {
        "title": "Information Gain-based Policy Optimization: "
        "A Simple and Effective Approach for Multi-Turn LLM Agents",
        "id": "2510.14967",
        "citation": textwrap.dedent("""\
            @inproceedings{wang2026igpo,
                title        = {{Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents}},
                author       = {Guoqing Wang and Sunhao Dai and Guangze Ye and Zeyu Gan and Wei Yao and Yong Deng and Xiaofeng Wu and Zhenzhe Ying},
                year         = 2026,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2510.14967},
            }"""),  # noqa: E501
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: IGPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        check_trl_version()
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = IGPOConfig(f"{model_id.split('/')[-1]}-IGPO")
        elif not isinstance(args, IGPOConfig):
            raise TypeError(
                f"`args` must be an IGPOConfig, got {type(args).__name__}. It takes every argument of GRPOConfig."
            )
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                model_id,
                revision=(args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None,
                truncation_side="left",
                padding_side="left",
                trust_remote_code=args.trust_remote_code,
            )
        uses_tools = bool(kwargs.get("tools") or kwargs.get("environment_factory"))
        if not uses_tools and kwargs.get("rollout_func") is None:
            warnings.warn(
                "Neither `tools` nor `environment_factory` is given: every rollout is a single turn, which has no "
                "information gain, and training is plain GRPO. Pass `tools=[...]` to train an agent.",
                UserWarning,
                stacklevel=2,
            )
        check_processing_class(processing_class, uses_tools)
        if kwargs.get("environment_factory") is None:  # else the tools are known only once there is an environment
            check_tool_names(args.info_gain_tools, kwargs.get("tools"))
        if uses_tools and args.max_tool_response_tokens is not None:
            ObservationEncoder(processing_class, max_tokens=args.max_tool_response_tokens)  # raises if that is too few
        default_reward = reward_funcs is None and not environment_rewards(kwargs.get("environment_factory"))
        if args.uses_beliefs or default_reward:
            check_answers(train_dataset, args.answer_column, "train_dataset")
        if train_dataset is not None and uses_tools:
            check_conversational(train_dataset)
        if default_reward:
            reward_funcs = make_answer_reward(args.answer_column, format_penalty=args.format_penalty)
        if default_reward or args.belief_at_eval:
            for name, dataset in named_datasets(eval_dataset):
                check_answers(dataset, args.answer_column, name)
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        self._declare_output_head()
        if args.save_trajectories:
            self.add_callback(_ForgetLaterRollouts())
        self._outcomes: torch.Tensor | None = None  # (global batch, reward functions) of the batch being scored

    def _declare_output_head(self) -> None:
        """
        Tell ZeRO-3 that the model's own forward uses the weight of its output head.

        TRL's loss reads that weight without calling the head. DeepSpeed notices by itself, but not while the weight is
        being prefetched, which it is as soon as another forward, such as a belief pass, has gone before: the backward
        then finds it given up.
        """
        if not self._dist.is_zero3:
            return
        import deepspeed

        model: Any = self.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = model.get_output_embeddings()
        for parameter in (head.weight, head.bias):
            if parameter is not None:
                deepspeed.zero.register_external_parameter(model, parameter)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        self._outcomes = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.model.training and self.args.answer_column in inputs[0]:
            self._score_answers(inputs, completions)
        return self._outcomes

    def _score_answers(self, inputs: list[dict[str, Any]], completions: list[Any]) -> None:
        """F1 and exact match of the answers, whatever the reward functions are: what runs are compared by."""
        predictions = [extract_answer(last_assistant_text(completion)) for completion in completions]
        truths = [answers_of(row, self.args.answer_column) for row in inputs]
        for name, score in (("f1", f1_score), ("exact_match", exact_match)):
            local = [score(prediction, truth) for prediction, truth in zip(predictions, truths, strict=True)]
            values = self.accelerator.gather(torch.tensor(local, device=self.accelerator.device))
            self._metrics["eval"][name].append(values.mean().item())

    # --------------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(sets, dict):
            return metrics
        averages = {}
        for name in ("f1", "exact_match", "reward"):
            values = [metrics.get(f"{metric_key_prefix}_{of}_{name}") for of in sets]
            if values and all(value is not None for value in values):
                averages[f"{metric_key_prefix}_{name}"] = sum(values) / len(values)
        self.log(dict(averages))
        return metrics | averages

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # TRL adds what it has gathered to the log alone, and always under `eval_`: neither the caller of `evaluate`
        # nor the choice of the best checkpoint sees it, and the sets of a dict could not be told apart.
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, values in self._metrics["eval"].items():
            if valid := [value for value in values if value == value]:
                output.metrics[f"{prefix}_{name}"] = sum(valid) / len(valid)
        self._metrics["eval"].clear()
        return output

    # --------------------------------------------------------------------------------------------------- advantages

    def _finish_batch(self, inputs: list[dict[str, Any]], output: dict[str, Any], batch: TurnBatch) -> None:
        training = self.model.training
        if training and batch.gains is not None:
            output["advantages"] = self._turn_level_advantages(batch)
        elif self.log_completions:
            self._log_turns(None)
        if training and self.args.save_trajectories:
            self._save_trajectories(inputs, output, batch)

    def _turn_level_advantages(self, batch: TurnBatch) -> torch.Tensor:
        """Advantages (B, T) of this process's rollouts, from the whole batch's gains and outcomes."""
        args, gain, belief, num_turns = self.args, batch.gains, batch.beliefs, batch.counts
        assert gain is not None and belief is not None and num_turns is not None  # or there would be nothing to do
        outcome = self._outcome().cpu()
        gain_weight, outcome_weight = args.weights_at(self.state.global_step / max(1, self.state.max_steps))
        advantages = turn_advantages(
            gain,
            outcome,
            num_turns,
            self.num_generations,
            normalization=args.normalization,
            gamma=args.gamma,
            scale=args.scale_rewards,
            info_gain_weight=gain_weight,
            outcome_weight=outcome_weight,
            std_floor=args.std_floor,
            beliefs=belief,
            gae_lambda=args.gae_lambda,
        )
        self._log_advantages(gain, belief, outcome, num_turns, advantages, (gain_weight, outcome_weight))
        count, width = batch.starts.shape
        batch.advantages = advantages[self.accelerator.process_index * count :][:count, :width]
        return expand_to_tokens(batch.advantages.to(batch.turn_index.device), batch.turn_index)

    def _outcome(self) -> torch.Tensor:
        """Weighted sum of the reward functions for the global batch; NaN where none applies, as in TRL."""
        rewards = self._outcomes
        assert rewards is not None  # set by `_calculate_rewards`, which the parent has called
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _log_advantages(
        self,
        gain: torch.Tensor,
        belief: torch.Tensor,
        outcome: torch.Tensor,
        num_turns: torch.Tensor,
        advantages: torch.Tensor,
        weights: tuple[float, float],
    ) -> None:
        """Log metrics of the global batch, and replace TRL's scalar advantages by those that are used."""
        metrics = self._metrics["train"]
        last = (num_turns - 1)[:, None]
        turn = torch.arange(gain.shape[1], device=gain.device)
        groups = outcome.view(-1, self.num_generations)
        spread = groups.nan_to_num(-torch.inf).amax(dim=1) > groups.nan_to_num(torch.inf).amin(dim=1)
        moved = (advantages != 0).view(len(groups), -1).any(dim=1)
        metrics["collapse/outcome"].append(1 - spread.float().mean().item())
        metrics["collapse/advantage"].append(1 - moved.float().mean().item())
        is_turn = turn <= last
        metrics["advantages/abs_mean"].append(advantages[is_turn].abs().mean().item())
        for name, weight in zip(("info_gain_weight", "outcome_weight"), weights, strict=True):
            if getattr(self.args, f"{name}_end") is not None:
                metrics[name].append(weight)

        rollout_mean = (advantages.sum(dim=1) / num_turns).tolist()
        logged = list(self._logs["advantages"])[: -len(rollout_mean)] + rollout_mean
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(logged)
        if self.log_completions:
            beyond = ~is_turn
            self._log_turns(
                {
                    "belief": belief,
                    "info_gain": gain,
                    "turn_advantage": advantages.masked_fill(beyond, torch.nan),
                }
            )

    def _log_turns(self, values: dict[str, torch.Tensor] | None) -> None:
        """Columns of the completions table, one text per rollout; empty where nothing was scored (evaluation)."""
        num_rollouts = len(self._outcome())
        for name in ("belief", "info_gain", "turn_advantage"):
            texts = [""] * num_rollouts
            if values is not None:
                texts = [" ".join(f"{x:+.3f}" for x in row if x == x) for row in values[name].tolist()]
            self._logs["extra"][name].extend(texts)

    def _save_trajectories(self, inputs: list[dict[str, Any]], output: dict[str, Any], batch: TurnBatch) -> None:
        first = self.accelerator.process_index * len(inputs)
        outcome = self._outcome()[first : first + len(inputs)].tolist()
        rewards = self._outcomes[first : first + len(inputs)].tolist()  # type: ignore[index]
        stops = self._log_of_rounds.stops if self._log_of_rounds else []
        trajectories = []
        for i, row in enumerate(inputs):
            advantages = batch.advantages[i].tolist() if batch.advantages is not None else None
            scalar = None if advantages is not None else float(output["advantages"][i])
            turns = batch.turns_of(i, self._tokenizer)
            for k, turn in enumerate(turns):
                turn.advantage = scalar if advantages is None else advantages[k]
            trajectories.append(
                Trajectory(
                    prompt=self._tokenizer.decode(batch.prompts[i]),
                    turns=turns,
                    answers=list(answers_of(row, self.args.answer_column)) if self.args.answer_column in row else [],
                    outcome=number_or_none(outcome[i]),
                    rewards={n: number_or_none(r) for n, r in zip(self.reward_func_names, rewards[i], strict=True)},
                    step=self.state.global_step,
                    group=(first + i) // self.num_generations,
                    stop_reason=stops[i] if stops else None,
                )
            )
        folder = Path(self.args.output_dir) / "trajectories"
        write_jsonl(folder / f"rank{self.accelerator.process_index}.jsonl", trajectories, append=True)
