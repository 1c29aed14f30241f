"""Links from pages to files outside of docs/ work in the repository only: the site shows their text. A MkDocs hook."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    folder = Path(page.file.abs_src_path).parent

    def unlink(match: re.Match[str]) -> str:
        target = (folder / match["target"].partition("#")[0]).resolve()
        leaves_docs = target.exists() and not target.is_relative_to(DOCS)
        return match["text"] if leaves_docs else match[0]

    return LINK.sub(unlink, markdown)
