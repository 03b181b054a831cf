"""Close codes: why a side closes a websocket, and what of it stands against connecting anew."""

from typing import Final

from d2f_stream.core.errors import D2FError, ProtocolError, Unauthorized

__all__ = ["CLOSE_CODES", "MESSAGE_TOO_LARGE", "UNAUTHORIZED", "final_error"]

PROTOCOL_ERROR: Final = 1002
MESSAGE_TOO_LARGE: Final = 1009
UNAUTHORIZED: Final = 4401

CLOSE_CODES: Final = {
    "shutting_down": 1012,
    "protocol_error": PROTOCOL_ERROR,
    "too_many_connections": 1013,
    "unauthorized": UNAUTHORIZED,
    "slow_consumer": 4408,
}
"""What a server sends, by the code of the error."""


def final_error(code: int, reason: str) -> D2FError | None:
    """Return why a server that closed with this would do so again; None where it might not."""
    if code == UNAUTHORIZED:
        return Unauthorized(reason or "the server wants another token")
    if code == PROTOCOL_ERROR:
        return ProtocolError(f"the server cannot read this client: {reason}")
    return None
