"""Reading tool calls: what a policy wrote, checked against the available tools."""

import inspect
import json
import typing
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from typing_extensions import TypedDict  # Pydantic accepts that of `typing` only from Python 3.12 on

from ..files import encodable
from ..trajectory import NOT_RUN, Call
from .call_forms import resolve_name
from .tool_results import ToolErrorKind, ToolResult, cut, describe, error_result, show

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

    @property
    def answer(self) -> str | None:
        """What a call of a stop tool answers: its argument `answer`, or else the only one that is a text."""
        texts = [value for value in self.arguments.values() if isinstance(value, str)]
        value = self.arguments.get("answer", texts[0] if len(texts) == 1 else None)
        return None if value is None else encodable(str(value))

    def record(self, result: ToolResult | None = None) -> Call:
        """The record of the call, with its result if it has run."""
        result, arguments = result or self.problem, self.arguments
        try:
            json.dumps(arguments, allow_nan=False)
        except Exception:  # what JSON cannot express, or nests too deeply
            return Call(self.name, show(arguments), NOT_RUN if result is None else result.error)
        return Call(self.name, arguments, NOT_RUN if result is None else result.error)


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
    if not isinstance(entry, dict):
        return malformed_call(f"a tool call must be an object, got {show(entry)}.")
    if entry.get("type") not in (None, "function"):
        return malformed_call(f"a tool call of type {show(entry['type'])}, expected 'function'.")
    call = entry.get("function", entry)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return malformed_call(f"a tool call must have a 'name' that is a string, got {show(call)}.")
    return check_call(call["name"], call.get("arguments"), tools, serial)


def malformed_call(text: str, name: str = "unknown", function: Callable[..., Any] | None = None) -> ToolCall:
    """A call that cannot be read, with what the policy is told about it."""
    return ToolCall(name, {}, function, problem=error_result(ToolErrorKind.MALFORMED, text))


def check_call(
    name: str,
    arguments: Any,
    tools: Mapping[str, Callable[..., Any]],
    serial: Callable[[Callable[..., Any]], Hashable | None],
    *,
    positional: Sequence[Any] = (),
    are_texts: bool = False,
) -> ToolCall:
    """
    Check a name and arguments against the available tools.

    Args:
        name (`str`), arguments (`Any`): As the policy wrote them.
        tools (`Mapping[str, Callable]`), serial (`Callable`): See [`read_calls`].
        positional (`Sequence`): Values of the first parameters.
        are_texts (`bool`): Values are text. Where a parameter takes none, they are read as JSON.

    Returns:
        [`ToolCall`]: With a `problem` if it must not run.
    """
    name = resolve_name(encodable(name), tools)
    function = tools.get(name)
    if function is None:
        name = cut(name, MAX_NAME_CHARACTERS)
        text = f"there is no tool {name!r}. Available: {', '.join(tools) or 'none'}."
        return ToolCall(name, {}, None, problem=error_result(ToolErrorKind.UNKNOWN_TOOL, text))
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}  # some models write a call without arguments this way
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return malformed_call(f"the arguments of {name} are not valid JSON: {error}", name, function)
    if not isinstance(arguments, dict):
        text = f"the arguments of {name} must be an object with one entry per argument, got {show(arguments)}."
        return malformed_call(text, name, function)
    signature = signature_of(function)
    try:
        arguments = dict(zip(signature.parameters, positional, strict=False)) | arguments
        arguments = signature.check_texts(arguments) if are_texts else signature.check(arguments)
    except ValidationError as error:
        text = f"{name}: {signature.explain(error)}"
    except Exception as error:  # a type defined by the tool, whose validator raises something else
        text = f"{name}: {describe(error)}"
    else:
        return ToolCall(name, arguments, function, serial(function))
    return ToolCall(name, {}, function, problem=error_result(ToolErrorKind.BAD_ARGUMENTS, text))


@dataclass(frozen=True)
class Signature:
    """Parameters of a function, as far as they are annotated."""

    adapter: TypeAdapter[dict[str, Any]] | None = None  # `None` if the parameters are unknown
    defaults: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()

    def check(self, arguments: dict[Any, Any]) -> dict[str, Any]:
        """The arguments, converted where the types allow it. Raises `pydantic.ValidationError`."""
        return arguments if self.adapter is None else self.adapter.validate_python(arguments)

    def check_texts(self, arguments: dict[Any, Any]) -> dict[str, Any]:
        """The same for values that are texts: `[1, 2]` is a list where the parameter takes one."""
        try:
            return self.check(arguments)
        except ValidationError:
            decoded = {key: _decoded(value) for key, value in arguments.items()}
            if decoded == arguments:
                raise
        return self.check(decoded)

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


def _decoded(text: Any) -> Any:
    try:
        return None if text == "None" else json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


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
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True)
    try:
        adapter = _adapter(fields, config)
    except (PydanticUserError, NameError, TypeError):  # a type that cannot be checked: check only the names
        plain = {name: NotRequired[Any] if name in defaults else Any for name in fields}
        adapter = _adapter(plain, config)
    return Signature(adapter, defaults, tuple(fields))


def _adapter(fields: dict[str, Any], config: ConfigDict) -> TypeAdapter[dict[str, Any]]:
    typed_dict: Any = TypedDict  # unlike a model, it allows any field name
    arguments = typed_dict("arguments", fields)
    arguments.__pydantic_config__ = config
    return TypeAdapter(arguments)
