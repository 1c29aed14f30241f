"""Multi-turn rollouts: all turns of all rollouts at once, token-faithful, bounded, in step across processes.

[`MultiTurnTrainer`] replaces the tool loop of TRL's `GRPOTrainer`, and nothing else of it. In every round all tool
calls of all rollouts run together ([`igpo_trl.rollout`]), their results are encoded once ([`igpo_trl.rollout.observations`]),
and all rollouts that go on sample their next turn in one call of the parent's `_generate_single_turn`, on the
transformers backend with the KV cache of their earlier turns ([`igpo_trl.rollout.kv_cache`]).

A bad rollout is data: whatever a policy samples and a tool does ends in an observation or in a [`StopReason`].
"""

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from ..rewards import extract_answer
from ..trajectory import StopReason
from .kv_cache import PrefixCache, reuse_obstacle
from .observations import ObservationEncoder
from .round_log import RoundLog
from .tool_calls import CallSyntax, ToolCall, read_calls
from .tool_results import ToolErrorKind, ToolResult
from .tool_runner import ToolRunner

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass
class Rollout:
    """One rollout while it goes on."""

    index: int  # within this process's batch
    prompt: list[int]
    ids: list[int]  # completion so far: turns and observations
    mask: list[int]  # 1 on sampled tokens
    logprobs: list[float] | None
    messages: list[Message]
    tools: dict[str, Callable[..., Any]]
    environment: Any = None
    read: list[int] = field(default_factory=list)  # the last observation
    rounds: int = 0  # of tool calls
    calls: list[ToolCall] = field(default_factory=list)  # to be run before the next turn
    called: list[tuple[str, ...]] = field(default_factory=list)  # names of the tools that each turn called
    cut: bool = False  # the last turn has no end-of-turn token, for `max_turn_length` cut it off
    forced: bool = False  # has been asked to answer: the next turn is its last
    asks: bool = False  # is to be asked to answer before the next turn
    stop: StopReason | None = None


class MultiTurnTrainer(GRPOTrainer):
    """`GRPOTrainer` with another tool loop; takes the rollout arguments of [`IGPOConfig`]. See the module."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        options = self.args
        self._max_turn_length = min(options.max_turn_length or sys.maxsize, self.max_completion_length)
        if self.use_vllm:
            self.vllm_generation.max_completion_length = self._max_turn_length
        else:
            given = self.generation_config.max_new_tokens or self._max_turn_length
            self.generation_config.max_new_tokens = min(given, self._max_turn_length)
            self.generation_kwargs["max_new_tokens"] = self.generation_config.max_new_tokens
        self._log_of_rounds: RoundLog | None = None
        self._prefix_cache: PrefixCache | None = None
        self._active: Sequence[int] = ()  # rollouts whose next turn is being sampled
        self._next_turn_length: int | None = None  # longest turn that any of them has room for
        if not self.tools:
            return
        self._observations = ObservationEncoder(
            self._tokenizer, self.chat_template, self.chat_template_kwargs, options.max_tool_response_tokens
        )
        if options.forced_answer:  # a template that cannot render the request says so now
            request = {"role": "user", "content": options.forced_answer_prompt}
            self._observations.encode([[{"role": "tool", "name": "tool", "content": ""}, request]])
            if options.max_turn_length is not None:
                self._observations.encode([[request]])
        self._schemas: dict[Any, dict[str, Any]] = {}
        self._call_syntax = CallSyntax(self._tokenizer)
        self._tool_runner = ToolRunner(
            max_concurrent=options.max_concurrent_tool_calls,
            timeout=options.tool_timeout,
            loop=getattr(self, "async_loop", None),
        )
        # A forced answer is one turn more: the calls of the last ordinary turn are run for it.
        most_turns = (options.max_turns or sys.maxsize - 1) - 1 + bool(options.forced_answer)
        self._max_rounds = min(self.max_tool_calling_iterations, most_turns)
        self._reuses_prefixes = options.reuse_prefixes and self.rollout_func is None and self._can_reuse_prefixes()

    def _can_reuse_prefixes(self) -> bool:
        if self.use_vllm or self.use_transformers_continuous_batching:
            return False  # these backends have prefix caches of their own
        obstacle = reuse_obstacle(self.accelerator.unwrap_model(self.model), self.generation_config)
        if obstacle:
            logger.warning("The KV cache is not kept between turns: %s. Every turn runs its whole context.", obstacle)
        return obstacle is None

    # ---------------------------------------------------------------------------------------------- parent's hooks

    def _generate(self, prompts: list[Any]) -> Any:
        self._log_of_rounds = RoundLog()
        self._prefix_cache = PrefixCache() if self.tools and self._reuses_prefixes else None
        self._active, self._next_turn_length = range(len(prompts)), None
        try:
            with _value_errors_only(self._tokenizer):
                result = super()._generate(prompts)
        finally:
            self._prefix_cache = None  # its memory is needed for training
        if self.tools and self.rollout_func is None:
            mode = "train" if self.model.training else "eval"
            for name, value in self._log_of_rounds.metrics(self.accelerator).items():
                self._metrics[mode][name].append(value)
        return result

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if images:
            raise ValueError("IGPOTrainer supports text only, got prompts with images.")
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        room = self._next_turn_length
        if room is None:
            room = max(self._context_length() - len(ids) for ids in prompt_ids)
            if room < 1:
                raise ValueError(
                    f"A prompt has {max(map(len, prompt_ids))} tokens, which leaves no room in the model's context of "
                    f"{self._context_length()} tokens. Shorten the prompts, or use a model with a longer context."
                )
        model = self.accelerator.unwrap_model(self.model_wrapped)
        plain, cache = model.generate, self._prefix_cache

        def generate(input_ids: Any, attention_mask: Any, generation_config: Any, **rest: Any) -> Any:
            config = copy.copy(generation_config)
            if config.max_new_tokens is not None:
                config.max_new_tokens = min(config.max_new_tokens, room)
            rest["generation_config"] = config
            if cache is None or len(self._active) != len(input_ids):
                return plain(input_ids=input_ids, attention_mask=attention_mask, **rest)
            text_config = model.config.get_text_config()
            return cache.generate(plain, text_config, input_ids, attention_mask, self._active, **rest)

        own = vars(model).get("generate")  # FSDP2 models have one beside that of their class
        model.generate = generate
        try:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        finally:
            if own is None:
                del model.generate
            else:
                model.generate = own

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
        if images:
            raise ValueError("IGPOTrainer supports text only, got prompts with images.")
        rollouts = [
            Rollout(
                index=i,
                prompt=list(prompt_ids[i]),
                ids=[],
                mask=[],
                logprobs=None if logprobs is None else [],
                messages=[],
                tools={**self._sync_tool_dicts[i], **self._async_tool_dicts[i]},
                environment=self.environments[i] if self.environments else None,
            )
            for i in range(len(prompt_ids))
        ]
        for i, rollout in enumerate(rollouts):
            self._take_turn(rollout, completion_ids[i], logprobs and logprobs[i], completions[i][0])
        going_on = [rollout for rollout in rollouts if rollout.stop is None or rollout.asks]
        while True:
            self._observe(going_on)
            going_on = [rollout for rollout in going_on if rollout.stop is None or rollout.forced]
            self._release(rollouts, going_on)
            if not self._sample(going_on):
                break
            going_on = [rollout for rollout in going_on if not rollout.forced and (not rollout.stop or rollout.asks)]
        log = self._log_of_rounds
        assert log is not None  # set by `_generate`
        log.stops = [rollout.stop or StopReason.ANSWERED for rollout in rollouts]
        log.called = [rollout.called for rollout in rollouts]
        log.forced = sum(rollout.forced for rollout in rollouts)
        return (
            [rollout.mask for rollout in rollouts],
            [rollout.messages for rollout in rollouts],
            [rollout.ids for rollout in rollouts],
            None if logprobs is None else [rollout.logprobs for rollout in rollouts],
            log.calls,
            sum(log.errors.values()),
            [[] for _ in rollouts],
        )

    def _release(self, rollouts: Sequence[Rollout], going_on: Sequence[Rollout]) -> None:
        """Tell whom it concerns which rollouts the KV cache is about to drop."""
        cache = self._prefix_cache
        if cache is not None:
            kept = {rollout.index for rollout in going_on}
            leaving = [rollout for rollout in rollouts if rollout.index in cache and rollout.index not in kept]
            if leaving:
                self._before_release(leaving, cache)

    def _before_release(self, rollouts: Sequence[Rollout], cache: PrefixCache) -> None:
        """For subclasses: these rollouts have ended, and their keys and values are there a last time."""

    # ------------------------------------------------------------------------------------------------- one round

    def _observe(self, rollouts: Sequence[Rollout]) -> None:
        """Run the calls of these rollouts and append what they see next, or end those that have no room for it."""
        calls = [call for rollout in rollouts for call in rollout.calls]
        results = iter(self._run_tools(calls))
        observations = []
        for rollout in rollouts:
            messages = [{"role": "tool", "name": call.name, "content": next(results).text} for call in rollout.calls]
            rollout.rounds += bool(rollout.calls)
            if rollout.rounds >= self._max_rounds and self.args.forced_answer and not rollout.stop:
                rollout.stop, rollout.asks = StopReason.TURN_LIMIT, True
            if rollout.asks:
                messages.append({"role": "user", "content": self.args.forced_answer_prompt})
            observations.append(messages)
        encoded = self._observations.encode(observations)
        for rollout, messages, ids in zip(rollouts, observations, encoded, strict=True):
            self._append_observation(rollout, messages, ids)

    def _run_tools(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        assert self._log_of_rounds is not None  # set by `_generate`
        results = []
        for result in self._tool_runner.run(calls) if calls else []:
            text = self._observations.truncate(result.text)
            self._log_of_rounds.add(result, text != result.text)
            results.append(result._replace(text=text))
        return results

    def _append_observation(self, rollout: Rollout, messages: list[Message], ids: list[int]) -> None:
        # A turn that `max_turn_length` cut off is closed for the policy; it did not sample that token.
        closing = [self._tokenizer.eos_token_id] * rollout.cut
        room, reason = self._room(rollout)
        left = room - len(closing) - len(ids)
        if self.args.forced_answer and left < self._answer_room and (fitted := self._fit(rollout, messages, room)):
            messages, ids = fitted
            left = room - len(closing) - len(ids)
            rollout.asks, rollout.stop = True, rollout.stop or reason
        if left < 1:
            rollout.calls, rollout.asks, rollout.stop = [], False, rollout.stop or reason
        if left < 0:
            return
        rollout.read = closing + ids
        rollout.ids += rollout.read
        rollout.mask += [0] * len(closing + ids)
        if rollout.logprobs is not None:
            rollout.logprobs += [0.0] * len(closing + ids)
        rollout.messages += messages
        rollout.calls, rollout.cut, rollout.forced, rollout.asks = [], False, rollout.asks, False

    def _fit(self, rollout: Rollout, messages: list[Message], room: int) -> tuple[list[Message], list[int]] | None:
        """The observation with its tool results cut down until a request to answer and an answer fit behind it."""
        tools = [message for message in messages if message["role"] == "tool"]
        request = {"role": "user", "content": self.args.forced_answer_prompt}
        (empty,) = self._observations.encode([[*({**message, "content": ""} for message in tools), request]])
        each = (room - rollout.cut - len(empty) - self._answer_room) // max(1, len(tools))
        if each < 0:
            return None
        cut = [{**message, "content": self._observations.truncate(message["content"], each)} for message in tools]
        (ids,) = self._observations.encode([[*cut, request]])
        return ([*cut, request], ids) if room - rollout.cut - len(ids) >= 1 else None

    def _sample(self, rollouts: Sequence[Rollout]) -> bool:
        """Sample the next turn of these rollouts; false once no process has any."""
        active = torch.tensor([len(rollouts)], device=self.accelerator.device)
        if not self.accelerator.gather(active).any():
            return False
        if not rollouts:
            # Sharded models and vLLM servers make every process take part in every generation.
            if self._dist.is_zero3 or self._dist.is_fsdp or self.use_vllm:
                self._active, self._next_turn_length = (), 1
                self._generate_single_turn([self._idle_prompt], None, {}, num_generations=1)
            return True
        rooms = [min(self._room(rollout)[0], self._max_turn_length) for rollout in rollouts]
        self._active, self._next_turn_length = [rollout.index for rollout in rollouts], max(rooms)
        contexts = [rollout.prompt + rollout.ids for rollout in rollouts]
        turns, logprobs = self._generate_single_turn(contexts, None, {}, num_generations=1)
        for i, (rollout, room) in enumerate(zip(rollouts, rooms, strict=True)):
            sampled, schemas = list(turns[i][:room]), self._schemas_of(rollout)
            # The parser looks for the generation prompt alone, so it is spared the rest of the context.
            message = parse_response(self._tokenizer, sampled, prefix=rollout.read, tools=schemas) if sampled else None
            self._take_turn(rollout, sampled, logprobs and logprobs[i][:room], message)
        return True

    # -------------------------------------------------------------------------------------------------- one turn

    def _take_turn(
        self, rollout: Rollout, ids: list[int], logprobs: list[float] | None, message: Message | None
    ) -> None:
        """Append a sampled turn, and decide what follows it: its calls, a request to answer, or the end."""
        rollout.ids += ids
        rollout.mask += [1] * len(ids)
        rollout.called.append(())
        if rollout.logprobs is not None and logprobs is not None:
            rollout.logprobs += logprobs
        if message is None:
            rollout.stop = rollout.stop or StopReason.EMPTY
            return
        rollout.messages.append(message)
        if rollout.forced:
            return
        limit = self._limit(rollout, ids)
        if limit in (StopReason.LENGTH_LIMIT, StopReason.CONTEXT_LIMIT):
            rollout.stop = limit
            return
        calls, malformed = self._read_calls(rollout, ids, message)
        answered = extract_answer(message.get("content") or "") is not None
        if answered or not calls or (malformed and limit):
            # An answer is final: calls in the same turn are not run.
            rollout.stop = (None if answered else limit) or StopReason.ANSWERED
            rollout.cut = rollout.asks = self.args.forced_answer and not answered and limit is not None
        elif malformed and self.args.on_malformed_tool_call == "end":
            rollout.stop = StopReason.MALFORMED
        elif rollout.rounds >= self._max_rounds:
            rollout.stop = StopReason.TURN_LIMIT
        else:
            rollout.calls, rollout.cut = calls, limit is not None
            rollout.called[-1] = tuple(call.name for call in calls if call.problem is None)

    def _read_calls(self, rollout: Rollout, ids: list[int], message: Message) -> tuple[list[ToolCall], bool]:
        """Calls of a turn; a call that cannot be read is one with an error as its result, and makes the flag true."""

        def order(function: Callable[..., Any]) -> int | None:
            """Methods of one environment run one after another, also behind a hung call of an earlier step."""
            owner = getattr(function, "__self__", None)
            return id(owner) if owner is not None and owner is rollout.environment else None

        calls = read_calls(message.get("tool_calls"), rollout.tools, order)
        if calls:
            return calls, any(call.problem and call.problem.error == ToolErrorKind.MALFORMED for call in calls)
        problem = self._call_syntax.problem(ids, rollout.read or rollout.prompt)
        if problem is None:
            return [], False
        result = ToolResult(f"Error: {problem}", ToolErrorKind.MALFORMED)
        return [ToolCall(next(iter(rollout.tools), "tool"), {}, None, problem=result)], True

    def _schemas_of(self, rollout: Rollout) -> list[dict[str, Any]]:
        """JSON schemas of the rollout's tools, by which the parser converts arguments; made once for each tool."""
        # Methods of environments of one class share their function.
        functions = [getattr(function, "__func__", function) for function in rollout.tools.values()]
        for function, bound in zip(functions, rollout.tools.values(), strict=True):
            if function not in self._schemas:
                self._schemas[function] = get_json_schema(bound)
        return [self._schemas[function] for function in functions]

    def _limit(self, rollout: Rollout, turn: list[int]) -> StopReason | None:
        """The limit that cut this turn off, or `None` if the policy ended it."""
        if turn and turn[-1] in (*self.eos_token_ids, self._tokenizer.pad_token_id):
            return None
        room, reason = self._room(rollout)
        if room < 1:
            return reason
        return StopReason.TURN_LENGTH_LIMIT if len(turn) >= self._max_turn_length else None

    # ---------------------------------------------------------------------------------------------------- limits

    def _room(self, rollout: Rollout) -> tuple[int, StopReason]:
        """Tokens that may still follow, and the limit that says so."""
        completion = self.max_completion_length - len(rollout.ids)
        context = self._context_length() - len(rollout.prompt) - len(rollout.ids)
        if context < completion:
            return context, StopReason.CONTEXT_LIMIT
        return completion, StopReason.LENGTH_LIMIT

    def _context_length(self) -> int:
        if self.use_vllm and self.vllm_mode == "colocate":
            return int(self.vllm_generation.llm.llm_engine.model_config.max_model_len)
        configured = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        served = self.args.vllm_max_model_length if self.use_vllm else None
        return min(configured, served or sys.maxsize)

    @property
    def _answer_room(self) -> int:
        """Tokens kept for a forced answer."""
        return min(self.args.forced_answer_length, self._max_turn_length, self.max_completion_length // 8)

    @property
    def _idle_prompt(self) -> list[int]:
        return [self._tokenizer.eos_token_id]


@contextmanager
def _value_errors_only(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """TRL takes a `ValueError` of the parser for a malformed call; a deeply nested one is a `RecursionError`."""
    parse, own = tokenizer.parse_response, vars(tokenizer).get("parse_response")

    def parse_or_value_error(*args: Any, **kwargs: Any) -> Any:
        try:
            return parse(*args, **kwargs)
        except (RecursionError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    tokenizer.parse_response = parse_or_value_error
    try:
        yield
    finally:
        if own is None:
            del tokenizer.parse_response
        else:
            tokenizer.parse_response = own
