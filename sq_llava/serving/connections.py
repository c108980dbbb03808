"""Who may connect to the server, and for how long a connection may wait: time limits, and the names of the server.

    uvicorn.run(app, http=partial(TimedConnection, header_seconds=10.0), ws="none")

uvicorn closes a connection that is idle after a reply, but waits forever for the rest of a header. Thousands of
half-sent headers would use up all the connections that this process may have.
"""

import asyncio
import re
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


# The names by which a browser reaches a server on its own machine.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

HOST_NAME = re.compile(r"\*|(\*\.)?[\w.-]+|\[[\da-fA-F:.]+\]")


class TimedConnection(H11Protocol):
    """
    A connection of uvicorn that is closed unless the headers of its next request are complete in time.

    Args:
        header_seconds (`float`): The limit, from the connection or, on an open connection, from the first byte of the
            next request. Bytes that trickle in do not extend it.
        settings: As for uvicorn's class.
    """

    def __init__(self, *, header_seconds: float, **settings: Any):
        super().__init__(**settings)
        self.header_seconds = header_seconds
        self.deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        waits_for_headers = self.cycle is None or self.cycle.response_complete
        if not waits_for_headers:
            self._drop_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _drop_deadline(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a server that listens on this address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_to_accept(host: str, allowed_hosts: Sequence[str] | None) -> list[str]:
    """
    The names of the server that a request may have in its `Host` header, for Starlette's `TrustedHostMiddleware`.

    On a loopback address these are the names of this machine. Otherwise a web page could let its own name point to
    this machine (DNS rebinding), and a visitor's browser would let it read the replies. These names are accepted
    on every address: programs on this machine use them, such as a health check, and Gradio when it starts.

    Args:
        host (`str`): The address that the server listens on.
        allowed_hosts (`list[str]`, *optional*): More names: `example.org`, `*.example.org`, or `*` for all.

    Raises:
        ValueError: if a name has its `*` elsewhere, or has a port or a path.
    """
    for name in allowed_hosts or []:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(
                f"--allowed-hosts is {name!r}: give a name without port, such as example.org, *.example.org or *."
            )
    if not (allowed_hosts or is_loopback(host)):
        return ["*"]
    own = f"[{host}]" if ":" in host else host
    return [*LOOPBACK_NAMES, own, *(allowed_hosts or [])]
