"""[`IGPOTrainer`]: TRL's `GRPOTrainer` with turn-level advantages from information gain."""

import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, PreTrainedTokenizerBase
from trl.trainer.utils import get_config_model_id

from .advantages import turn_advantages
from .beliefs import check_beliefs, reduce_aliases, score_beliefs
from .checks import (
    answers_of,
    check_answers,
    check_conversational,
    check_processing_class,
    check_trl_version,
    environment_rewards,
    named_datasets,
)
from .config import IGPOConfig
from .observations import ObservationEncoder
from .probes import build_probes, fit_template
from .rewards import make_answer_reward
from .rollout import MultiTurnTrainer
from .trajectory import Trajectory, Turn, write_jsonl
from .turns import expand_to_tokens, turn_spans


class IGPOTrainer(MultiTurnTrainer):
    """
    Trainer for Information Gain-based Policy Optimization (IGPO, arXiv 2510.14967).

    What changes with respect to `trl.GRPOTrainer`, and nothing else does:

    - After a rollout, the policy's teacher-forced belief in the right answer is scored before every turn; the rise
      over a turn is that turn's reward, and the sum of the reward functions that of the last turn.
    - `advantages` are (B, T) instead of (B,): each sampled token gets the advantage of its turn. Statistics are those
      of the whole group, also where it lies across processes.
    - The rounds of a rollout: all tool calls of all rollouts at once, limits with names, the KV cache kept between
      turns, processes in step ([`igpo_trl.rollout`]).
    - `reward_funcs` may be left out: [`answer_reward`] then scores the F1 of the last turn's answer.
    - Metrics of gains, beliefs, turns and collapse; optional records of every rollout (`save_trajectories`).

    With `info_gain_weight=0` (and a mode other than `"critic"`) no belief is scored and the advantages are GRPO's,
    bit for bit. Evaluation never scores beliefs.

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
        if uses_tools and args.max_tool_response_tokens is not None:
            ObservationEncoder(processing_class, max_tokens=args.max_tool_response_tokens)  # raises if that is too few
        default_reward = reward_funcs is None and not environment_rewards(kwargs.get("environment_factory"))
        if args.uses_beliefs or default_reward:
            check_answers(train_dataset, args.answer_column, "train_dataset")
        if train_dataset is not None and uses_tools:
            check_conversational(train_dataset)
        if default_reward:
            reward_funcs = make_answer_reward(args.answer_column, format_penalty=args.format_penalty)
            for name, dataset in named_datasets(eval_dataset):
                check_answers(dataset, args.answer_column, name)
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        self._declare_output_head()
        self._probe_template = fit_template(args.answer_template, self._generation_prompt())
        self._belief_method: Any = None  # until "auto" has been compared with plain forwards, on the first batch
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

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        self._outcomes = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._outcomes

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        batch = _TurnBatch(output)
        mode = "train" if self.model.training else "eval"
        turns = self.accelerator.gather(batch.num_turns).float()
        self._metrics[mode]["rollout/turns/mean"].append(turns.mean().item())
        self._metrics[mode]["rollout/turns/max"].append(turns.max().item())
        if mode == "train" and self.args.uses_beliefs:
            output["advantages"] = self._turn_level_advantages(inputs, batch)
        elif self.log_completions:
            self._log_turns(None)
        if mode == "train" and self.args.save_trajectories:
            self._save_trajectories(inputs, output, batch)
        return output

    def _turn_level_advantages(self, inputs: list[dict[str, Any]], batch: "_TurnBatch") -> torch.Tensor:
        """Advantages (B, T) of this process's rollouts, from the whole batch's gains and outcomes."""
        args = self.args
        started = time.perf_counter()
        log_belief = self._score_turns(inputs, batch)  # (B, K), NaN where not scored
        self._metrics["train"]["belief/seconds"].append(time.perf_counter() - started)

        level = log_belief if args.info_gain == "log_prob_diff" else log_belief.exp()
        gain = torch.nn.functional.pad(level[:, 1:] - level[:, :-1], (0, 1), value=torch.nan)
        # K differs between processes: pad to the longest, then every process sees the whole batch.
        local = torch.stack([gain, log_belief.exp()], dim=-1)
        shared = self.accelerator.gather(
            self.accelerator.pad_across_processes(local, dim=1, pad_index=torch.nan)
        ).cpu()  # small, and float64 is not to be had on every accelerator
        gain, belief = shared[..., 0].contiguous(), shared[..., 1].contiguous()
        num_turns = self.accelerator.gather(batch.num_turns).cpu()
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
        self._log_gains(gain, belief, outcome, num_turns, advantages, (gain_weight, outcome_weight))
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        width = batch.starts.shape[1]
        batch.gain, batch.belief, batch.advantages = (x[mine, :width] for x in (gain, belief, advantages))
        return expand_to_tokens(batch.advantages.to(batch.turn_index.device), batch.turn_index)

    def _score_turns(self, inputs: list[dict[str, Any]], batch: "_TurnBatch") -> torch.Tensor:
        """Log-belief before every turn of this process's rollouts, (B, K); NaN beyond the last turn or unscored."""
        args = self.args
        probes_of = {
            aliases: build_probes(self._tokenizer, aliases, self._probe_template, args.max_answer_tokens)
            for aliases in {answers_of(row, args.answer_column) for row in inputs}
        }
        # A single turn has no gain, so only the critic needs its belief.
        minimum = 1 if args.normalization == "critic" else 2
        scored = [n >= minimum for n in batch.num_turns.tolist()]
        rollouts = (
            batch.sequences,
            [bounds if wanted else [] for bounds, wanted in zip(batch.boundaries, scored, strict=True)],
            [probes_of[answers_of(row, args.answer_column)] for row in inputs],
        )
        with self.accelerator.autocast():
            if self._belief_method is None:
                refused = args.belief_method == "auto" and check_beliefs(
                    self.model, *rollouts, synchronize=self._most_of_all_processes
                )
                self._belief_method = "per_turn" if refused else args.belief_method
            log_probs = score_beliefs(
                self.model,
                *rollouts,
                method=self._belief_method,
                tokens_per_batch=args.belief_tokens_per_batch,
                synchronize=self._most_of_all_processes,
            )
        log_belief = torch.full(batch.starts.shape, torch.nan)
        for i, values in enumerate(log_probs):
            log_belief[i, : len(values)] = reduce_aliases(values, args.alias_reduction) if len(values) else torch.nan
        return log_belief.to(self.accelerator.device)

    def _most_of_all_processes(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _outcome(self) -> torch.Tensor:
        """Weighted sum of the reward functions for the global batch; NaN where none applies, as in TRL."""
        rewards = self._outcomes
        assert rewards is not None  # set by `_calculate_rewards`, which the parent has called
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _log_gains(
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
        gains = gain[(turn < last) & ~gain.isnan()]
        if len(gains):
            metrics["info_gain/mean"].append(gains.mean().item())
            metrics["info_gain/std"].append(gains.std(correction=0).item())
            metrics["info_gain/positive"].append((gains > 0).float().mean().item())
        if not belief[:, 0].isnan().all():
            metrics["belief/prompt"].append(belief[:, 0].nanmean().item())
            metrics["belief/final"].append(belief.gather(1, last).nanmean().item())
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

    def _save_trajectories(self, inputs: list[dict[str, Any]], output: dict[str, Any], batch: "_TurnBatch") -> None:
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
                    outcome=_number(outcome[i]),
                    rewards={n: _number(r) for n, r in zip(self.reward_func_names, rewards[i], strict=True)},
                    step=self.state.global_step,
                    group=(first + i) // self.num_generations,
                    stop_reason=stops[i] if stops else None,
                )
            )
        folder = Path(self.args.output_dir) / "trajectories"
        write_jsonl(folder / f"rank{self.accelerator.process_index}.jsonl", trajectories, append=True)


class _TurnBatch:
    """The turns of one process's rollouts, read off the parent's output."""

    def __init__(self, output: dict[str, Any]):
        completion_mask = output["completion_mask"]
        lengths = completion_mask.sum(dim=1)
        sampled_mask = output.get("tool_mask")
        self.turn_index, self.starts, self.num_turns = turn_spans(
            completion_mask if sampled_mask is None else sampled_mask, lengths
        )
        self.prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        self.completions = [
            ids[:length] for ids, length in zip(output["completion_ids"].tolist(), lengths.tolist(), strict=True)
        ]
        starts = self.starts.tolist()
        self.positions = [row[:n] for row, n in zip(starts, self.num_turns.tolist(), strict=True)]
        self.sequences = [prompt + ids for prompt, ids in zip(self.prompts, self.completions, strict=True)]
        self.boundaries = [
            [len(prompt) + start for start in row] for prompt, row in zip(self.prompts, self.positions, strict=True)
        ]
        # (B, K), set once scored
        self.gain: torch.Tensor | None = None
        self.belief: torch.Tensor | None = None
        self.advantages: torch.Tensor | None = None

    def turns_of(self, i: int, tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
        """Decoded turns of rollout i with their beliefs and gains."""
        ids, starts = self.completions[i], self.positions[i]
        sampled = (self.turn_index[i][:, None] == torch.arange(len(starts), device=self.turn_index.device)).sum(dim=0)
        turns = []
        for k, (start, length) in enumerate(zip(starts, sampled.tolist(), strict=True)):
            behind = starts[k + 1] if k + 1 < len(starts) else len(ids)
            turns.append(
                Turn(
                    text=tokenizer.decode(ids[start : start + length]),
                    observation=tokenizer.decode(ids[start + length : behind]) if behind > start + length else "",
                    num_tokens=length,
                    belief=_number(self.belief[i, k].item()) if self.belief is not None else None,
                    info_gain=_number(self.gain[i, k].item())
                    if self.gain is not None and k + 1 < len(starts)
                    else None,
                )
            )
        return turns


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value
