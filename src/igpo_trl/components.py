"""What [`IGPOTrainer`] is composed of, made once from its configuration after the model is loaded."""

import logging
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import httpx2
from accelerate.utils import broadcast_object_list
from transformers import AutoProcessor

from .beliefs.probes import fit_template
from .beliefs.scorer import BeliefScorer
from .beliefs.scoring import AliasReduction, Method
from .rollout.kv_cache import reuse_obstacle
from .rollout.loop import RolloutLoop
from .rollout.observations import ObservationEncoder
from .rollout.state import Rollout, RolloutLimits
from .rollout.tool_failures import FailureWatch, where_to_resume
from .rollout.tool_runner import ToolRunner
from .step import Step
from .training.belief_model import Reference, Snapshot

logger = logging.getLogger(__name__)

PAPER = {
    "title": "Information Gain-based Policy Optimization: A Simple and Effective Approach for Multi-Turn LLM Agents",
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


def load_processing_class(model_id: str, args: Any, revision: str | None) -> Any:
    """The processing class that is saved with the model."""
    return AutoProcessor.from_pretrained(
        model_id,
        revision=revision,
        truncation_side="left",
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )


def make_belief_scorer(trainer: Any) -> BeliefScorer:
    """The scorer of beliefs in the trainer's answers, after its own generation prompt."""
    args, processing_class, prompt = trainer.args, trainer.processing_class, ""
    if processing_class.chat_template is not None:
        prompt = processing_class.apply_chat_template(
            [{"role": "user", "content": ""}],
            add_generation_prompt=True,
            tokenize=False,
            chat_template=trainer.chat_template,
            **trainer.chat_template_kwargs,
        )
    return BeliefScorer(
        trainer._tokenizer,
        fit_template(args.answer_template, prompt),
        method=cast(Method, args.belief_method),
        alias_reduction=cast(AliasReduction, args.alias_reduction),
        max_answer_tokens=args.max_answer_tokens,
        tokens_per_batch=args.belief_tokens_per_batch,
        max_over_ranks=trainer.max_over_ranks,
    )


def make_belief_model(trainer: Any) -> Reference | Snapshot | None:
    """What scores beliefs if it is not the policy, whose KV caches are then of no use; `None` if it is."""
    args = trainer.args
    if args.belief_model == "reference":
        if trainer.ref_model is None and not hasattr(trainer.model, "disable_adapter"):
            raise ValueError(
                "`belief_model='reference'` needs a reference model: train an adapter (`peft_config`), which is "
                "switched off to score beliefs, or set `beta` above 0, got neither."
            )
        return Reference(trainer.ref_model)
    if args.belief_model == "snapshot":
        if trainer.is_sharded:
            raise ValueError(
                "`belief_model='snapshot'` copies the weights, which FSDP and ZeRO-3 shard. Use DDP or ZeRO-2, or "
                "`belief_model='reference'`."
            )
        return Snapshot(args.belief_snapshot_steps)
    return None


def running_state(trainer: Any) -> dict[str, Any]:
    """What changes from batch to batch besides weights, by name; see [`ResumesExactly`]."""
    loop, belief_model = trainer._rollout_loop, trainer._belief_model
    return {
        "belief_scorer": trainer._belief_scorer,
        "metric_weights": trainer._metric_weights["train"],
        "first_calls": trainer._first_calls,
        "turn_beliefs": trainer.turn_beliefs,
        **{f"watch {name}": watch for name, watch in trainer._watches.items()},
        **({"failures": loop.failure_watch} if loop is not None and loop.failure_watch is not None else {}),
        **({"belief_model": belief_model} if isinstance(belief_model, Snapshot) else {}),
    }


def make_step(trainer: Any, rows: list[dict[str, Any]]) -> Step:
    """The state of a generation batch of these rows, before its rollouts."""
    args, training = trainer.args, trainer.is_training
    step = Step(
        rows,
        training,
        num_generations=trainer.num_generations,
        answer_column=args.answer_column,
        info_gain=args.info_gain,
        gain_clip=args.gain_clip,
        info_gain_every=args.info_gain_every,
        info_gain_tools=args.info_gain_tools,
        scores_every_turn=args.normalization == "critic" or not training,
        optimizer_step=trainer.state.global_step,
        rank=trainer.accelerator.process_index,
        num_counted=trainer.count_rollouts(len(rows)),
        started=time.perf_counter(),
    )
    if args.uses_beliefs if training else args.belief_at_eval:
        # The parent's own condition for that forward, which has no name there.
        computes_old_log_probs = args.gradient_accumulation_steps % (
            args.steps_per_generation * trainer.num_iterations
        ) != 0 or (trainer.use_vllm and trainer.vllm_importance_sampling_correction)
        scores_earlier = trainer._belief_model is not None or (trainer._reuses_prefixes and not trainer.is_sharded)
        step.captures_old_log_probs = computes_old_log_probs and not scores_earlier
    return step


def make_rollout_loop(trainer: Any) -> RolloutLoop:
    """The loop of a trainer with tools."""
    args = trainer.args
    # A forced answer is one more turn: the calls of the last ordinary turn run for it.
    max_rounds = (args.max_turns or sys.maxsize - 1) - 1 + bool(args.forced_answer)
    return RolloutLoop(
        trainer._tokenizer,
        RolloutLimits(
            max_completion_length=trainer.max_completion_length,
            max_turn_length=max_turn_length(trainer),
            max_new_tokens=(args.generation_kwargs or {}).get("max_tokens" if trainer.use_vllm else "max_new_tokens")
            or sys.maxsize,
            context_length=context_length(trainer),
            max_rounds=min(trainer.max_tool_calling_iterations, max_rounds),
            forced_answer_prompt=args.forced_answer_prompt if args.forced_answer else None,
            forced_answer_length=args.forced_answer_length,
            on_malformed_tool_call=args.on_malformed_tool_call,
            stop_tools=frozenset(args.stop_tools or ()),
        ),
        ObservationEncoder(
            trainer._tokenizer, trainer.chat_template, trainer.chat_template_kwargs, args.max_tool_response_tokens
        ),
        ToolRunner(
            max_concurrent=args.max_concurrent_tool_calls,
            timeout=args.tool_timeout,
            loop=getattr(trainer, "async_loop", None),
        ),
        sample=lambda contexts, rollouts, length: trainer._generate_single_turn(
            contexts, None, {}, 1, rollouts=rollouts, max_new_tokens=length
        ),
        any_rank=lambda flag: trainer.max_over_ranks(int(flag)) > 0,
        end_token_ids=trainer.eos_token_ids,
        idle_ranks_sample=True,  # which is no work, unless ranks sample in step
        failure_watch=FailureWatch(args.max_tool_failures, args.tool_failure_patience, args.output_dir),
        show_progress=not args.disable_tqdm and trainer.is_world_process_zero(),
    )


def samples_in_step(trainer: Any) -> bool:
    """Whether every process has to take part in every sampling."""
    # The main process asks a vLLM server for all, and the processes of a tensor-parallel engine sample together.
    one_engine = trainer.use_vllm and (
        trainer.vllm_mode == "server" or trainer.vllm_generation.tensor_parallel_size > 1
    )
    return bool(trainer.is_sharded or one_engine)


class ServerGone(ConnectionError):
    """The vLLM server does not answer any more."""


@contextmanager
def server_watched(trainer: Any) -> Iterator[None]:
    """Replaces whatever error TRL's client raises by [`ServerGone`] if there is no vLLM server any more."""
    try:
        yield
    except Exception as error:
        client = getattr(trainer.vllm_generation, "vllm_client", None)  # only the main process has one
        if client is None or _is_up(client.base_url):
            raise
        raise ServerGone(
            f"the vLLM server at {client.base_url} does not answer any more. Start it again "
            f"{where_to_resume(trainer.args.output_dir)}"
        ) from error


def _is_up(server: str) -> bool:
    try:
        return httpx2.get(f"{server}/health", timeout=10).is_success
    except httpx2.HTTPError:
        return False


def make_rollouts(trainer: Any, prompt_ids: Sequence[Sequence[int]], with_logprobs: bool) -> list[Rollout]:
    """The rollouts of a batch, before their first turns."""
    return [
        Rollout(
            index=i,
            prompt_ids=list(ids),
            tools={**trainer._sync_tool_dicts[i], **trainer._async_tool_dicts[i]},
            environment=trainer.environments[i] if trainer.environments else None,
            logprobs=[] if with_logprobs else None,
        )
        for i, ids in enumerate(prompt_ids)
    ]


def max_turn_length(trainer: Any) -> int:
    """Longest turn, in tokens."""
    return min(trainer.args.max_turn_length or sys.maxsize, trainer.max_completion_length)


def context_length(trainer: Any) -> int:
    """Longest context of the model, in tokens."""
    configured = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    if not trainer.use_vllm:
        return configured
    if trainer.vllm_mode == "colocate":
        return int(trainer.vllm_generation.llm.llm_engine.model_config.max_model_len)
    if not hasattr(trainer.vllm_generation, "max_model_len"):  # only the main process has a client
        lengths: list[int | None] = [None]
        if trainer.accelerator.is_main_process:
            try:
                info = trainer.vllm_generation.vllm_client.get_server_info()
                lengths = [int(info["model_config"]["max_model_len"])]
            except Exception as error:  # of a server without development endpoints, or of another version
                logger.warning("The vLLM server does not say how long its context is: %s", error)
        length = broadcast_object_list(lengths, from_process=0)[0]
        trainer.vllm_generation.max_model_len = length or min(
            configured, trainer.args.vllm_max_model_length or sys.maxsize
        )
    return int(trainer.vllm_generation.max_model_len)


def limit_generation(trainer: Any) -> None:
    """Make the backend stop a turn at its longest length."""
    longest = max_turn_length(trainer)
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = longest
        return
    config = trainer.generation_config
    # A model's own generation config must not bring several sequences: the options of the trainer are checked.
    for name in ("num_beams", "num_return_sequences"):
        setattr(config, name, 1)
        trainer.generation_kwargs[name] = 1
    config.max_new_tokens = min(config.max_new_tokens or longest, longest)
    trainer.generation_kwargs["max_new_tokens"] = config.max_new_tokens


def can_reuse_prefixes(trainer: Any) -> bool:
    """Whether the KV cache can be kept between turns; logs why not."""
    if not trainer.tools or not trainer.args.reuse_prefixes or trainer.rollout_func is not None:
        return False
    if trainer.use_vllm or trainer.use_transformers_continuous_batching:
        return False  # these backends have prefix caches of their own
    obstacle = reuse_obstacle(trainer.accelerator.unwrap_model(trainer.model), trainer.generation_config)
    if obstacle:
        logger.warning("The KV cache is not kept between turns: %s. Every turn runs its whole context.", obstacle)
    else:
        logger.info("The KV cache is kept between turns.")
    return obstacle is None


def declare_output_head(trainer: Any) -> None:
    """
    Tell ZeRO-3 that the model's own forward uses the weight of its output head.

    TRL's loss reads that weight without calling the head. DeepSpeed notices by itself, except while the weight is
    being prefetched, which it is as soon as another forward, such as a belief pass, came before: the backward pass
    then finds the weight released.
    """
    if not trainer._dist.is_zero3:
        return
    import deepspeed

    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    head = model.get_output_embeddings()
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            deepspeed.zero.register_external_parameter(model, parameter)
