"""Fetching a page whose address a policy made up: nothing but public pages, of bounded size, in bounded time.

A name is resolved once per connection, all its addresses are checked, and the connection goes to an address that was
checked: a name that answers differently the next time gains nothing. TLS and the `Host` header still use the name.
Every redirect is a new request that is checked anew. Proxies of the environment are not used: they would resolve the
name again.
"""

import functools
import ipaddress
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_URL = 2048
REDIRECTS = (301, 302, 303, 307, 308)

# What `ipaddress` calls global, or did in some releases, and is none of the policy's business.
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),  # protocol assignments, 6to4 relays, Azure's host
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and others, documentation, 6to4
    )
]
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is given out; mapped, NAT64 and local addresses lie elsewhere
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.ASCII)
_NUMBER = re.compile(r"(?:\d+|0x[0-9a-f]*)", re.ASCII)


class PageError(Exception):
    """
    A page cannot be read, in words that a policy may see.

    Attributes:
        again (`bool`): Whether trying again may help.
    """

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Page:
    """
    What a server sent.

    Attributes:
        url (`str`): Where it was found in the end.
        kind (`str`): Its content type, without parameters.
        charset (`str`, *optional*): The encoding that the server names.
        data (`bytes`): The beginning of it, or all.
    """

    url: str
    kind: str
    charset: str | None
    data: bytes


def is_public(address: Address, allowed: Iterable[Network] = ()) -> bool:
    """Whether an address is one of the public internet, or lies in a network that is allowed all the same."""
    if any(address in network for network in allowed):
        return True
    if not address.is_global or address.is_multicast or any(address in network for network in _SPECIAL):
        return False
    return not address.is_reserved if isinstance(address, ipaddress.IPv4Address) else address in _UNICAST


def check_page_url(text: str, allowed: Sequence[Network] = ()) -> httpx2.URL:
    """
    Checks all of an address that can be checked without looking anything up.

    Raises:
        PageError: It is no plain `http://` or `https://` address of a host by name, or by a public number.
    """
    if len(text) > LONGEST_URL:
        raise PageError(f"the URL is longer than {LONGEST_URL} characters.")
    if not text.isprintable() or " " in text or "\\" in text:
        raise PageError("the URL holds spaces or other characters that no URL has.")
    try:
        url = httpx2.URL(text)
        host = url.raw_host.decode("ascii").lower()
        user = "@" in urlsplit(text).netloc
    except (httpx2.InvalidURL, ValueError):
        raise PageError("this is no valid URL.") from None
    if url.scheme not in ("http", "https"):
        raise PageError("only URLs that begin with http:// or https:// can be read.")
    if url.port is not None and not 0 < url.port < 65536:
        raise PageError(f"there is no port {url.port}.")
    if user or url.userinfo:
        raise PageError("a URL with a user name or password is not read.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # Numbers in other forms (2130706433, 0x7f.1, 127.1) are names to nobody but some resolvers.
        if not _HOST_NAME.fullmatch(host) or _NUMBER.fullmatch(host.rsplit(".", 1)[-1]):
            raise PageError(f"{host[:100]!r} is no host name.") from None
    else:
        if "%" in host:  # an address of a certain link
            raise PageError(f"{host} is no host name.")
        if not is_public(address, allowed):
            raise PageError(f"{host} is no public address.")
    return url.copy_with(fragment=None)


def resolve(host: str, port: int) -> list[str]:
    """
    The addresses of a host name.

    Raises:
        OSError: It has none, or the look-up failed.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch(
    text: str,
    *,
    kinds: Sequence[str],
    max_bytes: int,
    timeout: float,
    max_redirects: int = 5,
    allowed: Sequence[Network] = (),
    headers: Sequence[tuple[str, str]] = (),
    look_up: Callable[[str, int], list[str]] = resolve,
    ssl_context: ssl.SSLContext | None = None,
) -> Page:
    """
    Fetches a page.

    Args:
        text (`str`): Its address.
        kinds (`Sequence[str]`): Content types that are read.
        max_bytes (`int`): What is longer is cut off, compressed and not.
        timeout (`float`): Seconds for all of it, redirects included; a look-up of a name may take longer.
        max_redirects (`int`): Redirects that are followed.
        allowed (`Sequence` of networks): May be reached though they are not public.
        headers (`Sequence[tuple[str, str]]`): Sent along.
        look_up (`Callable`): Gives the addresses of a host name and port, as [`resolve`] does.
        ssl_context (`ssl.SSLContext`, *optional*): Certificates to trust, those of the system if not given.

    Raises:
        PageError: It may not be fetched, cannot be, or is of another kind.
    """
    import httpcore2

    from .pinned import PinnedBackend

    deadline = time.monotonic() + timeout
    backend = PinnedBackend(look_up, lambda address: is_public(address, allowed), deadline)
    try:
        for _ in range(max_redirects + 1):
            url = check_page_url(text, allowed)
            trusted = (ssl_context or _system_certificates()) if url.scheme == "https" else None
            with httpcore2.ConnectionPool(trusted, max_connections=1, network_backend=backend) as pool:
                target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
                sent = [("Host", url.netloc.decode("ascii")), ("Accept-Encoding", "gzip"), *headers]
                limits = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
                with pool.stream("GET", target, headers=sent, extensions={"timeout": limits}) as response:
                    location = _header(response, b"location")
                    if response.status in REDIRECTS and location:
                        text = _join(url, location)
                        continue
                    return _read(response, str(url), kinds, max_bytes)
    except httpcore2.TimeoutException:
        raise PageError(f"the page took longer than {timeout:g} s.", again=True) from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise PageError(f"the connection failed ({error}).", again=True) from None
    raise PageError(f"the page redirects more than {max_redirects} times.")


@functools.cache
def _system_certificates() -> ssl.SSLContext:
    import httpcore2

    return httpcore2.default_ssl_context()  # takes longer than many a page


def _join(url: httpx2.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx2.InvalidURL, ValueError):
        raise PageError("the page redirects to something that is no valid URL.") from None


def _header(response: Any, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


def _read(response: Any, url: str, kinds: Sequence[str], max_bytes: int) -> Page:
    if not 200 <= response.status < 300:
        again = response.status in (408, 425, 429) or response.status >= 500
        raise PageError(f"the server answered with status {response.status}.", again=again)
    kind, _, parameters = _header(response, b"content-type").partition(";")
    kind = kind.strip().lower()
    if kind not in kinds:
        raise PageError(f"the page is of type {kind[:50] or 'unknown'!r}; only {' and '.join(kinds)} can be read.")
    encoding = _header(response, b"content-encoding").strip().lower()
    if encoding not in ("", "identity", "gzip"):
        raise PageError(f"the page is compressed in a way that cannot be read ({encoding[:50]!r}).")
    data = bytearray()
    for part in response.iter_stream():
        data += part
        if len(data) >= max_bytes:
            break
    try:
        # Bounded while unpacking: a few bytes may stand for millions.
        text = zlib.decompressobj(wbits=31).decompress(data, max_bytes) if encoding == "gzip" else bytes(data)
    except zlib.error:
        raise PageError("the page is damaged.", again=True) from None
    charset = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters, re.IGNORECASE)
    return Page(url, kind, charset.group(1) if charset else None, text[:max_bytes])
