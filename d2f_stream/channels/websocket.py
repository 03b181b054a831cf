"""A client's channel over a websocket: handshake, token, and how its failures are told.

The one file of the client that knows `websockets`. A token travels in the Authorization header and
nowhere else: a URL ends up in logs, histories and tracebacks.
"""

import ipaddress
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from d2f_stream.channels import ChannelClosed
from d2f_stream.channels.unreachable import reason_of
from d2f_stream.core.errors import (
    ConnectionLost,
    InvalidRequest,
    MissingExtra,
    ProtocolError,
    Unauthorized,
)
from d2f_stream.wire.addresses import SECRETS
from d2f_stream.wire.close_codes import UNAUTHORIZED
from d2f_stream.wire.codec import JSON, MSGPACK, SUBPROTOCOLS, Codec
from d2f_stream.wire.protocol import Authenticate

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["WebSocketChannel", "check_url", "open_websocket"]

PATH: Final = "/v1/stream"
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
MAX_REASON_BYTES: Final = 123
"""Of a close frame: RFC 6455 allows 125 bytes for code and reason."""
CLOSE_TIMEOUT_S: Final = 2.0
NOTHING_NEW: Final = ("", "no token was given", "the token is wrong")


class WebSocketChannel:
    """A Channel over an open connection.

    Args:
        socket: open.
        codec: that was agreed on.
        refused: tells what the server's refusal means, given its reason.
    """

    def __init__(
        self, socket: "ClientConnection", codec: Codec, *, refused: Callable[[str], str]
    ) -> None:
        self.codec = codec
        self._socket = socket
        self._refused = refused

    async def receive(self) -> bytes | str:
        """Wait for the next message. Safe to cancel; no message is lost.

        Raises:
            ChannelClosed: there will be none.
        """
        from websockets.exceptions import ConnectionClosed

        try:
            return await self._socket.recv()
        except ConnectionClosed as error:
            raise self._closed(error) from error

    async def send(self, data: bytes) -> None:
        """Send a message; waits while the write buffer is full.

        Cancelling may leave the message sent or not; close the channel after that.

        Raises:
            ChannelClosed: nothing can be sent any more.
        """
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(data, text=self.codec.is_text)
        except ConnectionClosed as error:
            raise self._closed(error) from error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close both directions; waits for the other side a short while. Idempotent."""
        short = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        await self._socket.close(code, short)

    def _closed(self, error: Exception) -> ChannelClosed:
        """Return why the connection ended: what the server said, else what went wrong here."""
        from websockets.exceptions import ConnectionClosed

        assert isinstance(error, ConnectionClosed)
        close = error.rcvd or error.sent
        if close is None:
            return ChannelClosed()
        reason = self._refused(close.reason) if close.code == UNAUTHORIZED else close.reason
        return ChannelClosed(close.code, reason)


def check_url(url: str) -> str:
    """Return the address to connect to; without a path it is that of a d2f server.

    A server's http:// or https:// address means its websocket.

    Raises:
        InvalidRequest: it is no websocket address, or it holds a secret.
    """
    try:
        parts = urlsplit(url)
        host, port, query = parts.hostname, parts.port, parse_qsl(parts.query)
    except ValueError as error:
        raise InvalidRequest(f"the address cannot be read: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest(f"the address of {host} holds a password; give it as token= instead")
    if secret := next((name for name, _ in query if name.lower() in SECRETS), None):
        raise InvalidRequest(
            f"the address of {host} holds a {secret} in its query; give it as token= instead"
        )
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not host or parts.fragment:
        raise InvalidRequest(
            f"the address is {url!r} but must be of the form ws://host:port or wss://host"
        )
    del port  # read, since it raises where it is no number
    path = parts.path if parts.path not in ("", "/") else PATH
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))


async def open_websocket(url: str, *, token: str | None = None) -> WebSocketChannel:
    """Connect to a server. Safe to cancel.

    Args:
        url: as `check_url` returns it.
        token: sent as `Authorization: Bearer`.

    Raises:
        ConnectionLost: nobody answers there.
        ChannelClosed: the server is there and cannot take the connection now.
        Unauthorized: it wants another token.
        ProtocolError: it is there and is no d2f server.
        MissingExtra: websockets is not installed.
    """
    try:
        from websockets.asyncio.client import connect
        from websockets.exceptions import (
            InvalidHandshake,
            InvalidMessage,
            InvalidStatus,
            WebSocketException,
        )
        from websockets.typing import Subprotocol
    except ImportError as error:
        raise MissingExtra("connecting to ws://", "websockets", "client") from error
    headers = {"Authorization": f"Bearer {token}"} if token is not None else None
    try:
        socket = await connect(
            url,
            subprotocols=[Subprotocol(codec.subprotocol) for codec in (MSGPACK, JSON)],
            additional_headers=headers,
            compression=None,
            proxy=None if _is_loopback(url) else True,
            max_size=MAX_MESSAGE_BYTES,
            close_timeout=CLOSE_TIMEOUT_S,
        )
    except InvalidStatus as error:
        raise _refused(url, error.response.status_code, token) from error
    except InvalidMessage as error:  # it hung up instead of answering
        raise ConnectionLost(f"{_host(url)} does not answer: {error}") from error
    except InvalidHandshake as error:
        raise ProtocolError(f"{_host(url)} does not speak the protocol: {error}") from error
    except (OSError, EOFError, WebSocketException) as error:
        raise ConnectionLost(f"{_host(url)} cannot be reached: {reason_of(error)}") from error
    codec = SUBPROTOCOLS.get(socket.subprotocol or "")
    if codec is None:
        await socket.close()
        raise ProtocolError(f"{_host(url)} speaks none of {', '.join(SUBPROTOCOLS)}")
    channel = WebSocketChannel(socket, codec, refused=partial(_refusal, _host(url), token))
    if token is None:
        # A server that wants a token says so now, instead of waiting for one to come.
        await channel.send(codec.encode(Authenticate(token="")))
    return channel


def _refused(url: str, status: int, token: str | None) -> Exception:
    host = _host(url)
    if status == 401:
        return Unauthorized(_refusal(host, token, f"HTTP {status}"))
    if status == 403:  # which is also what the server has for a path that it does not know
        given = "the token that was given" if token else "clients without a token"
        return Unauthorized(f"{host} does not know this path, or refuses {given} (HTTP {status})")
    if status == 429 or status >= 500:
        return ChannelClosed(1013, f"HTTP {status}")
    return ProtocolError(f"{url} is not the address of a d2f server (HTTP {status})")


def _refusal(host: str, token: str | None, said: str) -> str:
    more = "" if said in NOTHING_NEW else f" ({said})"
    if token:
        return f"{host} does not accept the token that was given{more}"
    return (
        f"{host} wants a token and none was given{more}; pass it as token=, on the command line as "
        "--token or in D2F_TOKEN"
    )


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _is_loopback(url: str) -> bool:
    """Whether the server is on this machine, where the environment's proxy cannot reach it."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
