"""The page-reading tool that a policy calls."""

import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tenacity

from ...tools import tool
from ..passages import Passage
from .fetching import Page, PageError, check_page_url, fetch, resolve
from .remote import check_numbers, clean
from .responses import CacheMiss, CacheMode, Missing, open_answers

DESCRIPTION = "Read a page of the web."
HTML, PLAIN = ("text/html", "application/xhtml+xml"), "text/plain"
LONGEST_WORD = 12  # characters that a word may have on average: some scripts write no spaces


class PageReader:
    """
    Reads pages of the web as plain text, without menus and advertisements.

    The addresses come from a policy, so only what is public is fetched: addresses that are private, loopback,
    link-local, multicast or reserved are refused, whatever name or form they are written in, and so is every redirect
    there. Only HTML and plain text are read, and no more than `max_bytes` of it.

    Args:
        cache (`str` or `Path`, *optional*):
            Directory for the pages; it may be that of a [`WebSearch`].
        mode (`str`, *optional*, defaults to `"live"`):
            `"live"` takes from the cache the pages that are there and fetches the rest, `"record"` fetches everything
            and stores it, errors too, `"replay"` fetches nothing.
        missing (`str`, *optional*, defaults to `"error"`):
            What `"replay"` makes of a page that was not recorded: a [`CacheMiss`], or a page that cannot be read
            (`"empty"`).
        timeout (`float`, *optional*, defaults to `20.0`):
            Seconds for one attempt, redirects included.
        max_attempts (`int`, *optional*, defaults to `2`):
            Attempts in all, when the connection fails, or the server is busy or fails.
        max_bytes (`int`, *optional*, defaults to `2_000_000`):
            What is longer is cut off.
        max_redirects (`int`, *optional*, defaults to `5`):
            Redirects that are followed.
        allow (`Sequence[str]`, *optional*):
            Networks that may be reached though they are not public, such as `["10.1.0.0/16"]` for an intranet.
        user_agent (`str`, *optional*, defaults to `"igpo-trl"`):
            How the reader introduces itself.
        look_up (`Callable`, *optional*):
            Gives the addresses of a host name and port, for names that the system does not know.
        ssl_context (`ssl.SSLContext`, *optional*):
            Certificates to trust; those of the system if not given.

    Raises:
        ImportError: trafilatura is not installed.
        ValueError: An argument is out of range, or the mode needs a cache.
        FileNotFoundError: There is nothing to replay.
    """

    def __init__(
        self,
        cache: str | Path | None = None,
        *,
        mode: CacheMode = "live",
        missing: Missing = "error",
        timeout: float = 20.0,
        max_attempts: int = 2,
        max_bytes: int = 2_000_000,
        max_redirects: int = 5,
        allow: Sequence[str] = (),
        user_agent: str = "igpo-trl",
        look_up: Callable[[str, int], list[str]] = resolve,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_numbers(timeout=timeout, max_attempts=max_attempts, max_bytes=max_bytes)
        if max_redirects < 0:
            raise ValueError(f"got max_redirects={max_redirects}, expected 0 or more.")
        if isinstance(allow, str):
            raise ValueError(f"got allow={allow!r}, expected a list of networks, such as ['10.1.0.0/16'].")
        if not user_agent.isascii() or not user_agent.isprintable():
            raise ValueError(f"got user_agent={user_agent!r}, expected printable ASCII.")
        self._allowed = [ipaddress.ip_network(network) for network in allow]
        _trafilatura()
        self._answers = open_answers(cache, mode, missing)
        self._mode = mode
        self._missing = missing
        self.timeout = timeout
        self.max_attempts = max_attempts
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._user_agent = user_agent
        self._look_up = look_up
        self._ssl_context = ssl_context

    def read(self, url: str) -> Passage:
        """
        Reads a page.

        Returns:
            A passage with the address at which the page was found in the end as `id`.

        Raises:
            PageError: The page may not be read, or cannot be; in words for a policy.
            CacheMiss: A page is replayed that was not recorded.
        """
        address = str(check_page_url(clean(url).strip(), self._allowed))
        name = {"page": address}
        if self._answers is not None and self._mode != "record":
            stored = self._answers.get(name)
            if stored is not None and "error" not in stored:
                return Passage(**stored)
            if stored is not None and self._mode == "replay":
                raise PageError(stored["error"])
            if self._mode == "replay":
                if self._missing == "error":
                    raise CacheMiss(f"not recorded in {self._answers.file}: {address}")
                raise PageError("this page is not available.")
        try:
            passage = self._fetch(address)
        except PageError as error:
            if self._answers is not None:
                self._answers.put(name, {"error": str(error)})
            raise
        if self._answers is not None:
            self._answers.put(name, {"id": passage.id, "title": passage.title, "text": passage.text})
        return passage

    def _fetch(self, address: str) -> Passage:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, PageError) and error.again),
            stop=tenacity.stop_after_attempt(self.max_attempts),
            wait=tenacity.wait_exponential(multiplier=0.5, max=5.0),
            reraise=True,
        )
        page = retrying(
            fetch,
            address,
            kinds=(*HTML, PLAIN),
            max_bytes=self._max_bytes,
            timeout=self.timeout,
            max_redirects=self._max_redirects,
            allowed=self._allowed,
            headers=[("User-Agent", self._user_agent), ("Accept", ", ".join((*HTML, PLAIN)))],
            look_up=self._look_up,
            ssl_context=self._ssl_context,
        )
        title, text = page_text(page)
        if not text:
            raise PageError("the page has no text.")
        return Passage(page.url, title, text)


def ReadPageTool(
    reader: PageReader | None = None, max_words: int | None = 1000, *, description: str = DESCRIPTION
) -> Callable[[str], str]:
    """
    A function for `tools=[…]` of a TRL trainer that reads pages.

    It is called `read_page` and takes one `url`. A bad address, and a page that cannot be read, is answered with a
    text that says so, for the policy to read.

    Args:
        reader ([`PageReader`], *optional*):
            What reads; one with the defaults if not given.
        max_words (`int`, *optional*, defaults to `1000`):
            Most words shown of a page. `None` for no limit.
        description (`str`, *optional*):
            What the policy is told that the tool does.

    Returns:
        `Callable[[str], str]`: The tool. It raises only a [`CacheMiss`].

    Raises:
        ValueError: `max_words` is not positive.
        ImportError: trafilatura is not installed.

    Example:

    ```python
    >>> tools = [SearchTool(WebSearch("answers/")), ReadPageTool(PageReader("answers/"))]
    ```
    """
    check_numbers(max_words=max_words)
    reads = PageReader() if reader is None else reader
    # The attempts, the pauses between them, and the time to look up names and to find the text.
    limit = reads.max_attempts * (reads.timeout + 5.0) + 10.0

    @tool(pure=True, timeout=limit)
    def read_page(url: str) -> str:
        return _show(reads, url, max_words)

    # Chat templates show this docstring to the policy, and a call with wrong arguments the qualified name.
    read_page.__qualname__ = "read_page"
    read_page.__doc__ = f"{description}\n\nArgs:\n    url: The address of the page, as in a search result."
    return read_page


def _show(reader: PageReader, url: object, max_words: int | None) -> str:
    if not isinstance(url, str):  # a policy sends what it likes
        return f"Error: the URL must be a string, got {type(url).__name__}."
    try:
        page = reader.read(url)
    except PageError as error:
        return f"Error: {error}"
    text = f"{page.title}\n{page.text}" if page.title else page.text
    return text if max_words is None else cut_words(text, max_words)


def page_text(page: Page) -> tuple[str, str]:
    """Title and text of a page; either may be empty."""
    if page.kind == PLAIN:
        return "", clean(_decode(page).replace("\x00", "")).strip()
    trafilatura = _trafilatura()
    try:
        html: Any = page.data if page.charset is None else _decode(page)
        tree = trafilatura.load_html(html)
        if tree is None:
            return "", ""
        title = " ".join((tree.findtext(".//title") or "").split())
        text = trafilatura.extract(html, include_comments=False) or trafilatura.html2txt(html)
    except Exception as error:  # a parser of what anybody may have written
        raise PageError(f"the page cannot be read ({type(error).__name__}).") from None
    return clean(title), clean(text).strip()


def cut_words(text: str, limit: int) -> str:
    """The first words of a text, lines kept."""
    end = next((word.start() for i, word in enumerate(re.finditer(r"\S+", text)) if i == limit), len(text))
    end = min(end, limit * LONGEST_WORD)
    return text if end >= len(text) else f"{text[:end].rstrip()} …"


def _decode(page: Page) -> str:
    try:
        return page.data.decode(page.charset or "utf-8", errors="replace")
    except LookupError:  # an encoding that nobody knows
        return page.data.decode("utf-8", errors="replace")


def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise ImportError(
            f'Reading pages needs trafilatura ({error}). Install it with: pip install "igpo-trl[web]"'
        ) from error
    return trafilatura
