"""Gateway: the protocol of /v1/stream on the server's side, over any channel.

Lets connections in, tells them when the server shuts down, and closes them; what a connection says
is `connection.py`. Knows neither sockets nor HTTP.
"""

import asyncio

from d2f_stream.channels import Channel
from d2f_stream.server.auth import Auth
from d2f_stream.server.streams.connection import CLOSE_CODES, Connection
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.protocol import VERSION, ServerClosing, ServerHello

__all__ = ["Gateway"]


class Gateway:
    """Serves the streams of a registry over channels.

    Args:
        registry: the streams.
        auth: who may connect.
    """

    def __init__(self, registry: StreamRegistry, auth: Auth | None = None) -> None:
        self.registry = registry
        self.auth = auth or Auth()
        self.num_slow_consumers = 0
        self._connections: set[Connection] = set()
        self._closing: ServerClosing | None = None

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    @property
    def hello(self) -> ServerHello:
        """What the server says of itself."""
        ttl_s = self.registry.limits.resume_ttl_s
        return ServerHello(protocol=VERSION, model=self.registry.card, resume_ttl_s=ttl_s)

    async def serve(self, channel: Channel, *, client: str | None) -> None:
        """Serve one connection to its end. Safe to cancel; its streams go on or end as asked.

        Args:
            channel: open; closed at the end.
            client: whose it is; None waits for an `authenticate` message.
        """
        limit = self.registry.limits.max_connections
        if self._closing is not None or len(self._connections) >= limit:
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
        )
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)

    def announce_closing(self, deadline_s: float) -> None:
        """Tell every client that the server shuts down, and let nobody in any more."""
        self._closing = ServerClosing(
            message="the server is shutting down; running streams may still end",
            deadline_s=deadline_s,
        )
        for connection in self._connections:
            connection.note_closing(self._closing)

    async def close(self) -> None:
        """Close every connection, after what is ready for it was sent. Safe to cancel."""
        connections = list(self._connections)
        for connection in connections:
            connection.finish()
        await asyncio.gather(*(connection.closed.wait() for connection in connections))

    def _note_slow(self) -> None:
        self.num_slow_consumers += 1
