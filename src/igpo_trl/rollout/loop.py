"""The rollout loop: all turns of all rollouts of a batch together, token-faithful, bounded, in step across ranks.

In every round the tool calls of all rollouts run at once, their results are encoded once, and all rollouts that
continue sample their next turn in one call. The loop knows neither a trainer nor a model: it is handed a function
that samples.

A bad rollout is data: whatever a policy samples and whatever a tool does ends in an observation or in a
[`StopReason`].
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl.chat_template_utils import parse_response

from ..trajectory import StopReason
from .observations import ObservationEncoder
from .progress import rollout_bar, show_turn
from .round_log import RoundLog
from .state import Rollout, RolloutLimits
from .tool_calls import ToolCall
from .tool_failures import FailureWatch
from .tool_results import ToolResult
from .tool_runner import ToolRunner
from .turn_reader import Message, Reading, TurnReader

#: Contexts, rollout indices and the most new tokens of any of them → a turn (token ids) per context, and its
#: log-probabilities where the backend gives them.
Sample = Callable[[list[list[int]], list[int], int], tuple[list[list[int]], list[list[float]] | None]]


class SampledTurns(NamedTuple):
    """The first turns of all rollouts: token ids, log-probabilities where the backend gives them, parsed messages."""

    ids: Sequence[list[int]]
    logprobs: Sequence[list[float]] | None
    messages: Sequence[Message]


class RolloutLoop:
    """
    Runs rollouts round by round until none continues on any rank.

    A round is: run the pending calls of all rollouts → append the observations → sample the next turns → read their
    calls. After a sampled turn the checks come in this order, and the first that holds decides:

    1. nothing was sampled: `empty`;
    2. the turn was the forced answer: the rollout keeps the stop reason of the limit that led to it;
    3. the turn was cut off by the completion or context limit: `length_limit` or `context_limit`;
    4. it holds an answer before any call: `answered`; calls after the answer are not run;
    5. it holds no call, or none that can be read because `max_turn_length` cut it off: `turn_length_limit` if that cut
       the turn off (the policy may then be asked to answer), else `answered`;
    6. it holds a malformed call and `on_malformed_tool_call="end"`: `malformed`;
    7. the rounds are used up, and it calls no stop tool: `turn_limit`;
    8. otherwise its calls run.

    A turn that calls a stop tool is the last: all its calls run, and nothing of their results is appended to the
    completion (`stop_tool`). It needs no room and no round after it, so these calls run in a forced answer and in a
    turn that a limit cuts off as well; the stop reason is then that of the limit. Only if every stop tool of the turn
    fails does the rollout continue as after any other call.

    After the calls ran, before the next turn: if the rounds are used up and a forced answer is wanted, the request
    comes with the last observation. An observation that leaves no room for another token ends the rollout
    (`length_limit` or `context_limit`); one that does not even fit is dropped. With a forced answer, tool results are
    cut down until the request and an answer fit.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a `response_template` that tool calls are parsed with.
        limits ([`RolloutLimits`]): what bounds a rollout.
        observations ([`ObservationEncoder`]): renders and encodes tool results.
        tool_runner ([`ToolRunner`]): runs the calls of a round.
        sample (`Callable`): samples the next turn of several rollouts, see `Sample`.
        any_rank (`Callable`): whether a flag is true on any rank; every rank calls it in every round.
        end_token_ids (list of `int`): tokens that end a turn, padding included.
        idle_ranks_sample (`bool`): whether a rank without rollouts must still take part in every sampling, as with
            sharded models and vLLM.
        failure_watch ([`FailureWatch`], *optional*): told how the tools have worked after every batch.
        show_progress (`bool`): whether a long batch has a progress bar on a terminal.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: RolloutLimits,
        observations: ObservationEncoder,
        tool_runner: ToolRunner,
        *,
        sample: Sample,
        any_rank: Callable[[bool], bool] = bool,
        end_token_ids: Sequence[int] = (),
        idle_ranks_sample: bool = False,
        failure_watch: FailureWatch | None = None,
        show_progress: bool = False,
    ):
        self.tokenizer = tokenizer
        self.limits = limits
        self.observations = observations
        self.tool_runner = tool_runner
        self._sample_turns = sample
        self._any_rank = any_rank
        self._end_token_ids = frozenset([*end_token_ids, tokenizer.pad_token_id])
        self._idle_ranks_sample = idle_ranks_sample
        self.failure_watch = failure_watch
        self._show_progress = show_progress
        self._reader = TurnReader(tokenizer, observations.render_call, self._end_token_ids)
        self._schemas: dict[Any, dict[str, Any]] = {}
        if limits.forced_answer_prompt is not None:  # a template that cannot render the request says so now
            request = self._answer_request()
            observations.encode([[{"role": "tool", "name": "tool", "content": ""}, request]])
            if min(limits.max_turn_length, limits.max_new_tokens) < limits.max_completion_length:
                observations.encode([[request]])

    def run(
        self,
        rollouts: Sequence[Rollout],
        first_turns: SampledTurns,
        on_end: Callable[[list[Rollout]], None] = lambda rollouts: None,
    ) -> RoundLog:
        """
        Run rollouts to their ends; they are changed in place.

        Args:
            rollouts (list of [`Rollout`]): with their prompts only.
            first_turns ([`SampledTurns`]): their first turns.
            on_end (`Callable`, *optional*): called in every round with the rollouts that have ended since the last,
                before the next sampling drops their KV cache.

        Returns:
            [`RoundLog`]: what the rounds were like.
        """
        log = RoundLog()
        for i, rollout in enumerate(rollouts):
            logprobs = None if first_turns.logprobs is None else first_turns.logprobs[i]
            self._take_turn(rollout, first_turns.ids[i], logprobs, first_turns.messages[i])
        active, num_tokens = list(rollouts), 0
        with rollout_bar(len(rollouts), self._show_progress) as bar:
            for turn in count(2):
                continuing = [rollout for rollout in active if rollout.continues]
                self._observe([rollout for rollout in active if rollout.continues or rollout.pending_calls], log)
                continuing = [rollout for rollout in continuing if rollout.stop is None or rollout.answer_requested]
                on_end([rollout for rollout in active if rollout not in continuing])
                if not self._any_rank(bool(continuing)):
                    break
                show_turn(bar, turn, len(continuing), num_tokens)
                num_tokens += self._sample(continuing)
                active = continuing
        log.stops = [rollout.stop or StopReason.ANSWERED for rollout in rollouts]
        log.tools_called = [rollout.tools_called for rollout in rollouts]
        log.calls = [rollout.calls for rollout in rollouts]
        log.num_forced_answers = sum(rollout.answer_requested for rollout in rollouts)
        if self.failure_watch is not None:
            self.failure_watch.update(log.tools)
        return log

    # ------------------------------------------------------------------------------------------------- observations

    def _observe(self, rollouts: Sequence[Rollout], log: RoundLog) -> None:
        """Run the pending calls of these rollouts and append what they see next, or end those without room for it."""
        all_calls = [call for rollout in rollouts for call in rollout.pending_calls]
        all_results = iter(self._run_tools(all_calls, log))
        observations, continuing = [], []
        for rollout in rollouts:
            results = [next(all_results) for _ in rollout.pending_calls]
            messages = [
                {"role": "tool", "name": call.name, "content": result.text}
                for call, result in zip(rollout.pending_calls, results, strict=True)
            ]
            pairs = zip(rollout.pending_calls, results, strict=True)
            rollout.calls[-1] = [call.record(result) for call, result in pairs] or rollout.calls[-1]
            if self._stopped(rollout, messages, results):
                continue
            continuing.append(rollout)
            rollout.num_rounds += bool(rollout.pending_calls)
            wants_answer = self.limits.forced_answer_prompt is not None
            if rollout.num_rounds >= self.limits.max_rounds and wants_answer and not rollout.stop:
                rollout.stop, rollout.answer_request_pending = StopReason.TURN_LIMIT, True
            if rollout.answer_request_pending:
                messages.append(self._answer_request())
            observations.append(messages)
        encoded = self.observations.encode(observations)
        for rollout, messages, ids in zip(continuing, observations, encoded, strict=True):
            self._append_observation(rollout, messages, ids)

    def _stopped(self, rollout: Rollout, messages: list[Message], results: Sequence[ToolResult]) -> bool:
        """
        End a rollout if a stop tool has run, or if its last turn was to be that. Returns whether it has ended.

        The messages, which reward functions read, then end with the answer that the call gave, as if the policy had
        written it out.
        """
        pairs = zip(rollout.pending_calls, results, strict=True)
        calls = self.limits.stop_calls([call for call, result in pairs if result.error is None])
        is_last_turn = not rollout.continues or rollout.num_rounds >= self.limits.max_rounds
        if not calls and not (rollout.pending_calls and is_last_turn):
            return False
        rollout.stop = rollout.stop or (StopReason.STOP_TOOL if calls else StopReason.TURN_LIMIT)
        rollout.pending_calls, rollout.messages = [], rollout.messages + messages
        if (answer := next((call.answer for call in calls if call.answer is not None), None)) is not None:
            rollout.messages.append({"role": "assistant", "content": f"<answer>{answer}</answer>"})
        return True

    def _run_tools(self, calls: Sequence[ToolCall], log: RoundLog) -> list[ToolResult]:
        results = []
        for call, result in zip(calls, self.tool_runner.run(calls) if calls else [], strict=True):
            text = self.observations.truncate(result.text)
            log.add(call.name, result, text != result.text)
            results.append(result._replace(text=text))
        return results

    def _append_observation(self, rollout: Rollout, messages: list[Message], ids: list[int]) -> None:
        # A turn that `max_turn_length` cut off is closed for the policy, which did not sample that token.
        closing = [self.tokenizer.eos_token_id] * rollout.turn_was_cut
        room, limit = self._room(rollout)
        room -= len(closing)
        if self.limits.forced_answer_prompt is not None and room - len(ids) < self.limits.answer_room:
            if fitted := self._fit(rollout, messages, room):
                messages, ids = fitted
                rollout.answer_request_pending, rollout.stop = True, rollout.stop or limit
        left = room - len(ids)
        if left < 1:
            rollout.pending_calls, rollout.answer_request_pending = [], False
            rollout.stop = rollout.stop or limit
        if left < 0:
            return
        rollout.observation_ids = closing + ids
        rollout.append(rollout.observation_ids, sampled=0)
        rollout.messages += messages
        rollout.answer_requested, rollout.answer_request_pending = rollout.answer_request_pending, False
        rollout.pending_calls, rollout.turn_was_cut = [], False

    def _fit(self, rollout: Rollout, messages: list[Message], room: int) -> tuple[list[Message], list[int]] | None:
        """The observation with its tool results cut down until a request to answer and an answer fit after it."""
        tool_messages = [message for message in messages if message["role"] == "tool"]
        request = self._answer_request()
        (frame,) = self.observations.encode([[*({**message, "content": ""} for message in tool_messages), request]])
        each = (room - len(frame) - self.limits.answer_room) // max(1, len(tool_messages))
        if each < 0:
            return None
        shortened = [
            {**message, "content": self.observations.truncate(message["content"], each)} for message in tool_messages
        ]
        (ids,) = self.observations.encode([[*shortened, request]])
        return ([*shortened, request], ids) if len(ids) < room else None

    def _answer_request(self) -> Message:
        return {"role": "user", "content": self.limits.forced_answer_prompt}

    # -------------------------------------------------------------------------------------------------------- turns

    def _sample(self, rollouts: Sequence[Rollout]) -> int:
        """Sample the next turn of these rollouts, and return the number of tokens."""
        if not rollouts:
            if self._idle_ranks_sample:
                self._sample_turns([], [], 1)
            return 0
        rooms = [min(self._room(rollout)[0], self.limits.max_turn_length) for rollout in rollouts]
        contexts = [rollout.context_ids for rollout in rollouts]
        turns, logprobs = self._sample_turns(contexts, [rollout.index for rollout in rollouts], max(rooms))
        for i, (rollout, room) in enumerate(zip(rollouts, rooms, strict=True)):
            ids, schemas = list(turns[i][:room]), self._schemas_of(rollout)
            # The parser looks for the generation prompt alone, so it is spared the rest of the context.
            prefix = rollout.observation_ids
            message = parse_response(self.tokenizer, ids, prefix=prefix, tools=schemas) if ids else None
            self._take_turn(rollout, ids, None if logprobs is None else logprobs[i][:room], message)
        return sum(map(len, turns))

    def _take_turn(
        self, rollout: Rollout, ids: list[int], logprobs: list[float] | None, message: Message | None
    ) -> None:
        """Append a sampled turn and decide what follows: its calls, a request to answer, or the end."""
        if not ids and not rollout.completion_ids:  # TRL needs a token in every completion
            rollout.append([self.tokenizer.eos_token_id], sampled=0)
        rollout.turn_starts.append(len(rollout.completion_ids))
        rollout.tools_called.append(())
        rollout.calls.append([])
        rollout.append(ids, sampled=1, logprobs=logprobs)
        limit = self._limit_reached(rollout, ids)
        reading = None
        if ids and message is not None and (self.limits.stop_tools or not rollout.answer_requested):
            reading = self._read(rollout, ids, message, was_cut=limit is not None)
        stops = reading is not None and bool(self.limits.stop_calls(reading.calls))
        if reading is None or (rollout.answer_requested and not stops):  # calls cannot run
            if message is not None:
                rollout.messages.append({key: value for key, value in message.items() if key != "tool_calls"})
            if not ids:
                rollout.stop = rollout.stop or StopReason.EMPTY
            return
        rollout.messages.append(reading.message)
        rollout.calls[-1] = [call.record() for call in reading.calls]
        calls, malformed = reading.calls, reading.malformed
        if rollout.answer_requested or limit in (StopReason.LENGTH_LIMIT, StopReason.CONTEXT_LIMIT):
            rollout.stop = rollout.stop or limit
            rollout.pending_calls = calls if stops else []
        elif reading.is_answer or not calls or (limit and len(malformed) == len(calls)):
            rollout.stop = (None if reading.is_answer else limit) or StopReason.ANSWERED
            wants_answer = self.limits.forced_answer_prompt is not None and not reading.is_answer and limit is not None
            rollout.turn_was_cut = rollout.answer_request_pending = wants_answer
        elif malformed and self.limits.on_malformed_tool_call == "end":
            rollout.stop = StopReason.MALFORMED
        elif rollout.num_rounds >= self.limits.max_rounds and not stops:
            rollout.stop = StopReason.TURN_LIMIT
        else:
            rollout.pending_calls = calls
            rollout.turn_was_cut = limit is not None and len(ids) >= self.limits.max_turn_length
        rollout.tools_called[-1] = tuple(call.name for call in rollout.pending_calls if call.problem is None)

    def _read(self, rollout: Rollout, ids: list[int], message: Message, was_cut: bool) -> Reading:
        def serial(function: Callable[..., Any]) -> int | None:
            """Methods of one environment run one after another, even if a call of an earlier step still hangs."""
            owner = getattr(function, "__self__", None)
            return id(owner) if owner is not None and owner is rollout.environment else None

        prefix = rollout.observation_ids or rollout.prompt_ids
        return self._reader.read(ids, message, rollout.tools, serial, prefix=prefix, was_cut=was_cut)

    def _schemas_of(self, rollout: Rollout) -> list[dict[str, Any]]:
        """JSON schemas of the rollout's tools, by which the parser converts arguments; made once per tool."""
        # Methods of environments of one class share their function.
        functions = [getattr(function, "__func__", function) for function in rollout.tools.values()]
        for function, bound in zip(functions, rollout.tools.values(), strict=True):
            if function not in self._schemas:
                self._schemas[function] = get_json_schema(bound)
        return [self._schemas[function] for function in functions]

    # ------------------------------------------------------------------------------------------------------- limits

    def _limit_reached(self, rollout: Rollout, turn: list[int]) -> StopReason | None:
        """The limit that cut this turn off, or `None` if the policy ended it."""
        if turn and turn[-1] in self._end_token_ids:
            return None
        room, limit = self._room(rollout)
        if room < 1:
            return limit
        longest = min(self.limits.max_turn_length, self.limits.max_new_tokens)
        return StopReason.TURN_LENGTH_LIMIT if len(turn) >= longest else None

    def _room(self, rollout: Rollout) -> tuple[int, StopReason]:
        """Tokens that may still follow, and the limit that sets them."""
        completion = self.limits.max_completion_length - len(rollout.completion_ids)
        context = self.limits.context_length - len(rollout.context_ids)
        if context < completion:
            return context, StopReason.CONTEXT_LIMIT
        return completion, StopReason.LENGTH_LIMIT
