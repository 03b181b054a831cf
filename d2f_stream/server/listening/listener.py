"""Listener: the socket that a server listens on, or a sentence that says why there is none."""

import os
import socket
from typing import Final

from d2f_stream.core.errors import D2FError

__all__ = ["AddressUnavailable", "check_address", "listen"]

SEND_BUFFER_BYTES: Final = 128 * 1024
"""Of each connection, in the kernel, which would else hold megabytes for a peer that reads none."""

RECEIVE_BUFFER_BYTES: Final = 32 * 1024
"""Of each connection, so that what many send at once is read in many turns of the event loop."""

BACKLOG: Final = 1024
"""Connections that the kernel holds until they are taken."""


class AddressUnavailable(D2FError):
    """The server cannot listen where it was told to; the sentence says why and what to do."""

    code = "address_unavailable"


def check_address(host: str, port: int) -> None:
    """Try to listen, so that an address in use is told before a model is loaded for minutes.

    Raises:
        AddressUnavailable: it cannot be listened on.
    """
    listen(host, port).close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; one that does not block.

    Raises:
        AddressUnavailable: the address is in use, or is not this machine's.
    """
    listener: socket.socket | None = None
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise AddressUnavailable(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port, or 0 for a free one"
        ) from error
    return listener
