"""Finds the calls in the text of a turn, in any of the forms of `call_forms`, right or broken."""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_parsing.content_parsers import parse_content

from . import call_forms as forms
from .call_forms import call_of, entries_of, resolve_name

MAX_FAILURES = 32  # attempts to decode what cannot be decoded, per turn; keeps the time linear in the text's length
MAX_LITERAL = 10_000  # characters of a call in Python's syntax
MAX_TAG = 1000  # characters of a tag with attributes

_DECODER = json.JSONDecoder(strict=False)  # a line break in a string is what it is


class WrittenCall(NamedTuple):
    """
    One call in a text.

    Attributes:
        start, end (`int`): Where it stands in the text.
        name (`str`, *optional*): The name that the policy wrote; `None` if none can be read.
        arguments (`Any`): As decoded; a dictionary by parameter name if all is well.
        positional (`tuple`): Values without a name, which come first.
        are_texts (`bool`): The values are text whose types are unknown, as in XML.
        problem (`str`, *optional*): Why the call cannot be read.
        is_closed (`bool`): The last value does not end only because the text does.
    """

    start: int
    end: int
    name: str | None
    arguments: Any = None
    positional: tuple[Any, ...] = ()
    are_texts: bool = False
    problem: str | None = None
    is_closed: bool = True


def find_calls(text: str, tools: Mapping[str, Sequence[str]]) -> list[WrittenCall]:
    """
    Find the calls in the text of a turn.

    Args:
        text (`str`): The text, without reasoning.
        tools (`Mapping[str, Sequence[str]]`): The names of the available tools, with those of their parameters.

    Returns:
        `list[WrittenCall]`: In order. Empty if nothing looks like a call.
    """
    return _Scanner(text, tools).scan()


class _Scanner:
    """Reads a text from left to right. Each `_read_…` begins at a match of the group with this name."""

    def __init__(self, text: str, tools: Mapping[str, Sequence[str]]) -> None:
        self.text = text
        self.length = len(text.rstrip())
        self.tools = tools
        self.pattern = forms.call_pattern(tuple(tools))
        self.calls: list[WrittenCall] = []
        self.position = 0  # where to go on
        self.read_to = 0  # the end of the last call or closing marker
        self.closed = True  # no call since the last closing marker
        self.floor = 0  # braces before it are not looked at again
        self.failures = 0
        self.reason = ""  # of the last failure
        self.found: dict[re.Pattern[str], tuple[int, int]] = {}
        self.unclosed: set[str] = set()  # tags without a closing tag in the rest of the text

    def scan(self) -> list[WrittenCall]:
        while match := self.pattern.search(self.text, self.position):
            self.position, self.reason = match.end(), ""
            getattr(self, f"_read_{match.lastgroup}")(match)
        if not self.calls:
            self._read_whole()
        return self.calls

    def _add(self, start: int, end: int, name: str | None, arguments: Any = None, **more: Any) -> None:
        self.calls.append(WrittenCall(start, end, name, arguments, **more))
        self.position = max(self.position, end)
        self.read_to, self.closed = self.position, False

    def _fail(self, start: int, end: int, reason: str, name: str | None = None) -> None:
        self._add(start, end, name, problem=reason, is_closed=end < len(self.text))

    # ------------------------------------------------------------------------------------------------------ markers

    def _read_open(self, match: re.Match[str]) -> None:
        start, begin = match.span()
        i = self._skip(forms.BLANK, begin)
        following = self.pattern.match(self.text, i)
        if following and following.lastgroup in ("open", "function", "stray", "tag", "recipient"):
            return  # the call begins there
        while self.text.startswith("{{", i):  # braces doubled, as in a Python format string
            i += 1
        if self.text[i : i + 1] in ("{", "[") and self._read_json(start, i):
            return
        end = self._next_marker(begin)
        head = forms.HEAD.match(self.text, i, end)
        if i >= end:
            self._fail(start, end, "it is empty")
        elif head is None or not self._read_named(start, head, end):
            self._fail(start, end, self.reason or "expected a JSON object with a name and arguments")
            if pair := self.pattern.search(self.text, begin, end):  # a second call in the same tag may be right
                self.position = pair.end()

    def _read_named(self, start: int, head: re.Match[str], end: int) -> bool:
        """A name, followed by its arguments in any form."""
        name, i = head["name"], self._skip(forms.SEPARATOR, head.end())
        known = resolve_name(name, self.tools) in self.tools
        if arguments := list(forms.ARGUMENT.finditer(self.text, head.end(), end)):
            texts = {one["key"].strip(): (one["value"] or "").strip() for one in arguments}
            last = arguments[-1]
            is_closed = bool(last["end"]) or last.end() < len(self.text)
            self._add(start, last.end(), name, texts, are_texts=True, is_closed=is_closed)
        elif i >= end:
            if not known:
                return False
            self._add(start, end, name, {})
        elif self.text[i] == "{":
            decoded = self._decode(i)
            if decoded is None:
                return False
            self._add(start, decoded[1], name, decoded[0])
        elif self.text[i] == "(":
            self._read_python_calls(start, name, i)
        else:
            return False
        return True

    def _read_close(self, match: re.Match[str]) -> None:
        stretch = self.text[self.read_to : match.start()]
        is_meant = (
            match.end() >= self.length or re.search(r"[{<]", stretch) or any(name in stretch for name in self.tools)
        )
        if self.closed and is_meant and re.search(r"\w", stretch):
            brace = self.text.find("{", self.read_to, match.start())
            if brace < 0 or not self._read_json(brace, brace):
                self._fail(match.start(), match.end(), f"{match['close']} has no opening tag")
        self.position = max(self.position, match.end())
        self.read_to, self.closed = self.position, True

    def _read_function(self, match: re.Match[str]) -> None:
        start, i = match.span()
        name, texts, is_closed = match["function_name"].strip(), {}, True
        while parameter := forms.PARAMETER.match(self.text, i):
            i = parameter.end()
            texts[parameter["key"].strip()] = parameter["value"].strip()
            is_closed = bool(parameter["end"]) or i < len(self.text)
        after = self._skip(forms.BLANK, i)
        end = self._next_marker(i)
        if not name:
            self._fail(start, end, "the name of the function is missing")
        elif self.text.startswith("<parameter", after):
            self._fail(start, end, "a parameter is not closed by >", name)
            self._skip_parameters(end)
        elif texts or after >= end:
            closed = is_closed and (bool(texts) or end < len(self.text))
            self._add(start, i, name, texts, are_texts=True, is_closed=closed)
        elif self.text[after] == "{" and (decoded := self._decode(after)):
            self._add(start, decoded[1], name, decoded[0])
        else:
            self._fail(start, end, "expected <parameter=key>value</parameter>", name)

    def _read_stray(self, match: re.Match[str]) -> None:
        end = self._next_marker(match.end())
        self._fail(match.start(), end, "a tag is not closed by >, or stands outside its <function=name>")
        self._skip_parameters(end)

    def _skip_parameters(self, end: int) -> None:
        while (marker := forms.MARKER.match(self.text, end)) and marker.lastgroup in ("stray", "close"):
            if marker.lastgroup == "close" and not marker.group().startswith("</parameter"):
                break
            end = self._next_marker(marker.end())
        self.position = self.read_to = max(self.position, end)

    def _read_recipient(self, match: re.Match[str]) -> None:
        name = match["recipient_name"] or match["function_recipient"]
        i = self._skip(forms.BLANK, match.end())
        if match["function_recipient"]:  # without <|message|>: the arguments may still follow
            brace = self.text.find("{", i, i + 100)
            i = brace if brace >= 0 else i
        end = self._find(forms.ROLE_END, match.end())
        if self.text[i : i + 1] == "{":
            decoded = self._decode(i)
            if decoded is None:
                self._fail(match.start(), end, self.reason or "invalid JSON", name)
            else:
                self._add(match.start(), decoded[1], name, decoded[0])
        elif match["recipient_name"] and i >= end:
            self._add(match.start(), end, name, {}, is_closed=end < len(self.text))
        else:
            self._fail(match.start(), end, "expected a JSON object after <|message|>", name)

    def _read_nameless(self, match: re.Match[str]) -> None:
        end = self._find(forms.ROLE_END, match.end())
        i = self._skip(forms.BLANK, match.end())
        if self.text[i : i + 1] != "{" or not self._read_json(match.start(), i):
            self._fail(match.start(), end, "it names no function: to=functions.NAME is missing")

    # -------------------------------------------------------------------------------------------- without a marker

    def _read_pair(self, match: re.Match[str]) -> None:
        """The name of a tool in JSON: the object around it is the call."""
        brace, best, decoded = match.start() + 1, None, None
        floor, self.floor = max(self.floor, self.read_to), match.end()
        for _ in range(4):
            outer = self.text.rfind("{", floor, brace)
            if outer < 0 or (decoded := self._decode(outer)) is None:
                break
            brace, (value, end) = outer, decoded
            found = call_of(value, self.tools, marked=False) if end > match.start() else None
            if found:
                best = (outer, end, *found)
                if found[1]:
                    break
        if best:
            self._add(*best)
        elif (
            decoded is None and forms.FIRST_KEY.match(self.text, outer)
            if outer >= 0
            else forms.ARGUMENTS_FOLLOW.match(self.text, match.end())
        ):
            end = min(self._find(forms.PARAGRAPH, match.end()), self._next_marker(match.end()))
            reason = self.reason or "an opening brace is missing"
            self._fail(outer if outer >= 0 else match.start(), end, reason)
            self.position = match.end()  # a second call in the same line may be right

    def _read_tag(self, match: re.Match[str]) -> None:
        """`<search>…</search>`, with JSON, an element per argument, or the value of the first parameter."""
        name, closing = match["tag_name"], f"</{match['tag_name']}>"
        attributes = {one["key"]: one["value"] for one in forms.ATTRIBUTE.finditer(match.group()[:MAX_TAG])}
        if match.group().endswith("/>"):
            self._add(*match.span(), name, attributes, are_texts=True)
            return
        end = -1 if closing in self.unclosed else self.text.find(closing, match.end())
        if end < 0:
            self.unclosed.add(closing)
            self._fail(match.start(), self._next_marker(match.end()), f"{closing} is missing", name)
            return
        body, end = self.text[match.end() : end].strip(), end + len(closing)
        if body.startswith("{"):
            i = self.text.index("{", match.end())
            if (decoded := self._decode(i)) is None:
                self._fail(match.start(), end, self.reason or "invalid JSON", name)
                return
            self._add(match.start(), end, *(call_of(decoded[0], self.tools, marked=False) or (name, decoded[0])))
            return
        children = {one["key"]: one["value"].strip() for one in forms.CHILD.finditer(body[:MAX_LITERAL])}
        positional = (body,) if body and not children else ()
        self._add(match.start(), end, name, children | attributes, positional=positional, are_texts=True)

    def _read_python(self, match: re.Match[str]) -> None:
        before = len(self.calls), self.read_to, self.closed
        self._read_python_calls(match.start("python_name"), match["python_name"], match.end() - 1)
        if not forms.REST_OF_LINE.match(self.text, self.calls[-1].end):  # a sentence that mentions the tool
            del self.calls[before[0] :]
            self.position, (_, self.read_to, self.closed) = match.end(), before

    def _read_python_calls(self, start: int, name: str, bracket: int) -> None:
        """`name(key="value")`, and further ones after commas or semicolons."""
        while True:
            end = self._matching(bracket)
            if end is None:
                line = self.text.find("\n", bracket)
                self._fail(start, len(self.text) if line < 0 else line, "a bracket or a quote is not closed", name)
                return
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of an invalid escape sequence
                    call = ast.parse("f" + self.text[bracket:end], mode="eval").body
                assert isinstance(call, ast.Call)
                values = [ast.literal_eval(one) for one in call.args]
                arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
            except Exception:  # `ast` raises MemoryError, RecursionError and more on what a policy writes
                self._fail(start, end, f'expected {name}(parameter="value")', name)
            else:
                if len(values) == 1 and isinstance(values[0], dict) and not arguments:
                    arguments, values = values[0], []
                self._add(start, end, name, arguments, positional=tuple(values))
            more = forms.NEXT_CALL.match(self.text, end)
            if more is None:
                return
            start, name, bracket = more.start("name"), more["name"], more.end() - 1

    def _read_line(self, match: re.Match[str]) -> None:
        """`Action: name`, `name: {…}`: a line that begins with the name of a tool and goes on with JSON."""
        name, i = match["line_name"], self._skip(forms.INPUT, match.end())
        is_action = (match["label"] or "").lower().startswith("action")
        if self.text[i : i + 1] == "{" and (decoded := self._decode(i)):
            found = call_of(decoded[0], self.tools, marked=False) or (name, decoded[0])
            self._add(match.start("line_name"), decoded[1], *found)
        elif is_action or self.text[i : i + 1] == "{":
            reason = self.reason or "its arguments are missing"
            self._fail(match.start("line_name"), self._find(forms.PARAGRAPH, i), reason, name)

    def _read_whole(self) -> None:
        """A text that is nothing but JSON in the form of a call, of a tool that does not exist."""
        if "arguments" not in self.text and "parameters" not in self.text:
            return
        start = self._skip(forms.FRAME, 0)
        if self.text[start : start + 1] not in ("{", "[") or (decoded := self._decode(start)) is None:
            return
        if not forms.FRAME.fullmatch(self.text, decoded[1]):
            return
        entries = list(entries_of(decoded[0]))
        allowed = {"name", "arguments", "parameters", "type", "id"}
        if all(
            isinstance(one, dict) and one.keys() <= allowed and isinstance(one.get("name"), str) for one in entries
        ):
            for one in entries:
                arguments = one.get("arguments", one.get("parameters"))
                if isinstance(arguments, dict):
                    self._add(start, decoded[1], one["name"], arguments)

    # --------------------------------------------------------------------------------------------------------- JSON

    def _read_json(self, start: int, i: int) -> bool:
        """One call or several in JSON inside markers; false if it is no JSON."""
        if (decoded := self._decode(i)) is None:
            return False
        while decoded is not None:
            value, end = decoded
            for entry in entries_of(value):
                if found := call_of(entry, self.tools, marked=True):
                    self._add(start, end, *found)
                else:
                    self._fail(start, end, "expected an object with a name and arguments")
            between = forms.BETWEEN.match(self.text, end)
            decoded = self._decode(between.end()) if between else None
        return True

    def _decode(self, i: int) -> tuple[Any, int] | None:
        """The JSON value, or the Python literal, that begins at i, and where it ends."""
        if self.failures >= MAX_FAILURES:
            return None
        try:
            return _DECODER.raw_decode(self.text, i)
        except (ValueError, RecursionError) as error:
            self.reason = f"invalid JSON: {getattr(error, 'msg', error)}"
            self.failures += 1
        if (end := self._matching(i)) is None:
            return None
        literal = self.text[i:end]
        try:
            if '<|"|>' in literal:  # Gemma's quotation mark
                quotes = {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True}
                return parse_content(literal, "json", quotes), end
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = ast.literal_eval(literal)
        except Exception:  # see above
            return None
        return (value, end) if isinstance(value, (dict, list)) else None

    # -------------------------------------------------------------------------------------------------------- places

    def _matching(self, i: int) -> int | None:
        """Where the bracket at i is closed."""
        if self.failures >= MAX_FAILURES:
            return None
        depth, quote = 0, ""
        for match in forms.BRACKET.finditer(self.text, i, i + MAX_LITERAL):
            character = match.group()
            if quote:
                quote = "" if character == quote else quote
            elif character in "\"'":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
                if depth == 0:
                    return match.end()
        self.failures += 1
        return None

    def _skip(self, pattern: re.Pattern[str], i: int) -> int:
        match = pattern.match(self.text, i)
        return match.end() if match else i

    def _next_marker(self, i: int) -> int:
        return self._find(forms.MARKER, i)

    def _find(self, pattern: re.Pattern[str], i: int) -> int:
        """Where the next match begins, or the end of the text; no part of the text is searched twice."""
        since, place = self.found.get(pattern, (0, -1))
        if not since <= i <= place:
            match = pattern.search(self.text, i)
            place = match.start() if match else len(self.text)
            self.found[pattern] = (i, place)
        return place
