"""What uvicorn leaves open: connections that send slowly, never read, or never go away.

uvicorn 0.54 bounds headers and message sizes, and blocks a `send` while the peer does not read. It
has no time limit for a request that trickles in, none for a response that nobody reads, and waits
for the write buffer of a peer that never reads even to close it. It also logs what a peer does
wrong at ERROR, in part with a traceback. The two protocol classes here mend that, by the methods
that asyncio itself calls on a protocol, and tell `Sockets` which connections are idle.
"""

import asyncio
import logging
from typing import Any, Final, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from d2f_stream.channels.patience import Patience
from d2f_stream.server.listening.gathered_writes import GatheredWrites
from d2f_stream.server.listening.sockets import Sockets
from d2f_stream.server.peer_log import PeerLog
from d2f_stream.server.settings import Timeouts

__all__ = ["guarded_protocols", "uvicorn_config"]

MAX_FRAGMENTS: Final = 1024
"""Fragments of one websocket message: empty ones have no size, but are kept until its end."""


class _PeersLogger:
    """uvicorn's logger: what peers do wrong in short lines, errors of the application in full.

    Also without what is no error here: a refused handshake, and a response cut off on purpose.
    """

    level = logging.INFO

    def __init__(self) -> None:
        self._logger = logging.getLogger("d2f_stream.server")
        self._log = PeerLog(self._logger)

    def info(self, text: str, *values: object) -> None:
        """Nothing: uvicorn's lines hold query strings."""

    def warning(self, text: str, *values: object) -> None:
        self._log.info("a peer: " + text, *values)

    def error(self, text: str, *values: object, exc_info: BaseException | None = None) -> None:
        if exc_info is not None:
            self._logger.error(text.strip(), *values, exc_info=exc_info)

    def exception(self, text: str, *values: object) -> None:
        if text.startswith("Exception in ASGI"):
            self._logger.exception(text.strip(), *values)
        else:
            self.warning(text, *values)


def guarded_protocols(
    timeouts: Timeouts, sockets: Sockets
) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """Return the protocol classes for uvicorn's `http` and `ws`."""
    given = {"timeouts": timeouts, "sockets": sockets, "peers_logger": _PeersLogger()}
    http = type("HttpProtocol", (_GuardedHttp,), given)
    websocket = type("WebSocketProtocol", (_GuardedWebSocket,), given)
    return http, websocket


class _GuardedHttp(H11Protocol):
    timeouts: Timeouts
    sockets: Sockets
    peers_logger: _PeersLogger

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = self.peers_logger  # type: ignore[assignment]
        self._request_timer = _Timer()
        self._stall_timer = _Timer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self.sockets.discard(self.transport)
        self._request_timer.stop()
        self._stall_timer.stop()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_request()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self.sockets.note_busy(self.transport)
        self._request_timer.stop()
        self._stall_timer.stop()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer.start(self.timeouts.stall_s, self.transport)

    def resume_writing(self) -> None:
        self._stall_timer.stop()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_request()

    def _watch_request(self) -> None:
        """Run the timer while a request is incomplete; bytes that trickle in do not reset it.

        Also while the connection closes, which a peer that does not read the rest could hold up.
        Between two requests uvicorn's own timer runs, `keep_alive_s`.
        """
        if self.transport.get_protocol() is not self:
            return  # a websocket now
        if self.transport.is_closing():
            self._request_timer.start(self.timeouts.request_s, self.transport)
            return
        # A response may be complete before its request: only after both does a next one come.
        is_between = self.timeout_keep_alive_task is not None and self.conn.their_state is h11.IDLE
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._request_timer.stop()
            self.sockets.note_busy(self.transport)
        elif is_between and not self.conn.trailing_data[0]:
            self._request_timer.stop()
            self.sockets.note_kept(self.transport)
        else:
            self._request_timer.start(self.timeouts.request_s, self.transport)
            self.sockets.note_silent(self.transport)


class _GuardedWebSocket(WebSocketsSansIOProtocol):
    timeouts: Timeouts
    sockets: Sockets
    peers_logger: _PeersLogger

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = self.peers_logger  # type: ignore[assignment]
        self.close_timeout = self.timeouts.close_s / 2  # uvicorn's, for the peer to confirm
        self._abort_timer = _Timer()
        self._waiting_pong = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connected = self.transport
        self.transport = GatheredWrites(self._connected)
        self._abort_timer.start(self.timeouts.request_s, self.transport)  # until it is accepted

    def connection_lost(self, exc: Exception | None) -> None:
        self.sockets.discard(self._connected)
        self._abort_timer.stop()
        super().connection_lost(exc)

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self._abort_later()

    async def send(self, message: Any) -> None:
        match message["type"]:
            case "websocket.accept":
                self._abort_timer.stop()
            case "websocket.close":
                # It goes behind what the peer has not read yet, and must not wait for that.
                self.writable.set()
                self._abort_later()
            case "websocket.send" if self.transport.is_closing():
                raise ClientDisconnected  # uvicorn learns of it in the loop's next turn only
        await super().send(message)

    def shutdown(self) -> None:
        super().shutdown()
        self._abort_later()

    def send_keepalive_ping(self) -> None:
        super().send_keepalive_ping()
        if self.pong_timer is not None:
            self.pong_timer.cancel()
            patience = Patience(self.timeouts.ping_s, self.keepalive_timeout)
            self.pong_timer = patience  # type: ignore[assignment]  # it is cancelled only

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._abort_later()

    def handle_ping(self) -> None:
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set():
            self.transport.write(pong)
        else:
            # RFC 6455, 5.5.3: a pong for the latest ping is enough. A peer that pings and never
            # reads would else fill the memory.
            self._waiting_pong = pong

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(CloseCode.POLICY_VIOLATION, f"more than {MAX_FRAGMENTS} fragments")
            self.frames = []
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        super().handle_parser_exception()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        pong, self._waiting_pong = self._waiting_pong, b""
        if pong and not self.transport.is_closing():
            self.transport.write(pong)

    def _abort_later(self) -> None:
        """Drop the connection after a while, whether the peer took what was sent or not."""
        if not self.disconnected:
            self._abort_timer.stop()
            self._abort_timer.start(self.timeouts.close_s, self.transport)


class _Timer:
    """Aborts a connection after a delay, unless it is stopped before."""

    def __init__(self) -> None:
        self._patience: Patience | None = None

    def start(self, delay_s: float, transport: asyncio.Transport) -> None:
        """Begin to count, unless it counts already."""
        if self._patience is None:
            self._patience = Patience(delay_s, transport.abort)

    def stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def uvicorn_config(
    app: object, timeouts: Timeouts, sockets: Sockets, *, max_message_bytes: int
) -> uvicorn.Config:
    """Return the settings of a uvicorn server that holds nothing for nobody."""
    http, websocket = guarded_protocols(timeouts, sockets)
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # any ASGI application
        http=http,
        ws=websocket,
        ws_max_size=max_message_bytes,
        ws_max_queue=4,
        ws_ping_interval=timeouts.ping_s,
        ws_ping_timeout=timeouts.ping_s,
        ws_per_message_deflate=False,  # costs 64 KiB a connection, for messages of some 300 bytes
        lifespan="off",
        log_config=None,
        log_level="warning",  # below that, uvicorn logs paths with their query strings
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=timeouts.keep_alive_s,  # type: ignore[arg-type]  # of call_later
        timeout_graceful_shutdown=int(timeouts.close_s) + 1,
        h11_max_incomplete_event_size=16 * 1024,
    )
