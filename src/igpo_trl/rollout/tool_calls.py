"""Reading tool calls: what a policy wrote, checked against the available tools."""

import inspect
import json
import re
import typing
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict  # Pydantic accepts that of `typing` only from Python 3.12 on

from ..files import encodable
from .tool_results import MAX_NESTING, ToolErrorKind, ToolResult, cut, describe, error_result, nesting, show

MAX_NAME_CHARACTERS = 64


@dataclass(frozen=True)
class ToolCall:
    """
    One checked call of a policy.

    Attributes:
        name (`str`): The name that the policy wrote, shortened; "unknown" if it wrote none.
        arguments (`dict`): Values by parameter name, converted to the annotated types.
        function (`Callable`, *optional*): The tool, `None` if no tool has this name.
        serial (`Hashable`, *optional*): Calls with the same value run one after another; `None` for no order.
        problem (`ToolResult`, *optional*): The error of a call that must not run.
    """

    name: str
    arguments: dict[str, Any]
    function: Callable[..., Any] | None
    serial: Hashable | None = None
    problem: ToolResult | None = None


def read_calls(
    raw: Any, tools: Mapping[str, Callable[..., Any]], serial: Callable[[Callable[..., Any]], Hashable | None]
) -> list[ToolCall]:
    """
    Check the tool calls of one assistant message against the available tools.

    Args:
        raw (`Any`): The `tool_calls` of a parsed message, which may be anything. The usual form is `[{"type":
            "function", "function": {"name": …, "arguments": {…}}}]`. The inner dictionary alone and arguments as a
            JSON string are accepted as well.
        tools (`Mapping[str, Callable]`): The tools of this rollout, by name.
        serial (`Callable`): Maps a tool to the `serial` of its calls: a value shared by all methods of an environment,
            `None` for a tool whose calls need no order.

    Returns:
        `list[ToolCall]`: One call per entry, in order. Malformed entries become calls with a `problem`.
    """
    if raw is None:
        return []
    return [_read_call(entry, tools, serial) for entry in (raw if isinstance(raw, (list, tuple)) else [raw])]


def _read_call(
    entry: Any, tools: Mapping[str, Callable[..., Any]], serial: Callable[[Callable[..., Any]], Hashable | None]
) -> ToolCall:
    def wrong(kind: ToolErrorKind, text: str, name: str = "unknown") -> ToolCall:
        return ToolCall(name, {}, tools.get(name), problem=error_result(kind, text))

    if not isinstance(entry, dict):
        return wrong(ToolErrorKind.MALFORMED, f"a tool call must be an object, got {show(entry)}.")
    if entry.get("type") not in (None, "function"):
        return wrong(ToolErrorKind.MALFORMED, f"a tool call of type {show(entry['type'])}, expected 'function'.")
    call = entry.get("function", entry)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return wrong(ToolErrorKind.MALFORMED, f"a tool call must have a 'name' that is a string, got {show(call)}.")
    name = encodable(call["name"])
    function = tools.get(name)
    if function is None:
        name = cut(name, MAX_NAME_CHARACTERS)
        available = ", ".join(tools) or "none"
        return wrong(ToolErrorKind.UNKNOWN_TOOL, f"there is no tool {name!r}. Available: {available}.", name)

    arguments = call.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}  # some models write a call without arguments this way
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return wrong(ToolErrorKind.MALFORMED, f"the arguments of {name} are not valid JSON: {error}", name)
    if not isinstance(arguments, dict):
        text = f"the arguments of {name} must be an object with one entry per argument, got {show(arguments)}."
        return wrong(ToolErrorKind.MALFORMED, text, name)
    signature = signature_of(function)
    try:
        arguments = signature.check(arguments)
    except ValidationError as error:
        return wrong(ToolErrorKind.BAD_ARGUMENTS, f"{name}: {signature.explain(error)}", name)
    except Exception as error:  # a type defined by the tool, whose validator raises something else
        return wrong(ToolErrorKind.BAD_ARGUMENTS, f"{name}: {describe(error)}", name)
    return ToolCall(name, arguments, function, serial(function))


class CallSyntax:
    """
    Finds calls that a policy intended and the response template cannot parse.

    To the parser, a turn with a broken call (invalid JSON, no closing tag) is plain text. It is distinguished from an
    answer by the opening tag of a call outside the reasoning.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a `response_template`. Without one, no call counts as
            malformed.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        fields = (getattr(tokenizer, "response_template", None) or {}).get("fields", {})
        self._opens = _pattern(fields.get("tool_calls", {}), "open")
        thinking = fields.get("reasoning_content") or fields.get("thinking") or {}
        self._thinks, self._thought = _pattern(thinking, "open"), _pattern(thinking, "close")

    def problem(self, ids: list[int], prefix: list[int]) -> str | None:
        """
        Describe the broken call of a turn in which the parser found no call.

        Args:
            ids (`list[int]`): The sampled turn.
            prefix (`list[int]`): The tokens before it; at least the generation prompt.

        Returns:
            `str` or `None`: The problem, `None` if the turn has no call.
        """
        if self._opens is None:
            return None
        text = self.tokenizer.decode(ids)
        if self._thought is not None and (ends := list(self._thought.finditer(text))):
            text = text[ends[-1].end() :]
        elif self._thinks is not None and (begins := self._thinks.search(text)) and begins.end() > begins.start():
            text = text[: begins.start()]
        if not self._opens.search(text):
            return None
        try:
            self.tokenizer.parse_response(ids, prefix=prefix)
        except Exception as error:  # the parser may raise anything on text that a policy wrote
            reason = " ".join(str(error).split())[:200]
        else:
            reason = "a name or the arguments are missing"
        return f"the tool call could not be read ({reason}). Repeat it in the right form."


def _pattern(field: dict[str, Any], name: str) -> re.Pattern[str] | None:
    if f"{name}_pattern" in field:
        return re.compile(field[f"{name}_pattern"])
    return re.compile(re.escape(field[name])) if name in field else None


@dataclass(frozen=True)
class Signature:
    """Parameters and return type of a function, as far as it is annotated."""

    adapter: TypeAdapter[dict[str, Any]] | None = None  # `None` if the parameters are unknown
    defaults: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    returns: tuple[type, ...] = ()  # declared JSON types other than text

    def check(self, arguments: dict[Any, Any]) -> dict[str, Any]:
        """The arguments, converted where the types allow it. Raises `pydantic.ValidationError`."""
        return arguments if self.adapter is None else self.adapter.validate_python(arguments)

    def explain(self, error: ValidationError) -> str:
        """One clause per bad argument, with its name, what was expected and what was passed."""
        clauses: dict[Any, str] = {}
        for detail in error.errors(include_url=False, include_context=False):
            name, *path = detail["loc"] or (None,)  # `None` for a name that is not valid text
            argument = "an argument's name" if name is None else f"argument {cut(repr(name), MAX_NAME_CHARACTERS)}"
            if detail["type"] == "missing" and not path:
                clause = f"{argument} is missing"
            elif detail["type"] in ("extra_forbidden", "invalid_key") and not path:
                clause = f"there is no {argument}"
            else:
                clause = f"{argument} {detail['msg'].removeprefix('Input ')}, got {show(detail['input'])}"
            clauses.setdefault(name, clause)
            if len(clauses) == 3:
                break
        return f"{'; '.join(clauses.values())}. It takes: {', '.join(self.parameters) or 'no arguments'}."


# Keyed by the function of a bound method, because every environment has new bound methods.
_signatures: weakref.WeakKeyDictionary[Any, dict[bool, Signature]] = weakref.WeakKeyDictionary()


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of a tool, cached."""
    bound = inspect.ismethod(function)
    try:
        known = _signatures.setdefault(function.__func__ if bound else function, {})  # type: ignore[attr-defined]
    except TypeError:  # a callable object without a hash or weak references
        return _read_signature(function)
    if bound not in known:
        known[bound] = _read_signature(function)
    return known[bound]


def _read_signature(function: Callable[..., Any]) -> Signature:
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # an annotation that cannot be evaluated
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):
            return Signature()
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    extra: typing.Literal["allow", "forbid"] = "forbid"
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            kind = parameter.annotation
            kind = Any if kind is parameter.empty or isinstance(kind, str) else kind
            fields[name] = kind if parameter.default is parameter.empty else NotRequired[kind]
            if parameter.default is None:  # `k: int = None`
                fields[name] = NotRequired[typing.Optional[kind]]  # noqa: UP045
            if parameter.default is not parameter.empty:
                defaults[name] = parameter.default
    returns = _json_kinds(signature.return_annotation)
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True)
    try:
        adapter = _adapter(fields, config)
    except (PydanticUserError, NameError, TypeError):  # a type that cannot be checked: check only the names
        plain = {name: NotRequired[Any] if name in defaults else Any for name in fields}
        adapter = _adapter(plain, config)
    return Signature(adapter, defaults, tuple(fields), returns)


def _adapter(fields: dict[str, Any], config: ConfigDict) -> TypeAdapter[dict[str, Any]]:
    typed_dict: Any = TypedDict  # unlike a model, it allows any field name
    arguments = typed_dict("arguments", fields)
    arguments.__pydantic_config__ = config
    return TypeAdapter(arguments)


def _json_kinds(annotation: Any) -> tuple[type, ...]:
    """The JSON types other than `str` and `None` that a return annotation declares."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _json_kinds(typing.get_args(annotation)[0])
    if origin is typing.Union or isinstance(annotation, type(int | str)):
        return tuple(kind for part in typing.get_args(annotation) for kind in _json_kinds(part))
    kind = origin or annotation
    if not isinstance(kind, type):
        return ()
    if kind is float:
        return (float, int)
    if issubclass(kind, (bool, int)):
        return (kind,)
    if issubclass(kind, Mapping):
        return (dict,)
    return (list, tuple) if issubclass(kind, Sequence) and not issubclass(kind, (str, bytes, bytearray)) else ()


@contextmanager
def parser_errors_as_value_errors(tokenizer: Any) -> Iterator[None]:
    """TRL takes a `ValueError` of the parser for a malformed call; other errors and deep nesting become one."""
    parse, instance_attribute = tokenizer.parse_response, vars(tokenizer).get("parse_response")

    def parse_or_value_error(*args: Any, **kwargs: Any) -> Any:
        try:
            message = parse(*args, **kwargs)
        except (RecursionError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if nesting(message) > MAX_NESTING:  # copying it, or sending it to another process, would fail
            raise ValueError(f"lists and objects are nested more than {MAX_NESTING} levels deep")
        return message

    tokenizer.parse_response = parse_or_value_error
    try:
        yield
    finally:
        if instance_attribute is None:
            del tokenizer.parse_response
        else:
            tokenizer.parse_response = instance_attribute
