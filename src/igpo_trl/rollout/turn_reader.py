"""What a turn says: calls, or an answer, whichever comes first."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from ..rewards import extract_answer
from .call_forms import MARKER
from .tool_calls import Signature, ToolCall, check_call, malformed_call, read_calls, signature_of
from .tool_results import MAX_NESTING, ToolErrorKind, cut, nesting
from .written_calls import WrittenCall, find_calls

Message = dict[str, Any]

# Copying what is nested more deeply, or sending it to another process, may exceed the stack.
TOO_DEEP = f"lists and objects are nested more than {MAX_NESTING} levels deep"
MAX_REASON_CHARACTERS = 120
MAX_EXAMPLE_CHARACTERS = 300
PROMPT_END = 16  # tokens of a generation prompt that may open a thought

_THOUGHT = r"""
    (?P<analysis><\|channel\|>\s*analysis\s*<\|message\|>) | (?P<end><\|end\|>|(?=<\|start\|>|<\|channel\|>))
    | (?P<open><think(?:ing)?>|\[THINK\]|<\|channel>thought\b|{open})
    | (?P<close></think(?:ing)?>|\[/THINK\]|<channel\|>|{close})"""
_EMPTY_FENCE = re.compile(r"```\w*\s*(?:```|\Z)")
_OPEN_THOUGHT = re.compile(r"(?:<think(?:ing)?>|\[THINK\])\s*\Z", re.IGNORECASE)
_HEADER = re.compile(r"<\|start\|>\w*|<\|channel\|>[^<\n]{0,80}|<\|constrain\|>\w*|<\|(?:message|end|return|call)\|>")


class Reading(NamedTuple):
    """
    What a turn says.

    Attributes:
        calls (`list[ToolCall]`): Its calls; none if an answer comes before them.
        message (`dict`): The turn as a message. It has `tool_calls` exactly if there are calls.
        is_answer (`bool`): Whether an answer comes before any call.
    """

    calls: list[ToolCall]
    message: Message
    is_answer: bool

    @property
    def malformed(self) -> list[ToolCall]:
        """Calls that cannot be read."""
        return [call for call in self.calls if call.problem and call.problem.error is ToolErrorKind.MALFORMED]


class TurnReader:
    """
    Reads turns.

    The tokenizer's response template comes first. Calls that it cannot read, because the policy wrote them in another
    form or made a mistake, are looked for in the text ([`find_calls`]). So a call that was meant is never taken for an
    answer: it runs, or it is malformed and the policy is told what to write.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a `response_template`.
        render_call (`Callable`): Maps the name and the arguments of a call to the text that the chat template writes.
        end_token_ids (`Iterable[int]`): Tokens that end a turn.
    """

    def __init__(
        self,
        tokenizer: Any,
        render_call: Callable[[str, dict[str, Any]], str] = lambda name, arguments: "",
        end_token_ids: Iterable[int] = (),
    ):
        self.tokenizer = tokenizer
        self._render_call = render_call
        self._examples: dict[str, str] = {}
        ends = {*end_token_ids, tokenizer.eos_token_id, tokenizer.pad_token_id}
        # GPT-OSS ends a call with a token of its own.
        self._ends = frozenset(ends - {tokenizer.convert_tokens_to_ids("<|call|>")})
        special = [re.escape(token) for token in tokenizer.all_special_tokens if token]
        self._special = re.compile("|".join(special) or "(?!)")
        fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
        self._opens = _pattern(fields.get("tool_calls", {}), "open")
        self._thought_key = "thinking" if "thinking" in fields else "reasoning_content"
        thinking = fields.get(self._thought_key, {})
        if "<|channel|>" in str(thinking.get("open")):
            thinking = {}  # its end is that of other messages as well
        marks = {key: "|".join(_literals(thinking.get(key))) or "(?!)" for key in ("open", "close")}
        self._thought = re.compile(_THOUGHT.format(**marks), re.VERBOSE | re.IGNORECASE)

    def read(
        self,
        ids: Sequence[int],
        message: Message,
        tools: Mapping[str, Callable[..., Any]],
        serial: Callable[[Callable[..., Any]], Hashable | None] = lambda function: None,
        *,
        prefix: Sequence[int] = (),
        was_cut: bool = False,
    ) -> Reading:
        """
        Read a turn.

        Args:
            ids (`Sequence[int]`): The sampled tokens.
            message (`dict`): What TRL's parser made of them.
            tools (`Mapping[str, Callable]`), serial (`Callable`): See [`read_calls`].
            prefix (`Sequence[int]`): The tokens before the turn; at least the generation prompt.
            was_cut (`bool`): A limit ended the turn, so that a value at its end may be half of one.

        Returns:
            [`Reading`]: What the turn says.
        """
        end = len(ids)
        while end and ids[end - 1] in self._ends:
            end -= 1
        text = self.tokenizer.decode(list(ids[:end]))
        visible, thoughts = self._split(text)
        written = find_calls(visible, {name: signature_of(tool).parameters for name, tool in tools.items()})
        parsed = [self._advised(call, tools) for call in read_calls(message.get("tool_calls"), tools, serial)]
        cut_off = was_cut and bool(written) and not written[-1].is_closed and written[-1].problem is None
        calls = parsed
        is_parsed = len(parsed) >= len(written) and not cut_off and all(call.problem is None for call in parsed)
        if written and not (is_parsed or len(parsed) > len(written)):
            if cut_off:
                written[-1] = written[-1]._replace(problem="it was cut off")
            said_once: dict[Any, WrittenCall] = {}  # what is wrong, however often it occurs
            for i, one in enumerate(written):
                said_once.setdefault(one.problem or i, one)
            written = list(said_once.values())
            calls = [self._check(one, tools, serial) for one in written]
            message = self._message(message, visible, thoughts, written, calls)
        elif not parsed:
            reason = self._reason(ids, prefix, visible, thoughts, tools)
            if reason is None:
                return Reading([], message, extract_answer(message.get("content") or "") is not None)
            calls = [self._malformed(reason, tools)]
        starts = [one.start for one in written[:1]] + [one.start() for one in [self._opens.search(visible)] if one]
        start = min(starts, default=0)
        if not message.get("tool_calls"):
            message = self._message(message, visible, thoughts, [WrittenCall(start, len(visible), None)], calls)
        in_thought = not thoughts and _OPEN_THOUGHT.search(self.tokenizer.decode(list(prefix[-PROMPT_END:])))
        if in_thought or extract_answer(visible[:start]) is None:
            return Reading(calls, message, False)
        answer = {"content": self._plain(visible[:start])}
        return Reading([], {key: value for key, value in message.items() if key != "tool_calls"} | answer, True)

    def _check(
        self,
        written: WrittenCall,
        tools: Mapping[str, Callable[..., Any]],
        serial: Callable[[Callable[..., Any]], Hashable | None],
    ) -> ToolCall:
        if written.problem is not None or written.name is None:
            return self._malformed(written.problem or "its name is missing", tools, written.name)
        arguments, positional, are_texts = written[3:6]
        call = check_call(written.name, arguments, tools, serial, positional=positional, are_texts=are_texts)
        if nesting([arguments, positional, call.arguments]) > MAX_NESTING:
            return self._malformed(TOO_DEEP, tools, written.name)
        return self._advised(call, tools)

    def _malformed(self, reason: str, tools: Mapping[str, Callable[..., Any]], name: str | None = None) -> ToolCall:
        known = name if name is not None and name in tools else next(iter(tools), "tool")
        reason = cut(" ".join(reason.split()), MAX_REASON_CHARACTERS)
        return malformed_call(f"the tool call could not be read ({reason}). {self._advice(known, tools)}", known)

    def _advised(self, call: ToolCall, tools: Mapping[str, Callable[..., Any]]) -> ToolCall:
        """The call; if its arguments cannot be read, with what to write instead."""
        problem = call.problem
        if problem is None or problem.error is not ToolErrorKind.MALFORMED:
            return call
        known = call.name if call.name in tools else next(iter(tools), "tool")
        text = f"{cut(problem.text, MAX_REASON_CHARACTERS)} {self._advice(known, tools)}"
        return replace(call, problem=problem._replace(text=text))

    def _advice(self, name: str, tools: Mapping[str, Callable[..., Any]]) -> str:
        """A call of a tool in the form of the chat template."""
        if name not in self._examples:
            signature = signature_of(tools[name]) if name in tools else Signature()
            wanted = [parameter for parameter in signature.parameters if parameter not in signature.defaults]
            example = self._render_call(name, {parameter: "..." for parameter in wanted or signature.parameters[:1]})
            fits = 0 < len(example) <= MAX_EXAMPLE_CHARACTERS
            self._examples[name] = f"Write it in this form:\n{example}" if fits else "Repeat it in the right form."
        return self._examples[name]

    def _reason(
        self,
        ids: Sequence[int],
        prefix: Sequence[int],
        visible: str,
        thoughts: str,
        tools: Mapping[str, Callable[..., Any]],
    ) -> str | None:
        """Why a turn in which no call was found is none that answers; `None` if it answers."""
        if not self._plain(visible):
            if find_calls(thoughts, {name: () for name in tools}):
                return "it stands inside a thought, where it does not run; write it after the thought"
            return None
        if not self._opens.search(visible):
            return None
        try:
            self.tokenizer.parse_response(list(ids), prefix=list(prefix))
        except Exception as error:  # the parser may raise anything on text that a policy wrote
            return str(error)
        return "a name or the arguments are missing"

    def _split(self, text: str) -> tuple[str, str]:
        """
        The text with its thoughts as spaces, and the thoughts.

        A thought that is not closed is not taken out: the policy has ended its turn, so a call in it was meant. A
        closing tag without an opening one closes what the generation prompt has opened.
        """
        spans: list[tuple[int, int]] = []
        begin, is_analysis = None, False
        for match in self._thought.finditer(text):
            kind = match.lastgroup
            if begin is None and kind in ("analysis", "open"):
                begin, is_analysis = match.start(), kind == "analysis"
            elif kind == "end" and is_analysis and begin is not None and match.start() > begin:
                spans.append((begin, match.end()))
                begin = None
            elif kind == "close" and not (begin is not None and is_analysis):
                first = 0 if not spans else match.start()
                spans.append((first if begin is None else begin, match.end()))
                begin = None
        if not spans:
            return text, ""
        pieces, position = [], 0
        for first, last in spans:
            pieces += [text[position:first], " " * (last - first)]
            position = last
        return "".join([*pieces, text[position:]]), "\n".join(text[first:last] for first, last in spans)

    def _message(
        self, message: Message, visible: str, thoughts: str, written: Sequence[WrittenCall], calls: Sequence[ToolCall]
    ) -> Message:
        """The turn as a message, with every call that was meant among its `tool_calls`."""
        rest, position, entries = [], 0, []
        for one, call in zip(written, calls, strict=True):
            rest.append(visible[position : one.start])
            position = max(position, one.end)
            is_read = call.problem is None or call.problem.error is not ToolErrorKind.MALFORMED
            arguments = one.arguments if is_read else cut(visible[one.start : one.end])
            if one.positional and is_read:
                arguments = call.arguments
            entries.append({"type": "function", "function": {"name": call.name, "arguments": arguments}})
        content = MARKER.sub("", "".join([*rest, visible[position:]]))
        content = self._plain(_EMPTY_FENCE.sub("", content))
        thought = message.get(self._thought_key) or self._plain(self._thought.sub("", thoughts))
        return (
            {"role": "assistant", "content": content}
            | ({self._thought_key: thought} if thought else {})
            | {"tool_calls": entries}
        )

    def _plain(self, text: str) -> str:
        return self._special.sub("", _HEADER.sub("", text)).strip()


def _pattern(field: dict[str, Any], key: str) -> re.Pattern[str]:
    return re.compile(field.get(f"{key}_pattern") or "|".join(_literals(field.get(key))) or "(?!)")


def _literals(marks: Any) -> list[str]:
    """A response template names one mark or several."""
    return [re.escape(mark) for mark in ([marks] if isinstance(marks, str) else marks or ())]


@contextmanager
def parser_errors_as_value_errors(tokenizer: Any) -> Iterator[None]:
    """
    TRL takes a `ValueError` of the parser for a malformed call.

    But a deeply nested one is a `RecursionError`, now or when it is copied, and to the parser a turn without tokens is
    a batch of none.
    """
    parse, instance_attribute = tokenizer.parse_response, vars(tokenizer).get("parse_response")

    def parse_or_value_error(*args: Any, **kwargs: Any) -> Any:
        try:
            parsed = parse(*args, **kwargs)
        except (RecursionError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if isinstance(parsed, list) and not parsed:
            raise ValueError("an empty turn")
        if nesting(parsed) > MAX_NESTING:
            raise ValueError(TOO_DEEP)
        return parsed

    tokenizer.parse_response = parse_or_value_error
    try:
        yield
    finally:
        if instance_attribute is None:
            del tokenizer.parse_response
        else:
            tokenizer.parse_response = instance_attribute
