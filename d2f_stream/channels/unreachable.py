"""Unreachable: why nothing answers at an address, in words for people."""

import errno
import os
import socket
import ssl
from typing import Final

__all__ = ["reason_of"]

REFUSED: Final = f"[Errno {errno.ECONNREFUSED}]"  # in texts about several addresses of one host


def reason_of(error: Exception) -> str:
    """Return why no connection came about, from an error of the system, or a library's over one."""
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
    if isinstance(cause, socket.gaierror):
        return "no host of that name is known; check the address"
    if isinstance(cause, ConnectionRefusedError) or REFUSED in str(cause):
        return "nothing listens there; start it, or check host and port"
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno)
    return str(error) or type(error).__name__
