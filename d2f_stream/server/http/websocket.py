"""The websocket `/v1/stream`: handshake, and a Channel over the connection.

A token comes in the Authorization header; or, from browsers, which cannot set it, as the
subprotocol `d2f.auth.<base64url of the token>` beside the one to speak; or else in the first
message. A query string ends up in logs and histories, so a token there is refused.

Whatever a browser's script must be able to read is told by a close code after the handshake, since
a refused handshake tells a script nothing.
"""

from typing import Final

from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from d2f_stream.channels import ChannelClosed
from d2f_stream.core.errors import Unauthorized
from d2f_stream.server.auth import (
    AUTH_SUBPROTOCOL,
    LOCAL,
    Auth,
    token_of_header,
    token_of_subprotocols,
)
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.wire.addresses import SECRETS
from d2f_stream.wire.close_codes import CLOSE_CODES
from d2f_stream.wire.codec import JSON, SUBPROTOCOLS, Codec

__all__ = ["WebSocketChannel", "stream_route"]

PATH: Final = "/v1/stream"
MAX_REASON_BYTES: Final = 123
"""Of a close frame: RFC 6455 allows 125 bytes for code and reason."""


class WebSocketChannel:
    """A Channel over an accepted websocket."""

    def __init__(self, socket: WebSocket, codec: Codec) -> None:
        self.codec = codec
        self._socket = socket

    async def receive(self) -> bytes | str:
        """Wait for the next message. Safe to cancel; no message is lost.

        Raises:
            ChannelClosed: there will be none.
        """
        try:
            message = await self._socket.receive()
        except RuntimeError as error:  # starlette's, after the disconnect was told once
            raise ChannelClosed() from error
        if message["type"] == "websocket.disconnect":
            raise ChannelClosed(message.get("code") or 1006, message.get("reason") or "")
        text: str | None = message.get("text")
        data: bytes | str = message["bytes"] if text is None else text
        return data

    async def send(self, data: bytes) -> None:
        """Send a message; waits while the peer's share of the write buffer is full.

        Safe to cancel; the message is then sent whole or not at all.

        Raises:
            ChannelClosed: nothing can be sent any more.
        """
        try:
            if self.codec.is_text:
                await self._socket.send_text(data.decode())
            else:
                await self._socket.send_bytes(data)
        except WebSocketDisconnect as error:
            raise ChannelClosed(error.code, error.reason) from error
        except RuntimeError as error:  # the server has closed it: a ping was not answered
            raise ChannelClosed() from error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close both directions. Idempotent."""
        short = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        try:
            await self._socket.close(code, short)
        except (WebSocketDisconnect, RuntimeError):
            return  # it is closed


def stream_route(gateway: Gateway) -> WebSocketRoute:
    """Return the route of the stream protocol."""

    async def endpoint(socket: WebSocket) -> None:
        offered = socket.scope["subprotocols"]
        try:
            codec, answer = _choose(offered)
        except LookupError as error:
            await socket.send_denial_response(PlainTextResponse(f"{error}\n", status_code=400))
            return
        await socket.accept(answer)
        channel = WebSocketChannel(socket, codec)
        peer = None if socket.client is None else (socket.client.host, socket.client.port)
        try:
            client = _client_of(socket, offered, gateway.auth)
        except Unauthorized as error:
            await gateway.logins.refuse(peer)
            await channel.close(CLOSE_CODES[error.code], str(error))
            return
        await gateway.serve(channel, client=client, peer=peer)

    return WebSocketRoute(PATH, endpoint, name="stream")


def _choose(offered: list[str]) -> tuple[Codec, str | None]:
    """Return the encoding, and the subprotocol to answer with: one that was offered, or none."""
    names = [name for name in offered if not name.startswith(AUTH_SUBPROTOCOL)]
    for name in names:
        if name in SUBPROTOCOLS:
            return SUBPROTOCOLS[name], name
    if names:
        known = ", ".join(SUBPROTOCOLS)
        raise LookupError(f"none of the offered subprotocols is spoken here; offer one of {known}")
    return JSON, None


def _client_of(socket: WebSocket, offered: list[str], auth: Auth) -> str | None:
    """Return whose connection it is; None where the first message has to tell."""
    if any(name.lower() in SECRETS for name in socket.query_params):
        raise Unauthorized(
            "a token must not stand in a query string, which ends up in logs; see the docs"
        )
    token = token_of_header(socket.headers.get("authorization"))
    if token is None:
        token = token_of_subprotocols(offered)
    if token is None:
        return None if auth.required else LOCAL
    return auth.client_of(token)
