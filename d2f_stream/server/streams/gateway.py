"""Gateway: the protocol of /v1/stream on the server's side, over any channel.

Lets connections in, tells them when the server shuts down, and closes them; what a connection says
is `connection.py`. Knows neither sockets nor HTTP.
"""

import asyncio

from d2f_stream.channels import Channel
from d2f_stream.core.errors import ServerShuttingDown, TooManyConnections
from d2f_stream.server.auth import LOCAL, Auth
from d2f_stream.server.logins import FailedLogins, Peer
from d2f_stream.server.streams.connection import Connection
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.close_codes import CLOSE_CODES
from d2f_stream.wire.protocol import VERSION, ServerClosing, ServerHello

__all__ = ["Gateway"]


class Gateway:
    """Serves the streams of a registry over channels.

    Args:
        registry: the streams.
        auth: who may connect.

    Attributes:
        logins: the wrong tokens that were shown, here and elsewhere.
        num_slow_consumers: connections that did not read and were closed for it.
    """

    def __init__(self, registry: StreamRegistry, auth: Auth | None = None) -> None:
        self.registry = registry
        self.auth = auth or Auth()
        self.logins = FailedLogins(allowed=registry.limits.max_failed_logins)
        self.num_slow_consumers = 0
        self._strangers: dict[Connection, None] = {}  # not let in yet, the oldest first
        self._connections: set[Connection] = set()
        self._reading_large = asyncio.Lock()
        self._closing: ServerClosing | None = None

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._connections) + len(self._strangers)

    @property
    def hello(self) -> ServerHello:
        """What the server says of itself."""
        ttl_s = self.registry.limits.resume_ttl_s
        return ServerHello(protocol=VERSION, model=self.registry.card, resume_ttl_s=ttl_s)

    async def serve(
        self, channel: Channel, *, client: str | None, peer: Peer | None = None
    ) -> None:
        """Serve one connection to its end. Safe to cancel; its streams go on or end as asked.

        Args:
            channel: open; closed at the end.
            client: whose it is; None waits for an `authenticate` message.
            peer: the other side's address, where it has one.
        """
        limit = self.registry.limits.max_connections
        if self._closing is not None or self.num_connections >= limit:
            refusal = self._closing.message if self._closing else f"all {limit} connections in use"
            code = CLOSE_CODES["shutting_down" if self._closing else "too_many_connections"]
            await channel.close(code, refusal)
            return
        connection = Connection(
            channel,
            self.registry,
            self.auth,
            client=client,
            hello=self.hello,
            on_slow=self._note_slow,
            on_client=self._let_in,
            logins=self.logins,
            peer=peer,
            reading_large=self._reading_large,
        )
        self._strangers[connection] = None
        if client is None:
            self._make_room_for_strangers()
        try:
            await connection.serve()
        finally:
            self._strangers.pop(connection, None)
            self._connections.discard(connection)

    def announce_closing(self, deadline_s: float) -> None:
        """Tell every client that the server shuts down, and let nobody in any more."""
        self._closing = ServerClosing(
            message="the server is shutting down; running streams may still end",
            deadline_s=deadline_s,
        )
        for connection in self._all():
            connection.note_closing(self._closing)

    async def close(self) -> None:
        """Close every connection, after what is ready for it was sent. Safe to cancel."""
        connections = self._all()
        for connection in connections:
            connection.finish(ServerShuttingDown("the server is shutting down"))
        await asyncio.gather(*(connection.closed.wait() for connection in connections))

    def _all(self) -> list[Connection]:
        return [*self._connections, *self._strangers]

    def _make_room_for_strangers(self) -> None:
        """Let connections that have shown no token take their share only: the oldest go."""
        limit = self.registry.limits.max_unauthenticated
        waiting = [stranger for stranger in self._strangers if stranger.client is None]
        for stranger in waiting[: max(0, len(waiting) - limit)]:
            sentence = f"more than {limit} connections have shown no token; show it at once"
            stranger.finish(TooManyConnections(sentence))

    def _let_in(self, connection: Connection, client: str) -> None:
        limit = self.registry.limits.max_connections_per_client
        own = sum(other.client == client for other in self._connections)
        if limit is not None and client != LOCAL and own >= limit:
            raise TooManyConnections(
                f"{own} connections are yours and the limit is {limit}; one can read many streams"
            )
        self._strangers.pop(connection, None)
        self._connections.add(connection)

    def _note_slow(self) -> None:
        self.num_slow_consumers += 1
