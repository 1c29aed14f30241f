"""Fetches a page whose address a policy chose: only public pages, of limited size, in limited time.

A name is resolved once per connection, all its addresses are checked, and the connection goes to a checked address: a
name that resolves differently the next time gains nothing. TLS and the `Host` header still use the name. Every
redirect is a new request and is checked anew. Proxies of the environment are not used, because they would resolve the
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

import httpcore2
import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

LONGEST_URL = 2048
MAX_ADDRESSES = 4  # addresses of one host that are tried
REDIRECTS = (301, 302, 303, 307, 308)

# Not public, although `ipaddress` calls them global (in some releases).
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32"),  # protocol assignments, 6to4 relays, Azure's host
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo and others, documentation, 6to4
    )
]
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is assigned; mapped, NAT64 and local addresses lie elsewhere
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*", re.ASCII)
_NUMBER = re.compile(r"(?:\d+|0x[0-9a-f]*)", re.ASCII)


class PageError(Exception):
    """
    A page cannot be read. The message may be shown to a policy.

    Attributes:
        again (`bool`): Whether another attempt may succeed.
    """

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Page:
    """The response of a server."""

    url: str  # after redirects
    kind: str  # content type, without parameters
    charset: str | None  # as the server names it
    data: bytes  # the body, or the beginning of it


def is_public(address: Address, allowed: Iterable[Network] = ()) -> bool:
    """Whether an address belongs to the public internet or to one of the allowed networks."""
    if any(address in network for network in allowed):
        return True
    if not address.is_global or address.is_multicast or any(address in network for network in _SPECIAL):
        return False
    return not address.is_reserved if isinstance(address, ipaddress.IPv4Address) else address in _UNICAST


def check_page_url(text: str, allowed: Sequence[Network] = ()) -> httpx2.URL:
    """
    Checks everything about an address that can be checked without a look-up. Raises a [`PageError`] if it is not a
    plain `http://` or `https://` address with a host name or a public IP address.
    """
    if len(text) > LONGEST_URL:
        raise PageError(f"the URL is longer than {LONGEST_URL} characters.")
    if not text.isprintable() or " " in text or "\\" in text:
        raise PageError("the URL contains spaces or other characters that are not valid in a URL.")
    try:
        url = httpx2.URL(text)
        host = url.raw_host.decode("ascii").lower()
        user = "@" in urlsplit(text).netloc
    except (httpx2.InvalidURL, ValueError):
        raise PageError("this is not a valid URL.") from None
    if url.scheme not in ("http", "https"):
        raise PageError("only URLs that begin with http:// or https:// can be read.")
    if url.port is not None and not 0 < url.port < 65536:
        raise PageError(f"there is no port {url.port}.")
    if user or url.userinfo:
        raise PageError("a URL with a user name or password is not allowed.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # Numbers in other forms (2130706433, 0x7f.1, 127.1) are addresses to some resolvers only.
        if not _HOST_NAME.fullmatch(host) or _NUMBER.fullmatch(host.rsplit(".", 1)[-1]):
            raise PageError(f"{host[:100]!r} is not a host name.") from None
    else:
        if "%" in host:  # the zone of a link-local address
            raise PageError(f"{host} is not a host name.")
        if not is_public(address, allowed):
            raise PageError(f"{host} is not a public address.")
    return url.copy_with(fragment=None)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host name."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


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
    Fetches the page with the address `text`, which must have one of the content types `kinds`.

    Networks in `allowed` may be reached although they are not public. Limits, `look_up` and `ssl_context` are those of
    [`PageReader`]; the timeout does not cover the look-up of names. Raises a [`PageError`].
    """
    backend = _CheckedBackend(look_up, lambda address: is_public(address, allowed), time.monotonic() + timeout)
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
    return httpcore2.default_ssl_context()  # takes longer than fetching many pages


def _join(url: httpx2.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx2.InvalidURL, ValueError):
        raise PageError("the page redirects to something that is not a valid URL.") from None


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
        # Limited while decompressing: a few bytes may expand to millions.
        text = zlib.decompressobj(wbits=31).decompress(data, max_bytes) if encoding == "gzip" else bytes(data)
    except zlib.error:
        raise PageError("the page is damaged.", again=True) from None
    charset = re.search(r"charset\s*=\s*\"?([\w.:-]+)", parameters, re.IGNORECASE)
    return Page(url, kind, charset.group(1) if charset else None, text[:max_bytes])


class _CheckedBackend(httpcore2.NetworkBackend):
    """Resolves a name, checks that all its addresses are accepted, and connects to one of them before a deadline."""

    def __init__(
        self, look_up: Callable[[str, int], list[str]], accept: Callable[[Address], bool], deadline: float
    ) -> None:
        self._look_up = look_up
        self._accept = accept
        self._deadline = deadline
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        try:
            addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(self._look_up(host, port))]
        except socket.gaierror as error:
            raise PageError(f"the host {host} is not known.", again=error.errno == socket.EAI_AGAIN) from None
        except (OSError, ValueError):  # a label that is too long, a link-local address with a zone (fe80::1%eth0)
            raise PageError(f"the host {host} is not known.") from None
        # All of them: a public address among private ones is an attack, or may be one after the next look-up.
        if not addresses or not all(map(self._accept, addresses)):
            raise PageError(f"{host} is not a public address.")
        problem: httpcore2.NetworkError | httpcore2.TimeoutException | None = None
        for address in addresses[:MAX_ADDRESSES]:
            left = _remaining(self._deadline, timeout)
            try:
                stream = self._backend.connect_tcp(str(address), port, left, local_address, socket_options)
                return _Stream(stream, self._deadline)
            except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
                problem = error
        assert problem is not None
        raise problem


class _Stream(httpcore2.NetworkStream):
    """A connection whose operations end at a deadline, however slowly the bytes arrive."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _remaining(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _remaining(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _remaining(self._deadline, timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _remaining(deadline: float, timeout: float | None) -> float:
    """The seconds that an operation may take. Raises an `httpcore2.ReadTimeout` after the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(left, timeout)
