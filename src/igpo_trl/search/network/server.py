"""A search server: any index over HTTP, with the `/retrieve` protocol of Search-R1.

Request: `POST /retrieve {"queries": [text, …], "topk": k, "return_scores": true}`. Other clients call the first two
`query` and `top_k` or `k`, and send a single query as a string; both are read. Any other field is an error.

Response: `{"result": [[{"document": {"id": …, "title": …, "contents": …}, "score": …}, …], …]}`, one list per query.
Without `return_scores`, the lists contain the documents themselves. `contents` is the title in quotes on its own line,
then the text.
"""

import asyncio
import contextlib
import difflib
import json
import socket
from collections.abc import AsyncIterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from ... import __version__
from .. import open_search
from ..extras import require
from ..passages import Passage
from ..searchable import Searchable
from .http_requests import check_numbers
from .query_batcher import Overloaded, QueryBatcher

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response


def create_app(
    index: Searchable | str | Path,
    *,
    topk: int = 3,
    max_batch: int = 256,
    max_wait: float = 0.002,
    max_queries: int = 8192,
    max_topk: int = 100,
    max_body: int = 64 * 1024 * 1024,
    max_waiting: int = 16384,
) -> "Starlette":
    """
    Makes an ASGI application that answers `POST /retrieve` from an index, and `GET /health`.

    Queries of concurrent requests are looked up together, in a thread, one batch at a time.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        topk (`int`, *optional*, defaults to `3`): Passages per query for requests without `topk`.
        max_batch (`int`, *optional*, defaults to `256`): Maximum number of queries per call of the index.
        max_wait (`float`, *optional*, defaults to `0.002`): Seconds that a query waits for others before an idle index
            is searched.
        max_queries (`int`, *optional*, defaults to `8192`): Maximum number of queries per request. Search-R1 sends
            those of all rollouts at once, 2,560 at its published settings.
        max_topk (`int`, *optional*, defaults to `100`): Maximum number of passages per query.
        max_body (`int`, *optional*, defaults to 64 MiB): Maximum size of a request, in bytes.
        max_waiting (`int`, *optional*, defaults to `16384`): Maximum number of waiting queries; a request that exceeds
            it gets status 503, so the client tries again.

    Raises:
        ImportError: starlette is not installed.
        ValueError: A limit is out of range.
    """
    require("starlette", "A search server", "serve")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    check_numbers(topk=topk, max_batch=max_batch, max_queries=max_queries, max_topk=max_topk, max_body=max_body)
    check_numbers(max_waiting=max_waiting)
    if max_wait < 0:
        raise ValueError(f"got max_wait={max_wait}, expected seconds, 0 or more.")
    if topk > max_topk:
        raise ValueError(f"got topk={topk}, expected at most max_topk={max_topk}.")
    searchable = open_search(index)
    request_type = _request_type(max_queries, max_topk)

    @contextlib.asynccontextmanager
    async def lifespan(app: "Starlette") -> AsyncIterator[None]:
        app.state.batcher = QueryBatcher(searchable, max_batch, max_wait, max_waiting)
        worker = asyncio.create_task(app.state.batcher.run())
        try:
            yield
        finally:
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker

    async def retrieve(request: "Request") -> "Response":
        body = await _read(request, max_body)
        if body is None:
            return _problem(413, f"the request is longer than {max_body} bytes. Send less, or raise `max_body`.")
        try:
            query = request_type.model_validate_json(body)
        except pydantic.ValidationError as error:
            return _problem(400 if error.errors()[0]["type"] == "json_invalid" else 422, _first_problem(error))
        try:
            results = await request.app.state.batcher.search(query.queries, query.topk or topk)
        except Overloaded:
            return _problem(503, f"more than {max_waiting} queries are waiting. Try again.", {"Retry-After": "1"})
        except Exception as error:
            return _problem(500, f"the index failed: {type(error).__name__}: {error}")
        return _json({"result": [[_item(p, query.return_scores) for p in passages] for passages in results]})

    async def health(request: "Request") -> "Response":
        return _json({"status": "ok", **_summary(searchable)})

    async def refuse(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, HTTPException)
        problem = f"{request.method} {request.url.path}: {error.detail}. Expected POST /retrieve or GET /health."
        return _problem(error.status_code, problem, error.headers)

    return Starlette(
        routes=[Route("/retrieve", retrieve, methods=["POST"]), Route("/health", health)],
        exception_handlers={HTTPException: refuse},
        lifespan=lifespan,
    )


def serve(index: Searchable | str | Path, host: str = "127.0.0.1", port: int = 8000, **limits: Any) -> None:
    """
    Serves an index over HTTP until the process gets SIGTERM or SIGINT; it then finishes the requests in progress.

    Prints one line with the address once it accepts requests. There is no authentication: listen on an address that
    only your own machines can reach.

    Args:
        index (`Searchable`, `str` or `Path`): What to search: an index, or what [`open_search`] opens.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): Address to listen on; `"0.0.0.0"` for all addresses of
            this machine.
        port (`int`, *optional*, defaults to `8000`): Port to listen on; 0 for a free one.
        limits:
            Those of [`create_app`].

    Raises:
        ImportError: starlette or uvicorn is not installed.
        OSError: The server cannot listen there, for example because the port is in use.
        ValueError: A limit is out of range.
    """
    require("uvicorn", "A search server", "serve")
    import uvicorn

    index = open_search(index)
    app = create_app(index, **limits)
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    summary = _summary(index)
    count = "" if summary["passages"] is None else f"{summary['passages']:,} passages "

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                address = f"http://{name}:{listener.getsockname()[1]}"
                print(f"Serving {count}({summary['kind']}) at {address}/retrieve", flush=True)

    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    with listener, contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a graceful end
        Server(config).run(sockets=[listener])


def _summary(index: Searchable) -> dict[str, Any]:
    """The kind of an index, its number of passages if known, and the version of this package."""
    kind = getattr(index, "kind", None)
    return {
        "kind": kind if isinstance(kind, str) else type(index).__name__,
        "passages": len(index) if isinstance(index, Sized) else None,
        "version": __version__,
    }


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that accepts connections. Raises an `OSError` if the address is not available."""
    if not 0 <= port <= 65535:
        raise ValueError(f"got port={port}, expected 0 to 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it. asyncio sets it only on sockets with TCP as their explicit protocol, which these do
        # not have; without it every response would wait 40 ms for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        problem = f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another (0: a free one)."
        raise OSError(error.errno, problem) from error


async def _read(request: "Request", limit: int) -> bytes | None:
    """The body of a request, or `None` if it is too long or the client has disconnected."""
    from starlette.requests import ClientDisconnect

    body = bytearray()
    with contextlib.suppress(ClientDisconnect):
        async for part in request.stream():
            body += part
            if len(body) > limit:
                return None
        return bytes(body)
    return None


_TOPK = ("topk", "top_k", "k")


def _request_type(max_queries: int, max_topk: int) -> Any:
    def as_list(queries: Any) -> Any:
        queries = [queries] if isinstance(queries, str) else queries
        if isinstance(queries, list) and len(queries) > max_queries:
            raise ValueError(
                f"got {len(queries)} queries, expected at most {max_queries}. Send several requests, or raise "
                "`max_queries` (igpo serve --max-queries)"
            )
        return queries

    def in_range(topk: int) -> int:
        if topk > max_topk:
            raise ValueError(
                f"got {topk}, expected at most {max_topk}. Ask for less, or raise `max_topk` (igpo serve --max-topk)"
            )
        return topk

    class RetrieveRequest(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

        queries: Annotated[list[str], pydantic.BeforeValidator(as_list)] = _field("queries", "query")
        # None and 0 mean the default, as on the server of Search-R1.
        topk: Annotated[int, pydantic.Field(ge=0), pydantic.AfterValidator(in_range)] | None = _field(
            *_TOPK, default=None
        )
        return_scores: bool = False

    return RetrieveRequest


def _field(*names: str, **options: Any) -> Any:
    """A field with several names, of which a request may use one."""
    return pydantic.Field(validation_alias=pydantic.AliasChoices(*names), **options)


def _first_problem(error: pydantic.ValidationError) -> str:
    # What a misspelt field is called says more than that the right one is missing.
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        names = ["queries", "query", *_TOPK, "return_scores"]
        near = difflib.get_close_matches(where, names, 1)
        if where in names:
            text = "another name of a field that the request has already"
        else:
            text = "no such field" + (f"; did you mean `{near[0]}`" if near else "")
    example = 'Expected {"queries": ["…"], "topk": 3, "return_scores": true}.'
    return f"{f'`{where}`: ' if where else ''}{text}. {example}"


def _item(passage: Passage, scored: bool) -> dict[str, Any]:
    # Clients read the title from the first line of `contents`.
    contents = f'"{" ".join(passage.title.split())}"\n{passage.text}'
    document = {"id": passage.id, "title": passage.title, "contents": contents}
    return {"document": document, "score": float(passage.score)} if scored else document


def _json(value: Any, status: int = 200, headers: Any = None) -> "Response":
    from starlette.responses import Response

    # ASCII: a corpus may contain lone surrogates, which cannot be encoded in UTF-8.
    return Response(json.dumps(value), status, dict(headers or {}), media_type="application/json")


def _problem(status: int, text: str, headers: Any = None) -> "Response":
    return _json({"error": text}, status, headers)
