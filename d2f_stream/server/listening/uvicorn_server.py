"""UvicornServer: uvicorn without its signal handlers, its listener and its idle wake-ups."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from d2f_stream.server.listening.sockets import Sockets, accept_forever

__all__ = ["UvicornServer"]


class UvicornServer(uvicorn.Server):
    """Answers the connections of one listener, and tells by `ready` when it does."""

    def __init__(self, config: uvicorn.Config, sockets: Sockets) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self._asked = asyncio.Event()
        self._sockets = sockets
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        """Keep the clock of the Date header until `ask_exit`."""
        # uvicorn's own wakes ten times a second; the clock needs once.
        assert self._accepting is not None
        while not await self.on_tick(0):
            if self._accepting.done():
                self._accepting.result()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._asked.wait()

    def ask_exit(self) -> None:
        """End the main loop, now."""
        self.should_exit = True
        self._asked.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections from the one listener, which is closed with the server."""
        assert sockets is not None
        await self.lifespan.startup()
        self.servers = []
        (self._listener,) = sockets
        accepting = accept_forever(self._listener, self._sockets, self._new_protocol)
        self._accepting = asyncio.create_task(accepting, name="d2f-accept")
        self.started = True
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no connections any more and close those that are open."""
        await self._stop_accepting()
        await super().shutdown(sockets)

    def _new_protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait((self._accepting,))
        if self._listener is not None:
            self._listener.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the process."""
        yield

    async def finish_responses(self, timeout_s: float) -> None:
        """Take no connections any more and let HTTP responses end."""
        await self._stop_accepting()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=timeout_s)

    def abort_connections(self) -> None:
        """Cut every connection off, now."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
