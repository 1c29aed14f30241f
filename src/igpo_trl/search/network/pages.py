"""The page-reading tool that a policy calls."""

import functools
import ipaddress
import re
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tenacity

from ...files import encodable
from ...tools import tool
from ..extras import require
from ..passages import Passage
from .fetching import Page, PageError, check_page_url, fetch, resolve
from .http_requests import check_numbers
from .response_cache import CacheMode, Missing, ResponseCache

DESCRIPTION = "Read a page of the web."
HTML, PLAIN = ("text/html", "application/xhtml+xml"), "text/plain"
LONGEST_WORD = 12  # average characters per word, at most: some scripts have no spaces


class PageReader:
    """
    Reads web pages as plain text, without menus and advertisements.

    The addresses come from a policy, so only public ones are fetched: private, loopback, link-local, multicast and
    reserved addresses are refused, whatever their name or form, and so are redirects to them. Only HTML and plain text
    are read, and at most `max_bytes` of it.

    Args:
        cache, mode, missing:
            As for [`WebSearch`], whose cache may be the same. `"record"` stores errors too. In `"replay"`, a page that
            was not recorded raises [`CacheMiss`], or with `missing="empty"` a [`PageError`].
        timeout (`float`, *optional*, defaults to `20.0`): Seconds per attempt, redirects included.
        max_attempts (`int`, *optional*, defaults to `2`): Maximum number of attempts if the connection fails or the
            server is busy or fails.
        max_bytes (`int`, *optional*, defaults to `2_000_000`): Maximum size; the rest is cut off.
        max_redirects (`int`, *optional*, defaults to `5`): Maximum number of redirects.
        allow (`Sequence[str]`, *optional*): Networks that may be reached although they are not public, such as
            `["10.1.0.0/16"]` for an intranet.
        user_agent (`str`, *optional*, defaults to `"igpo-trl"`): The `User-Agent` header.
        look_up (`Callable`, *optional*): Returns the addresses of a host name and port, for names that the system
            cannot resolve.
        ssl_context (`ssl.SSLContext`, *optional*): Certificates to trust; by default those of the system.

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
        self._cache = ResponseCache(cache, mode, missing)
        self.timeout = timeout
        self.max_attempts = max_attempts
        self._fetch = functools.partial(
            fetch,
            kinds=(*HTML, PLAIN),
            max_bytes=max_bytes,
            timeout=timeout,
            max_redirects=max_redirects,
            allowed=self._allowed,
            headers=[("User-Agent", user_agent), ("Accept", ", ".join((*HTML, PLAIN)))],
            look_up=look_up,
            ssl_context=ssl_context,
        )

    def read(self, url: str) -> Passage:
        """
        Reads a page.

        Returns:
            `Passage`: The page, with its address after redirects as `id`.

        Raises:
            PageError: The page is not allowed or cannot be read, in words for a policy.
            CacheMiss: A replayed page was not recorded.
        """
        address = str(check_page_url(encodable(url).strip(), self._allowed))
        key = {"page": address}
        cached = self._cache.get(key)
        if cached is not None and "error" not in cached:
            return Passage(**cached)
        if self._cache.mode == "replay":
            if cached is not None:
                raise PageError(cached["error"])
            self._cache.check_miss(f": {address}")
            raise PageError("this page is not available.")
        try:
            passage = self._read(address)
        except PageError as error:
            self._cache.put(key, {"error": str(error)})
            raise
        self._cache.put(key, {"id": passage.id, "title": passage.title, "text": passage.text})
        return passage

    def _read(self, address: str) -> Passage:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, PageError) and error.again),
            stop=tenacity.stop_after_attempt(self.max_attempts),
            wait=tenacity.wait_exponential(multiplier=0.5, max=5.0),
            reraise=True,
        )
        page = retrying(self._fetch, address)
        title, text = page_text(page)
        if not text:
            raise PageError("the page has no text.")
        return Passage(page.url, title, text)


def ReadPageTool(
    reader: PageReader | None = None, max_words: int | None = 1000, *, description: str = DESCRIPTION
) -> Callable[[str], str]:
    """
    Makes a page-reading function for `tools=[…]` of a TRL trainer.

    The function is called `read_page` and takes one `url`. For a bad address, or a page that cannot be read, it
    returns a text that tells the policy what is wrong.

    Args:
        reader ([`PageReader`], *optional*): Reads the pages; by default one without options.
        max_words (`int`, *optional*, defaults to `1000`): Maximum number of words shown of a page. `None` for no
            limit.
        description (`str`, *optional*): Tool description for the policy.

    Returns:
        `Callable[[str], str]`: The tool. It raises only [`CacheMiss`].

    Raises:
        ValueError: `max_words` is not positive.
        ImportError: trafilatura is not installed.

    Example:

    ```python
    >>> tools = [SearchTool(WebSearch("answers/")), ReadPageTool(PageReader("answers/"))]
    ```
    """
    check_numbers(max_words=max_words)
    pages = PageReader() if reader is None else reader
    if not callable(getattr(pages, "read", None)):
        raise TypeError(f"got reader={reader!r}, expected a PageReader, such as PageReader({reader!r}).")
    # The attempts, the pauses between them, and the time to look up names and to extract the text.
    limit = pages.max_attempts * (pages.timeout + 5.0) + 10.0

    @tool(pure=True, timeout=limit)
    def read_page(url: str) -> str:
        return _show(pages, url, max_words)

    # The policy sees this docstring through the chat template, and the qualified name in errors about arguments.
    read_page.__qualname__ = "read_page"
    read_page.__doc__ = f"{description}\n\nArgs:\n    url: The address of the page, as in a search result."
    return read_page


def _show(reader: PageReader, url: object, max_words: int | None) -> str:
    if not isinstance(url, str):  # policies send anything
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
        return "", encodable(_decode(page).replace("\x00", "")).strip()
    trafilatura = _trafilatura()
    try:
        html: Any = page.data if page.charset is None else _decode(page)
        tree = trafilatura.load_html(html)
        if tree is None:
            return "", ""
        title = " ".join((tree.findtext(".//title") or "").split())
        text = trafilatura.extract(html, include_comments=False) or trafilatura.html2txt(html)
    except Exception as error:  # the parser gets arbitrary input
        raise PageError(f"the page cannot be read ({type(error).__name__}).") from None
    return encodable(title), encodable(text).strip()


def cut_words(text: str, limit: int) -> str:
    """The first words of a text, with its lines."""
    end = next((word.start() for i, word in enumerate(re.finditer(r"\S+", text)) if i == limit), len(text))
    end = min(end, limit * LONGEST_WORD)
    return text if end >= len(text) else f"{text[:end].rstrip()} …"


def _decode(page: Page) -> str:
    try:
        return page.data.decode(page.charset or "utf-8", errors="replace")
    except LookupError:  # an unknown encoding
        return page.data.decode("utf-8", errors="replace")


def _trafilatura() -> Any:
    return require("trafilatura", "Reading pages", "web")
