"""Connections that go to addresses that were checked, and end at a deadline."""

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2

from .fetching import Address, PageError

ATTEMPTS = 4  # addresses of one host that are tried


class PinnedBackend(httpcore2.NetworkBackend):
    """
    Resolves a name, checks every address it has, and connects to one of these.

    Args:
        look_up (`Callable`): Gives the addresses of a host name and port.
        accept (`Callable`): Whether an address may be connected to.
        deadline (`float`): When everything has to be over, on the clock `time.monotonic`.
    """

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
        """
        Raises:
            PageError: The name is unknown, or has an address that is not accepted.
        """
        try:
            addresses = [ipaddress.ip_address(text) for text in dict.fromkeys(self._look_up(host, port))]
        except socket.gaierror as error:
            raise PageError(f"the host {host} is not known.", again=error.errno == socket.EAI_AGAIN) from None
        except (OSError, ValueError):  # a label that is too long, an address of a certain link (fe80::1%eth0)
            raise PageError(f"the host {host} is not known.") from None
        # All of them: one public address among private ones is a trick, or may be one after the next look-up.
        if not addresses or not all(map(self._accept, addresses)):
            raise PageError(f"{host} is no public address.")
        problem: httpcore2.NetworkError | httpcore2.TimeoutException | None = None
        for address in addresses[:ATTEMPTS]:
            left = remaining(self._deadline, timeout)
            try:
                stream = self._backend.connect_tcp(str(address), port, left, local_address, socket_options)
                return _Stream(stream, self._deadline)
            except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
                problem = error
        assert problem is not None
        raise problem


class _Stream(httpcore2.NetworkStream):
    """A connection on which nothing takes longer than until the deadline, however slowly the bytes come."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, remaining(self._deadline, timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, remaining(self._deadline, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = remaining(self._deadline, timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def remaining(deadline: float, timeout: float | None) -> float:
    """
    Seconds that an operation may take.

    Raises:
        httpcore2.ReadTimeout: None are left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(left, timeout)
