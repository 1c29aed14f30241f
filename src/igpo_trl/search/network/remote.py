"""What the clients of search services share: one connection pool per process, retries, errors that say where."""

import email.utils
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import httpx2
import tenacity

FIRST_PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
LONGEST_PAUSE = 10.0
LONGEST_WAIT = 60.0  # a service that asks for a longer pause (`Retry-After`) is given up
EXCERPT = 200  # characters of an answer that an error shows

_random = random.SystemRandom()  # a retry must not change the random numbers of a run, nor forks wait in step


class SearchError(RuntimeError):
    """A search service could not be reached, refused the request, or gave an answer that cannot be read."""


class Secret(str):
    """A text that is not shown where a traceback shows the values of variables."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'[secret]'"


class ProcessClient:
    """
    An HTTP client for each process that uses it: connections must not be shared by a process and its forks.

    Args:
        make (`Callable[[], httpx2.Client]`): Makes a client.
    """

    def __init__(self, make: Callable[[], httpx2.Client]) -> None:
        self._make = make
        self._clients: dict[int, httpx2.Client] = {}
        weakref.finalize(self, _close, self._clients)

    def get(self) -> httpx2.Client:
        """The client of this process; safe to call from several threads."""
        # No lock, which a fork could inherit locked. That of the parent stays in the dictionary: closing it is not
        # the child's business.
        client = self._clients.get(os.getpid())
        if client is None:
            made = self._make()
            client = self._clients.setdefault(os.getpid(), made)
            if client is not made:
                made.close()
        return client

    def close(self) -> None:
        """Close the connections of this process; a later request opens new ones."""
        _close(self._clients)


def _close(clients: dict[int, httpx2.Client]) -> None:
    client = clients.pop(os.getpid(), None)
    if client is not None:
        client.close()


class RateLimit:
    """
    Spaces requests of the threads of one process evenly.

    Args:
        per_second (`float`, *optional*): Requests per second, `None` for no limit.
    """

    def __init__(self, per_second: float | None) -> None:
        self._gap = 1.0 / per_second if per_second else 0.0
        self._next = 0.0
        self._lock, self._process = threading.Lock(), os.getpid()

    def wait(self) -> None:
        """Return when it is the caller's turn."""
        if not self._gap:
            return
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        time.sleep(max(0.0, turn - time.monotonic()))


class _Outcome(NamedTuple):
    """What an attempt came to: the decoded answer, or what went wrong and whether to try again (after how long)."""

    value: Any = None
    problem: str = ""
    again: bool = False
    pause: float | None = None


def check_numbers(**values: float | None) -> None:
    """
    Checks options that must be positive.

    Raises:
        ValueError: A value is not above 0 (`None` means no limit, and passes).
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"got {name}={value}, expected more than 0.")


def check_url(url: str, name: str = "url") -> httpx2.URL:
    """
    Checks the address of a service.

    Raises:
        ValueError: It is no absolute `http://` or `https://` address.
    """
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"got {name}={url!r}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"got {name}={url!r}, expected an address such as http://127.0.0.1:8000.")
    return parsed


def split_userinfo(url: httpx2.URL) -> tuple[httpx2.URL, tuple[str, str] | None]:
    """The address without user and password, which logs and errors would show, and these two if there are any."""
    return url.copy_with(userinfo=b""), (url.username, url.password) if url.userinfo else None


def post_json(
    client: httpx2.Client,
    url: httpx2.URL,
    body: Mapping[str, Any],
    *,
    max_attempts: int,
    headers: Mapping[str, str] | None = None,
    secret: str = "",
    turn: Callable[[], None] = lambda: None,
    hint: str = "",
) -> Any:
    """
    Posts JSON and decodes the JSON that comes back.

    Tries again, each time after a longer pause, when the service cannot be reached, takes too long, or answers with
    status 429 or 5xx.

    Args:
        client (`httpx2.Client`): What to send with.
        url (`httpx2.URL`): Where to; logs and errors show it.
        body (`Mapping`): The request.
        max_attempts (`int`): Attempts in all.
        headers (`Mapping[str, str]`, *optional*): Further headers.
        secret (`str`, *optional*): What a header holds; blotted out of answers and errors.
        turn (`Callable`, *optional*): Called before each attempt; waits as long as it likes.
        hint (`str`, *optional*): Added to errors that mean that this is another kind of service.

    Raises:
        SearchError: No attempt succeeded, or the answer is no JSON.
    """
    shown = f"POST {url.copy_with(userinfo=b'')}"
    content = json.dumps(body).encode()
    if not (secret.isascii() and secret.isprintable()):
        # The error of the library would show it.
        raise SearchError(f"{shown}: the key holds characters that cannot be sent. Is there a line break in it?")

    def attempt() -> _Outcome:
        turn()
        try:
            response = client.post(
                url, content=content, headers={"Content-Type": "application/json", **(headers or {})}
            )
        except httpx2.RequestError as error:
            return _Outcome(problem=f"{shown}: {_reason(error, client)}", again=True)
        # Without the exception as its cause: that holds the request, and the request holds its headers.
        text = response.text.replace(secret, "[secret]") if secret else response.text
        problem = f"{shown} answered {response.status_code} {response.reason_phrase}: {excerpt(text)}"
        if response.status_code == 429 or response.status_code >= 500:
            return _Outcome(problem=problem, again=True, pause=retry_after(response.headers.get("Retry-After")))
        if not response.is_success:
            return _Outcome(problem=f"{problem} {hint}".rstrip())
        try:
            return _Outcome(json.loads(text))
        except ValueError:
            return _Outcome(problem=f"{shown} gave an answer that is no JSON: {excerpt(text)} {hint}".rstrip())

    outcome: _Outcome = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda outcome: outcome.again and (outcome.pause or 0.0) <= LONGEST_WAIT),
        stop=tenacity.stop_after_attempt(max_attempts),
        wait=_pause,
        retry_error_callback=lambda state: state.outcome.result(),  # type: ignore[union-attr]
    )(attempt)
    if outcome.problem:
        tries = ""
        if outcome.again:
            asked = outcome.pause is not None and outcome.pause > LONGEST_WAIT
            tries = f" (asked to wait {outcome.pause:.0f} s)" if asked else f" ({max_attempts} attempts)"
        raise SearchError(outcome.problem + tries)
    return outcome.value


def clean(text: str) -> str:
    """The same text, encodable: a lone surrogate, as a policy may write one, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def excerpt(text: str) -> str:
    """The beginning of an answer, on one line."""
    text = re.sub(r"\s+", " ", text[: 4 * EXCERPT]).strip()
    return repr(text if len(text) <= EXCERPT else f"{text[: EXCERPT - 1]}…") if text else "(nothing)"


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number of them, or a date. `None` if it says neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: those asked for, or exponential with jitter."""
    outcome = state.outcome.result() if state.outcome is not None else _Outcome()
    if outcome.pause is not None:
        return outcome.pause * _random.uniform(1.0, 1.1)
    return min(FIRST_PAUSE * 2 ** (state.attempt_number - 1), LONGEST_PAUSE) * _random.uniform(0.5, 1.5)


def _reason(error: httpx2.RequestError, client: httpx2.Client) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {client.timeout.read:g} s ({type(error).__name__})."
    text = str(error) or type(error).__name__
    if isinstance(error, httpx2.ConnectError):
        return f"cannot connect ({text}). Is the server running, and are host and port right?"
    return f"the connection failed ({text})."
