"""What the clients of web services share: a connection pool per process, a rate limit, retries, and precise errors."""

import contextlib
import email.utils
import functools
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx2
import tenacity

from ...tools import JITTER, retry_pause

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 10.0
LONGEST_WAIT = 60.0  # a longer `Retry-After` than this ends the request
EXCERPT = 200  # characters of a response that an error shows


class SearchError(RuntimeError):
    """A search service cannot be reached, refuses the request, or sends an invalid response."""


class Secret(str):
    """A string that tracebacks with the values of variables do not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'[secret]'"


class ProcessClient:
    """An `httpx2.Client` per process, because a process and its forks must not share connections."""

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._clients: dict[int, httpx2.Client] = {}
        weakref.finalize(self, _close, self._clients)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return functools.partial(ProcessClient, **self._options), ()

    def get(self) -> httpx2.Client:
        """The client of this process; safe to call from several threads."""
        # No lock: a fork could inherit it locked. The parent's client stays in the dictionary, because closing it
        # would disturb the parent.
        client = self._clients.get(os.getpid())
        if client is None:
            new = httpx2.Client(**self._options)
            client = self._clients.setdefault(os.getpid(), new)
            if client is not new:
                new.close()
        return client

    def close(self) -> None:
        """Closes the connections of this process; a later request opens new ones."""
        _close(self._clients)


def _close(clients: dict[int, httpx2.Client]) -> None:
    client = clients.pop(os.getpid(), None)
    if client is not None:
        client.close()


class RateLimit:
    """Spaces the requests of all threads of a process evenly; `None` is for no limit."""

    def __init__(self, per_second: float | None) -> None:
        self._per_second = per_second
        self._next = 0.0
        self._lock, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type["RateLimit"], tuple[float | None]]:
        return RateLimit, (self._per_second,)

    def wait(self) -> None:
        """Returns when the caller may send its request."""
        if self._per_second is None:
            return
        if self._process != os.getpid():  # forked, perhaps while another thread had the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + 1.0 / self._per_second
        time.sleep(max(0.0, start - time.monotonic()))


def check_numbers(**values: float | None) -> None:
    """Raises a `ValueError` for an option that is not above 0. (`None` means no limit and is valid.)"""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"got {name}={value}, expected more than 0.")


def check_url(url: str, name: str = "url") -> httpx2.URL:
    """The parsed address of a service. Raises a `ValueError` if it is not an absolute HTTP or HTTPS address."""
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"got {name}={url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"got {name}={url!r}, expected an address such as http://127.0.0.1:8000.")
    return parsed


class _Outcome(NamedTuple):
    """Outcome of an attempt: the decoded response, or a problem and whether (and after how long) to try again."""

    value: Any = None
    problem: str = ""
    again: bool = False
    pause: float | None = None


def post_json(
    client: httpx2.Client,
    url: httpx2.URL,
    body: Mapping[str, Any],
    *,
    max_attempts: int,
    headers: Mapping[str, str] | None = None,
    secret: str = "",
    before_attempt: Callable[[], None] = lambda: None,
    hint: str = "",
) -> Any:
    """
    Posts JSON and decodes the JSON response. Raises a [`SearchError`] if no attempt succeeds.

    Tries again, each time after a longer pause, if the service cannot be reached, takes too long, or responds with
    status 429 or 5xx. Logs and errors show the address. A `secret` in the headers is replaced in responses and errors.
    The `hint` is appended to errors that suggest that this is another kind of service. `before_attempt` may wait for a
    [`RateLimit`].
    """
    request = f"POST {url.copy_with(userinfo=b'')}"
    content = json.dumps(body).encode()
    if not (secret.isascii() and secret.isprintable()):
        # The library's own error would show it.
        raise SearchError(f"{request}: the key has characters that cannot be sent. Is there a line break in it?")

    def attempt() -> _Outcome:
        before_attempt()
        try:
            response = client.post(
                url, content=content, headers={"Content-Type": "application/json", **(headers or {})}
            )
        except httpx2.RequestError as error:
            # An outcome, not an exception with this one as its cause: that has the request, which has the headers.
            return _Outcome(problem=f"{request}: {_reason(error, client)}", again=True)
        text = response.text.replace(secret, "[secret]") if secret else response.text
        problem = f"{request} answered {response.status_code} {response.reason_phrase}: {excerpt(text)}"
        if response.status_code == 429 or response.status_code >= 500:
            return _Outcome(problem=problem, again=True, pause=retry_after(response.headers.get("Retry-After")))
        if not response.is_success:
            return _Outcome(problem=f"{problem} {hint}".rstrip())
        try:
            return _Outcome(json.loads(text))
        except ValueError:
            return _Outcome(problem=f"{request} gave a response that is not JSON: {excerpt(text)} {hint}".rstrip())

    outcome: _Outcome = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda outcome: outcome.again and (outcome.pause or 0.0) <= LONGEST_WAIT),
        stop=tenacity.stop_after_attempt(max_attempts),
        wait=_pause,
        retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
    )(attempt)
    if not outcome.problem:
        return outcome.value
    if outcome.pause is not None and outcome.pause > LONGEST_WAIT:
        raise SearchError(f"{outcome.problem} (asked to wait {outcome.pause:.0f} s)")
    raise SearchError(outcome.problem + (f" ({max_attempts} attempts)" if outcome.again else ""))


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: those that the service asked for, or exponential with jitter."""
    outcome: _Outcome = state.outcome.result()  # type: ignore[union-attr]
    if outcome.pause is not None:
        return outcome.pause * JITTER.uniform(1.0, 1.1)
    return retry_pause(state.attempt_number, FIRST_PAUSE, LONGEST_PAUSE)


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, as a number or as a date. `None` if it is neither."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def excerpt(text: str) -> str:
    """The beginning of a response, on one line."""
    text = re.sub(r"\s+", " ", text[: 4 * EXCERPT]).strip()
    return repr(text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…") if text else "(nothing)"


def _reason(error: httpx2.RequestError, client: httpx2.Client) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {client.timeout.read:g} s ({type(error).__name__})."
    text = str(error) or type(error).__name__
    if isinstance(error, httpx2.ConnectError):
        return f"cannot connect ({text}). Is the server running, and are host and port right?"
    return f"the connection failed ({text})."
