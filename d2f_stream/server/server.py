"""Server: one engine on one port, from listening to the last closed connection.

Owns the streams, the gateways and uvicorn, and the order of an orderly end. It runs inside any
event loop; signals and the ready line are those of `serve`.
"""

import asyncio
import contextlib
import logging
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol, Self, runtime_checkable

from d2f_stream.core.errors import EngineFailed
from d2f_stream.core.session import Engine
from d2f_stream.server.app import create_app
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.listening.listener import listen
from d2f_stream.server.listening.sockets import Sockets, max_sockets
from d2f_stream.server.listening.uvicorn_guard import uvicorn_config
from d2f_stream.server.listening.uvicorn_server import UvicornServer
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.settings import ServeSettings
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry

if TYPE_CHECKING:
    from d2f_stream.server.mqtt.gateway import MqttGateway
    from d2f_stream.server.streams.valkey.log import ValkeyLog

__all__ = ["Server"]

logger = logging.getLogger("d2f_stream.server")

HURRY_S: Final = 1.0
"""For the engine to end streams that are not to end in order."""

LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")


@runtime_checkable
class MendableEngine(Protocol):
    """An engine whose backend can fail, and be loaded anew."""

    async def wait_failed(self) -> None:
        """Wait until the backend has failed. Safe to cancel."""
        ...

    async def reload(self) -> None:
        """Load the model anew, and accept requests again."""
        ...


class Server:
    """Serves an open engine; an async context manager that listens from entering to leaving.

    Leaving it without `shut_down` ends all streams and connections at once.

    Args:
        engine: stays open, and is its owner's.
        settings: where and how to listen.
        metrics: observes the server; None makes them.

    Raises:
        InvalidRequest: the broker's URL cannot be used, or the log's.
        MissingExtra: a broker or a log is named whose library is not installed.

    Attributes:
        registry: the streams.
        gateway: the websocket connections.
        metrics: what is told at /metrics.
    """

    def __init__(
        self, engine: Engine, settings: ServeSettings, *, metrics: Metrics | None = None
    ) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        most = max_sockets(settings.limits.max_sockets)
        limits = replace(  # the rest is for HTTP, so that health can be asked
            settings.limits,
            max_connections=min(settings.limits.max_connections, max(1, most * 3 // 4)),
        )
        self._log = _open_log(settings.log, limits)
        self.registry = StreamRegistry(engine, limits=limits, observer=self.metrics, log=self._log)
        self.gateway = Gateway(self.registry, settings.auth)
        self.metrics.watch(engine, self.gateway)
        # With a token, a page that reached the server under a false name still has none.
        is_open = settings.is_loopback and not settings.auth.required
        names = {*LOOPBACK_NAMES, settings.host.strip("[]"), *settings.allowed_hosts}
        hosts = names if is_open else None
        app = create_app(
            self.gateway,
            metrics=self.metrics,
            ui=settings.ui,
            hosts=hosts,
            open_metrics=settings.open_metrics,
            stuck_s=settings.timeouts.stuck_s,
            access_log=settings.access_log,
        )
        self._sockets = Sockets(
            most=most, most_idle=min(limits.max_idle_connections, max(1, most // 2))
        )
        config = uvicorn_config(
            app, settings.timeouts, self._sockets, max_message_bytes=limits.max_message_bytes
        )
        self._uvicorn = UvicornServer(config, self._sockets)
        self._port = settings.port
        self._tasks: list[asyncio.Task[None]] = []
        self._mqtt = self._open_mqtt(settings.mqtt)

    @property
    def port(self) -> int:
        """The port that it listens on, once it was entered."""
        return self._port

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host = self.settings.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def num_connections(self) -> int:
        """Open connections of all kinds, those included that have not sent a request yet."""
        return len(self._sockets)

    async def __aenter__(self) -> Self:
        """Listen. Safe to cancel.

        Raises:
            AddressUnavailable: the address is in use, or is not this machine's.
            LogUnavailable: the log cannot be reached or used.
        """
        if self._log is not None:
            await self._log.__aenter__()
        try:
            listener = listen(self.settings.host, self.settings.port)
        except BaseException:
            await self._close_log()
            raise
        self._port = listener.getsockname()[1]
        self._tasks.append(asyncio.create_task(self._serve(listener), name="d2f-http-server"))
        if isinstance(self.registry.engine, MendableEngine):
            mending = self._mend(self.registry.engine)
            self._tasks.append(asyncio.create_task(mending, name="d2f-engine-watch"))
        if self._mqtt is not None:
            self._tasks.append(asyncio.create_task(self._mqtt.run(), name="d2f-mqtt-gateway"))
        try:
            await self._uvicorn.ready.wait()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End what `shut_down` has left: streams, connections and the tasks behind them."""
        self.metrics.unwatch()
        self.gateway.announce_closing(0.0)
        await self.registry.shut_down(0.0, grace_s=HURRY_S)
        self._uvicorn.ask_exit()
        self._uvicorn.abort_connections()
        for task in self._tasks[1:]:  # uvicorn's ends by itself, once its connections have
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._close_log()

    async def wait_failed(self) -> None:
        """Wait until it stops serving by itself, which it should not. Safe to cancel."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def shut_down(self, deadline_s: float) -> None:
        """End in order: take nothing on, let the streams end, send what is ready, close.

        Safe to cancel; leaving the context ends the rest.

        Args:
            deadline_s: after it, streams are cancelled, seconds.
        """
        self.gateway.announce_closing(deadline_s)
        endings = [self.registry.shut_down(deadline_s)]
        if self._mqtt is not None:
            endings.append(self._mqtt.close(deadline_s))
        await asyncio.gather(*endings)
        with contextlib.suppress(TimeoutError):  # of readers that take nothing
            async with asyncio.timeout(self.settings.timeouts.close_s):
                await self.gateway.close()
        await self._uvicorn.finish_responses(self.settings.timeouts.close_s)

    async def _mend(self, engine: MendableEngine) -> None:
        """Load the model once more when it fails.

        Raises:
            EngineFailed: it failed again, or is not to be loaded again.
            D2FError: it cannot be loaded again.
        """
        await engine.wait_failed()
        if self.settings.on_engine_failure == "reload":
            logger.error("the engine failed; its model is loaded anew, once")
            self.registry.pause()
            try:
                await engine.reload()
            finally:
                self.registry.go_on()
            await engine.wait_failed()
        raise EngineFailed("the engine failed; the log has more. Start the server again")

    async def _close_log(self) -> None:
        if self._log is not None:
            await self._log.__aexit__()

    def _open_mqtt(self, url: str | None) -> "MqttGateway | None":
        if url is None:
            return None
        from d2f_stream.server.mqtt.gateway import MqttGateway

        group = self.settings.mqtt_group
        return MqttGateway(self.registry, url, hello=self.gateway.hello, group=group)

    async def _serve(self, listener: socket.socket) -> None:
        try:
            await self._uvicorn.serve(sockets=[listener])
        finally:
            self._uvicorn.ready.set()


def _open_log(url: str | None, limits: ServeLimits) -> "ValkeyLog | None":
    """Return the log of a URL, to be entered; None where none is named.

    Raises:
        InvalidRequest: the URL cannot be used.
        MissingExtra: its library is not installed.
    """
    if url is None:
        return None
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    return ValkeyLog(url, limits)
