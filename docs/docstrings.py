"""
The docstrings of `igpo_trl` as Markdown for the documentation site: a Griffe extension that `mkdocs.yml` names.

They are written in the dialect of Hugging Face, which is Markdown except for its sections and references. `Args:` and
the like become a bold title, and each of their entries an item of a list. A reference such as [`IGPOConfig`] becomes a
link if the site describes the object, and plain code otherwise. A reference to a name that the package does not have
is a warning, which fails a strict build.
"""

import logging
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from os.path import commonprefix
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields|Examples?):$")
ENTRY = re.compile(r"^(?P<names>[`*\w][`*\w., ]*?)\s*(?P<type>\(.*\))?:(?:\s+(?P<text>.*))?$")
REFERENCE = re.compile(r"\[`(?P<name>[\w.]+)`\](?:\([^)\s]+\.py\))?(?![\[(])")
TITLES = {"Args": "Arguments"}
logger = logging.getLogger("mkdocs.plugins.docstrings")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        objects = list(walk(pkg))
        paths: dict[str, list[str]] = defaultdict(list)
        for obj in objects:
            parts = obj.path.split(".")
            for start in range(len(parts)):
                paths[".".join(parts[start:])].append(obj.path)
        for obj in objects:
            if obj.docstring is not None:
                text = add_links(obj.docstring.value, obj.path, paths)
                obj.docstring.value = convert_sections(text)


def walk(obj: griffe.Object) -> Iterator[griffe.Object]:
    """`obj` and everything that is defined in it; imported names are left out."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)


def add_links(text: str, path: str, paths: dict[str, list[str]]) -> str:
    """Turns each reference into a link. If several objects have its name, the one nearest to `path` is meant."""

    def shared_parts(other: str) -> int:
        return len(commonprefix([path.split("."), other.split(".")]))

    def link(match: re.Match[str]) -> str:
        code = f"<code>{match['name']}</code>"
        candidates = paths.get(match["name"])
        if not candidates:
            logger.warning("%s refers to [`%s`], which the package does not have.", path, match["name"])
            return code
        return f'<autoref identifier="{max(candidates, key=shared_parts)}" optional>{code}</autoref>'

    return REFERENCE.sub(link, text)


def convert_sections(text: str) -> str:
    """Replaces the sections of a docstring by Markdown."""
    lines, blocks = text.splitlines(), []
    start = 0
    while start < len(lines):
        section = SECTION.match(lines[start])
        end = start + 1
        if section:
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
                end += 1
            body = textwrap.dedent("\n".join(lines[start + 1 : end])).strip("\n")
            convert = body_of_returns if section[1] in ("Returns", "Yields", "Example", "Examples") else list_entries
            blocks.append(f"\n**{TITLES.get(section[1], section[1])}**\n\n{convert(body)}\n")
        else:
            blocks.append(lines[start])
        start = end
    return "\n".join(blocks)


def list_entries(body: str) -> str:
    """The entries `name (type): text` of a section, as items of a list."""
    items: list[str] = []
    for line in body.splitlines():
        entry = ENTRY.match(line)
        if entry:
            names = ", ".join(f"**`{name.strip('` ')}`**" for name in entry["names"].split(","))
            parts = [f"- {names}", entry["type"]]
            items.append(f"{' '.join(part for part in parts if part)}: {entry['text'] or ''}".rstrip())
        else:
            items.append(line)
    return "\n".join(items)


def body_of_returns(body: str) -> str:
    """The text of a section, with its first line apart from the list that may follow."""
    first, *rest = body.splitlines() or [""]
    tail = textwrap.dedent("\n".join(rest))
    return f"{first}\n\n{tail}" if tail.startswith("- ") else f"{first}\n{tail}"
