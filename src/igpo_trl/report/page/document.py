"""The page: one HTML file with its data, its scripts and its styles."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...files import replace_when_complete
from .compact import MAX_ROLLOUTS, page_data, to_json
from .questions import Runs

SCRIPTS = ("state.js", "charts.js", "list.js", "rollout.js", "overview.js", "main.js")


def write_page(
    path: str | Path,
    runs: Runs,
    max_rollouts: int = MAX_ROLLOUTS,
    diagnoses: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """
    Writes the page of one or two runs: a single HTML file that needs no network.

    Args:
        path (`str` or `Path`): File to write. Parent folders are created.
        runs (mapping of `str` to sequence of [`Trajectory`]): One or two runs by their names.
        max_rollouts (`int`, *optional*, defaults to `5000`): How many rollouts can be read on the page; of more, whole
            groups are taken evenly from all steps. The figures are those of all rollouts.
        diagnoses (mapping of `str` to mapping, *optional*): By the names of runs, what `igpo doctor --json` says.

    Returns:
        `str`: the headline of the page.

    Raises:
        ImportError: The extra `page` is not installed.
        ValueError: There are more than two runs, or one without rollouts.
    """
    data = page_data(runs, max_rollouts) | {"diagnoses": diagnoses or {}}
    page = render_page(" and ".join(runs), data)
    with replace_when_complete(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return str(data["figures"]["verdict"]["headline"])


def render_page(title: str, data: dict[str, Any] | None) -> str:
    """
    The text of a page. Without data, the page asks the server that it comes from, again and again.

    Only the scripts of the page itself can run: its policy names them by their digests.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            'The page needs jinja2 and plotly. Install the extra: pip install "igpo-trl[page]".'
        ) from error
    folder = files(__package__)
    own = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script, plotly = f'"use strict";\n(() => {{\n{own}\n}})();\n', get_plotlyjs()
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, plotly)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        digests=digests,
        live=data is None,
        data=Markup(to_json(data)),
        styles=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        plotly=Markup(plotly),
    )
