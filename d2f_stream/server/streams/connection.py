"""Connection: one client's side of /v1/stream on a server, over any channel.

Reads operations one after the other, and leaves what is to be told to `Outgoing`, which another
task writes. Knows neither sockets nor HTTP.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, assert_never

from d2f_stream.channels import Channel, ChannelClosed
from d2f_stream.channels.patience import patient_timeout
from d2f_stream.core.errors import (
    D2FError,
    ProtocolError,
    SlowConsumer,
    TooManyStreams,
    Unauthorized,
)
from d2f_stream.server.auth import Auth, asker_of
from d2f_stream.server.logins import FailedLogins, Peer
from d2f_stream.server.peer_log import PeerLog
from d2f_stream.server.streams.outgoing import Outgoing
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.close_codes import CLOSE_CODES
from d2f_stream.wire.protocol import (
    Authenticate,
    Cancel,
    Generate,
    RequestRejected,
    Resume,
    ServerClosing,
    ServerHello,
)

__all__ = ["Connection"]

logger = logging.getLogger("d2f_stream.server")
log = PeerLog(logger)

LAST_WORDS_S: Final = 1.0
LARGE_BYTES: Final = 16 * 1024
"""Larger messages are read one in each turn of the event loop, whoever sent them."""


class Connection:
    """One client's connection, from its first message to its last.

    Args:
        channel: open; closed at the end.
        registry: the streams.
        auth: who may connect.
        client: whose it is; None waits for an `authenticate` message.
        hello: said once the client is let in.
        on_slow: called when the client did not take what was sent for too long.
        on_client: called with the client's name once it is known; raises where it is not let in.
        logins: counts wrong tokens.
        peer: the other side's address, where it has one.
        reading_large: held by whoever reads a large message.

    Attributes:
        closed: set when everything of it is over.
        client: whose it is, once that is known.
    """

    def __init__(
        self,
        channel: Channel,
        registry: StreamRegistry,
        auth: Auth,
        *,
        client: str | None,
        hello: ServerHello,
        on_slow: Callable[[], None],
        on_client: Callable[["Connection", str], None],
        logins: FailedLogins,
        peer: Peer | None,
        reading_large: asyncio.Lock,
    ) -> None:
        self.closed = asyncio.Event()
        self.client = client
        self._channel = channel
        self._registry = registry
        self._limits = registry.limits
        self._auth = auth
        self._hello = hello
        self._on_client = on_client
        self._logins = logins
        self._peer = peer
        self._reading_large = reading_large
        self._outgoing = Outgoing(
            channel, stall_timeout_s=self._limits.stall_timeout_s, on_slow=on_slow
        )
        self._num_bad = 0

    async def serve(self) -> None:
        """Serve it to its end. Safe to cancel; its streams go on or end as asked."""
        reader = asyncio.create_task(self._read(), name="d2f-connection-reader")
        writer = asyncio.create_task(self._outgoing.write(), name="d2f-connection-writer")
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not writer.cancelled():
                await self._read_rest(reader, writer.exception())
        finally:
            try:
                self._outgoing.detach()
                code, reason = await self._end(reader, writer)
                with contextlib.suppress(ChannelClosed):
                    await self._channel.close(code, reason)
            finally:
                self.closed.set()

    async def _read_rest(self, reader: "asyncio.Task[None]", broken: BaseException | None) -> None:
        """Take what a client sent before it left: its last words may cancel streams."""
        if isinstance(broken, ChannelClosed):
            self._outgoing.leave()
            await asyncio.wait((reader,), timeout=LAST_WORDS_S)

    def note_closing(self, message: ServerClosing) -> None:
        """Tell the client that the server shuts down."""
        if self.client is not None:
            self._outgoing.reply(message)

    def finish(self, reason: D2FError) -> None:
        """Close it, after what is ready for it was sent."""
        self._outgoing.finish(reason)

    async def _end(
        self, reader: "asyncio.Task[None]", writer: "asyncio.Task[None]"
    ) -> tuple[int, str]:
        """Stop both tasks; return why the connection ends, as close code and reason."""
        code, reason = 1000, ""
        for task in (reader, writer):
            task.cancel()
        for task in (reader, writer):
            await asyncio.wait((task,))
            error = None if task.cancelled() else task.exception()
            if isinstance(error, _Closing):
                error = error.reason
            if isinstance(error, D2FError):
                code, reason = CLOSE_CODES.get(error.code, 1011), str(error)
                if isinstance(error, ProtocolError | Unauthorized | SlowConsumer):
                    log.info("closing a connection: %s", error)
            elif error is not None and not isinstance(error, ChannelClosed):
                logger.error("a connection failed", exc_info=error)
                code, reason = 1011, "internal error"
        return code, reason

    async def _read(self) -> None:
        if self.client is None:
            self.client = await self._authenticate()
        self._on_client(self, self.client)
        self._outgoing.reply(self._hello)
        while True:
            await self._take(await self._channel.receive())
            await self._outgoing.wait_room()

    async def _authenticate(self) -> str:
        timeout_s = self._limits.auth_timeout_s
        try:
            async with patient_timeout(timeout_s):
                data = await self._channel.receive()
        except TimeoutError:
            raise Unauthorized(f"no token came within {timeout_s:g} s") from None
        try:
            operation = self._channel.codec.decode_operation(data)
        except D2FError:
            operation = None
        if not isinstance(operation, Authenticate):
            raise Unauthorized("the first message must be authenticate, with a token")
        try:
            return self._auth.client_of(operation.token)
        except Unauthorized:
            if operation.token:
                await self._logins.refuse(self._peer)
            raise

    async def _take(self, data: bytes | str) -> None:
        codec = self._channel.codec
        try:
            if len(data) > LARGE_BYTES:
                async with self._reading_large:
                    operation = codec.decode_operation(data)
            else:
                operation = codec.decode_operation(data)
        except D2FError as error:
            request_id, stream = codec.names_of(data)
            self._outgoing.reply(RequestRejected.of(error, request_id=request_id, stream=stream))
            if isinstance(error, ProtocolError):
                self._note_bad()
            return
        try:
            if isinstance(operation, Authenticate):
                await self._log_in_again(operation.token)
            else:
                await self._do(operation)
        except D2FError as error:
            request_id = getattr(operation, "request_id", None)
            stream = getattr(operation, "stream", None)
            self._outgoing.reply(RequestRejected.of(error, request_id=request_id, stream=stream))

    def _note_bad(self) -> None:
        self._num_bad += 1
        if self._num_bad >= self._limits.max_bad_messages:
            raise ProtocolError(f"{self._num_bad} messages could not be read")

    async def _log_in_again(self, token: str) -> None:
        """Take a token that is this client's own; another's counts as a wrong one."""
        with contextlib.suppress(Unauthorized):
            if self._auth.client_of(token) == self.client:
                return
        refusal = Unauthorized("the token is wrong, or another client's")
        if await self._logins.refuse(self._peer):
            raise _Closing(refusal)
        raise refusal

    async def _do(self, operation: Generate | Resume | Cancel) -> None:
        match operation:
            case Generate():
                await self._generate(operation)
            case Resume():
                await self._resume(operation)
            case Cancel():
                assert self.client is not None
                await self._registry.cancel(operation.name, client=self.client)
            case _:
                assert_never(operation)

    async def _generate(self, request: Generate) -> None:
        assert self.client is not None
        if not self._outgoing.reads(request_id=request.request_id):
            self._check_room()
        stream = await self._registry.generate(
            request, client=self.client, asker=asker_of(self.client, id(self))
        )
        drafts = request.params.drafts is True
        self._outgoing.follow(stream, after_seq=-1, drafts=drafts)

    async def _resume(self, operation: Resume) -> None:
        assert self.client is not None
        stream = await self._registry.resume(
            operation.stream, client=self.client, after_seq=operation.after_seq
        )
        if not self._outgoing.reads(stream_id=operation.stream):
            self._check_room()
        self._outgoing.follow(stream, after_seq=operation.after_seq, drafts=operation.drafts)

    def _check_room(self) -> None:
        limit = self._limits.max_streams_per_connection
        num_streams = self._outgoing.num_streams
        if num_streams >= limit:
            raise TooManyStreams(
                f"this connection reads {num_streams} streams and the limit is {limit}; "
                "wait for one to end, or open another connection"
            )


class _Closing(Exception):
    """An error that ends the connection, where others of its kind only refuse an operation."""

    def __init__(self, reason: D2FError) -> None:
        self.reason = reason
