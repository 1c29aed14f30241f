"""A page that follows runs while they are made: `igpo view RUN --serve`."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...trajectory import Trajectory, record_files
from .compact import MAX_ROLLOUTS, page_data, to_json
from .document import render_page

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Follower:
    """
    Reads the rollouts of runs as they are written, each line once.

    A line without a line end is still being written. When a file has been replaced, as by training that resumes from a
    checkpoint, everything is read again.

    Args:
        runs (mapping of `str` to `Path`): Directories of runs, or files of rollouts, by the names of the runs. They
            need not exist yet.
        max_rollouts (`int`, *optional*, defaults to `5000`): See [`write_page`].
        diagnose (`Callable`, *optional*): From the path of a run, what `igpo doctor --json` says of it.
    """

    def __init__(
        self,
        runs: Mapping[str, Path],
        max_rollouts: int = MAX_ROLLOUTS,
        diagnose: Callable[[Path], Mapping[str, Any]] | None = None,
    ) -> None:
        self._paths, self._max_rollouts, self._diagnose = dict(runs), max_rollouts, diagnose
        self._lock = threading.Lock()
        self._version, self._text, self._is_stale = 0, to_json(None), True
        self._forget()

    def _forget(self) -> None:
        self._rollouts: dict[str, list[Trajectory]] = {name: [] for name in self._paths}
        self._read: dict[Path, tuple[int, int]] = {}  # of a file: its identity, and the bytes that were read

    def latest(self) -> tuple[str, str]:
        """The data of the page as JSON, `null` as long as a run has no rollouts, and a tag that changes with it."""
        with self._lock:
            self._is_stale = self._update() or self._is_stale
            if self._is_stale:  # until it succeeds: the doctor may read a file that is being replaced
                self._text = to_json(self._data() if all(self._rollouts.values()) else None)
                self._version += 1
                self._is_stale = False
            return self._text, f'"{id(self)}-{self._version}"'

    def _data(self) -> dict[str, Any]:
        diagnoses = {name: self._diagnose(path) for name, path in self._paths.items()} if self._diagnose else {}
        return page_data(self._rollouts, self._max_rollouts) | {"diagnoses": diagnoses}

    def _update(self) -> bool:
        files = {
            name: [path] if path.is_file() else record_files(path) if path.is_dir() else []
            for name, path in self._paths.items()
        }
        for each in files.values():
            for file in each:
                identity, size = file.stat().st_ino, file.stat().st_size
                if file in self._read and (self._read[file][0] != identity or self._read[file][1] > size):
                    self._forget()
        before = sum(map(len, self._rollouts.values()))
        for name, each in files.items():
            for file in each:
                self._rollouts[name] += self._new_lines(file)
        return sum(map(len, self._rollouts.values())) != before

    def _new_lines(self, file: Path) -> list[Trajectory]:
        with file.open("rb") as stream:
            start = self._read.get(file, (0, 0))[1]
            stream.seek(start)
            complete = stream.read().rpartition(b"\n")[0]
            rollouts = [Trajectory.from_json(line) for line in complete.split(b"\n") if line.strip()]
            self._read[file] = file.stat().st_ino, start + len(complete) + (1 if complete else 0)
        return rollouts


def create_app(follower: Follower, title: str, hosts: tuple[str, ...] = LOOPBACK) -> "Starlette":
    """
    Makes an ASGI application with the page at `/` and its data at `/data.json`.

    Args:
        follower ([`Follower`]): Where the data comes from.
        title (`str`): Title of the page.
        hosts (tuple of `str`, *optional*): Names under which the server may be asked; `("*",)` for any. By default
            only those of this machine, so that a page from elsewhere cannot read the rollouts by a name of its own.

    Raises:
        ImportError: The extra `page` is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.middleware import Middleware
        from starlette.middleware.gzip import GZipMiddleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import HTMLResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError(
            'Following a run needs starlette and uvicorn. Install the extra: pip install "igpo-trl[page]".'
        ) from error
    page = render_page(title, None)

    async def index(request: "Request") -> "Response":
        return HTMLResponse(page)

    async def data(request: "Request") -> "Response":
        try:
            text, tag = await run_in_threadpool(follower.latest)
        except (OSError, ValueError) as error:
            return PlainTextResponse(f"the rollouts cannot be read ({error})", status_code=500)
        headers = {"ETag": tag, "Cache-Control": "no-store"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(text, media_type="application/json", headers=headers)

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        Middleware(GZipMiddleware, minimum_size=2000, compresslevel=1),
    ]
    return Starlette(routes=[Route("/", index), Route("/data.json", data)], middleware=middleware)
