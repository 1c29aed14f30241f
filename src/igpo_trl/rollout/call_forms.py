"""
Calls in the text of a turn: the published forms of the model families, and what models make of them.

| family | published form |
|---|---|
| Qwen2.5, Qwen3, Hermes | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; Qwen2.5-Coder: `<tools>`, a code fence, bare JSON |
| Qwen3.5, Qwen3-Coder, Nemotron 3 | `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>` |
| Llama 3.1, 3.2 | `{"name": …, "parameters": {…}}`, `<function=name>{…}</function>`, `[name(key="value")]`, `<\\|python_tag\\|>…` |
| GPT-OSS | `to=functions.name` before or after the channel, then `<\\|message\\|>{…}<\\|call\\|>` |
| GLM 4.5 | `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>` |
| Gemma 4, LFM2, DeepSeek, Mistral, Kimi | markers of their own around a name and JSON, or around `name(key="value")` |

A marker of a call is a call that was meant, whatever follows it. JSON, `name(…)`, `<name>…</name>` and `Action: name`
without a marker count only with the name of an available tool: an answer may contain JSON.
"""  # noqa: E501

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

_TOOL = r"(?:tools?|(?:tool|function)[_-]?calls?|tool_use)"
_OPEN = rf"""(?P<open>
    <(?:\w+:)?{_TOOL}(?:\s[^<>]*)?> | <\|{_TOOL}(?:_section)?(?:_start|_begin)?\|?>
    | <[|｜](?:tool|function)▁calls?▁begin[|｜]> | <start_function_call> | \[TOOL_CALLS?\]
    | <\|(?:START_ACTION|action_start|python_tag)\|>(?:\s*<\|plugin\|>)? | \bfunctools(?=\[))"""
_CLOSE = rf"""(?P<close>
    </(?:\w+:)?(?:{_TOOL}|function|invoke|parameter)> | <\|/{_TOOL}\|> | <{_TOOL}\|> | <\|{_TOOL}(?:_section)?_end\|>
    | <[|｜](?:tool|function)▁calls?▁end[|｜]> | <end_function_call> | \[/TOOL_CALLS?\]
    | <\|(?:END_ACTION|action_end|call)\|>)"""
_FUNCTION = r"""(?P<function>
    <(?:function|invoke)(?:\s*=|\s+name\s*=)\s*["']?(?P<function_name>[^<>"'\n{]*)["']?\s*(?:>|(?=\{)))"""
_STRAY = r"(?P<stray><(?:function\s*=|(?:function|invoke)\s+name\b|parameter\s*=|parameter\s+name\b))"
_RECIPIENT = r"""(?P<recipient>(?<![\w.])to=(?!(?:assistant|user|system|developer)\b)
    (?:(?:functions\.)?(?P<recipient_name>[\w.\-]+)
       [^<\n{]{0,80}(?:<\|(?:channel|constrain|start)\|>[^<\n{]{0,80}){0,4}<\|message\|>
     | functions\.(?P<function_recipient>[\w.\-]+)))"""
_NAMELESS = r"(?P<nameless><\|channel\|>\s*commentary\s*<\|constrain\|>[^<]{0,40}<\|message\|>)"
_MARKERS = "|".join((_OPEN, _CLOSE, _FUNCTION, _STRAY, _RECIPIENT, _NAMELESS))
MARKER = re.compile(_MARKERS, re.VERBOSE | re.IGNORECASE)

NAME_KEYS = ("name", "function", "tool", "action", "function_name", "tool_name", "recipient_name", "type")
ARGUMENT_KEYS = (
    *("arguments", "parameters", "args", "params", "kwargs", "input", "tool_input", "tool_args", "action_input"),
    *("tool_arguments", "tool_parameters", "function_arguments"),
)
PARAMETER = re.compile(
    r"""\s*<parameter(?:\s*=\s*|\s+name\s*=\s*)["']?(?P<key>[^<>"'\n]+)["']?\s*>(?P<value>.*?)
    (?:(?P<end></parameter>)|(?=<parameter\b)|(?=</?(?:function|invoke|tool_call)\b)|\Z)""",
    re.VERBOSE | re.DOTALL,
)
ARGUMENT = re.compile(
    r"<arg_key>(?P<key>.*?)</arg_key>\s*(?:<arg_value>(?P<value>.*?)(?P<end></arg_value>|(?=<arg_key>)|\Z))?",
    re.DOTALL,
)
CHILD = re.compile(r"<(?P<key>\w+)>(?P<value>.*?)</(?P=key)>", re.DOTALL)
ATTRIBUTE = re.compile(r"""(?P<key>\w+)\s*=\s*(?P<quote>["'])(?P<value>.*?)(?P=quote)""", re.DOTALL)
HEAD = re.compile(r"(?:\[\s*)?(?:call\s*:\s*|function\s*<｜tool▁sep｜>)?[\"'`]?(?P<name>[\w.\-]+(?::\d+)?)[\"'`]?")
SEPARATOR = re.compile(
    r"(?:\s|```\w*|[:=]|\[CALL_ID\]\w*|\[ARGS\]|<｜tool▁sep｜>|<\|tool_call_argument_begin\|>)*", re.IGNORECASE
)
INPUT = re.compile(
    r"[`\"'*]*\s*[:：]?\s*(?:(?:action[ _]input|input|arg(?:ument)?s|param(?:eter)?s|✿ARGS✿)[`\"'*]*\s*[:：]\s*)?"
    r"(?:```\w*\s*|`)?(?=\{)",
    re.IGNORECASE,
)
BLANK = re.compile(r"(?:\s|```\w*)*")
BETWEEN = re.compile(r"[\s,;]*(?:```\w*\s*)*(?=[{\[])")
NEXT_CALL = re.compile(r"\s*[,;]\s*(?P<name>[\w.]+)\(")
BRACKET = re.compile(r"\\.|[\"'(){}\[\]]", re.DOTALL)
FIRST_KEY = re.compile(r"\{\s*[\"']?\w+[\"']?\s*:")
ARGUMENTS_FOLLOW = re.compile(r"\s*,\s*[\"']?(?:arguments|parameters)\b")
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=[ \t]*[{\[<`])")
REST_OF_LINE = re.compile(r"[ \t)\]`,;.]*(?:\#[^\n]*|(?:<[|/｜][^<>\n]*>[ \t]*)*)(?:\n|\Z)")
ROLE_END = re.compile(r"<\|(?:call|end|start|channel|return)\|>")
FRAME = re.compile(r"(?:\s|```\w*|<[|｜/]?\w[^<>\n]*>)*")


@lru_cache(maxsize=64)
def call_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the beginning of whatever may be a call."""
    forms = [_MARKERS]
    if names:
        name = "|".join(re.escape(one) for one in sorted(names, key=len, reverse=True))
        tags = "|".join(re.escape(one) for one in names if one.lower() not in ("answer", "think")) or "(?!)"
        keys = "|".join(NAME_KEYS)
        label = r"""(?:action|call|tool|function|(?:tool|function)[ _](?:call|name))[`"'*✿]*[ \t]*[:：][ \t]*"""
        forms += [
            rf"""(?P<pair>(?:(?<!\w)["'](?:{keys})["']|[{{,]\s*(?:{keys}))\s*:\s*["']?(?:\w+\.)?(?:{name})["']?
                    (?=[ \t]*(?:[,;}}\]"'\n]|\Z))
                | (?<!\w)["'](?:{name})["']\s*:\s*(?=[{{"]))""",
            rf"(?P<tag><(?P<tag_name>{tags})(?:\s[^<>]*)?>)",
            rf"""(?P<python>(?:^|(?<=\|>))[ \t]*+[\[(`*>-]*+[ \t]*+
                (?:print\(|await[ ]|return[ ]|\w+[ ]?=[ ]?|{label})?
                (?:\w+\.)?(?P<python_name>{name})(?:\.call|\.run|\.invoke)?\()""",
            rf"""(?P<line>(?:^|(?<=\|>))[^\w\n<{{]{{0,6}}
                (?P<label>{label})?
                [`"'*]*(?:functions\.)?(?P<line_name>{name})(?![\w(.]))""",
        ]
    return re.compile("|".join(forms), re.VERBOSE | re.IGNORECASE | re.MULTILINE)


def resolve_name(name: str, tools: Mapping[str, Any]) -> str:
    """The tool that a name with a namespace or a number means (`functions.search:0`), else the name itself."""
    if name in tools:
        return name
    plain = re.sub(r"(?::\d+|\.(?:call|run|invoke))+$", "", name.strip())
    return next((one for one in (plain, plain.rpartition(".")[2]) if one in tools), name)


def call_of(value: Any, tools: Mapping[str, Sequence[str]], marked: bool) -> tuple[str, Any] | None:
    """Name and arguments of an object in the form of a call; without a marker, of an available tool."""
    if not isinstance(value, dict):
        return None
    for wrapper in ("function", "function_call", "tool_call", "tool"):
        if isinstance(value.get(wrapper), dict):
            value = {key: item for key, item in value.items() if key != wrapper} | value[wrapper]
            break
    keys = [key for key in NAME_KEYS if isinstance(value.get(key), str) and value[key] != "function"]
    known = [key for key in keys if resolve_name(value[key], tools) in tools]
    if not known and len(value) == 1:
        ((name, arguments),) = value.items()
        return (name, arguments) if name in tools and isinstance(arguments, (dict, str)) else None
    if not (known or (marked and keys)):
        return None
    key = (known or keys)[0]
    name = value[key]
    for given in ARGUMENT_KEYS:
        if given in value and (isinstance(value[given], dict) or given in ("arguments", "parameters")):
            return name, value[given]
    rest = {other: item for other, item in value.items() if other not in (key, "type", "id")}
    parameters = tools.get(resolve_name(name, tools), ())
    if marked or any(other in parameters for other in rest) or (not rest and "name" in key):
        return name, rest
    return None


def entries_of(value: Any) -> Iterator[Any]:
    """The calls in a decoded value, which may be one call or a list of them."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    yield from value if isinstance(value, list) else [value]
