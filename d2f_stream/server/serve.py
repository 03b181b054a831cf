"""Server: one engine on one port, from listening to the last closed connection.

Owns the socket, uvicorn, and the order of an orderly end. Signals, the ready line and logging
belong to `serve`, which a command line calls; `Server` itself can run inside any event loop.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, Self, runtime_checkable

import uvicorn

from d2f_stream.core.errors import D2FError, EngineFailed
from d2f_stream.core.session import Engine
from d2f_stream.server.app import create_app
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.peer_log import OneLine
from d2f_stream.server.settings import ServeSettings
from d2f_stream.server.sockets import Sockets, accept_forever, max_sockets, raise_file_limit
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.server.uvicorn_guard import uvicorn_config

if TYPE_CHECKING:
    from d2f_stream.server.mqtt.gateway import MqttGateway

__all__ = [
    "AddressUnavailable",
    "ServeSettings",
    "Server",
    "check_address",
    "configure_logging",
    "serve",
]

logger = logging.getLogger("d2f_stream.server")

SEND_BUFFER_BYTES: Final = 128 * 1024
"""Of each connection, in the kernel, which would else hold megabytes for a peer that reads none."""

HURRY_S: Final = 1.0
"""For the engine to end streams that are not to end in order."""

RECEIVE_BUFFER_BYTES: Final = 32 * 1024
"""Of each connection, so that what many send at once is read in many turns of the event loop."""

BACKLOG: Final = 1024
"""Connections that the kernel holds until they are taken."""

LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")


class AddressUnavailable(D2FError):
    """The server cannot listen where it was told to; the sentence says why and what to do."""

    code = "address_unavailable"


class Server:
    """Serves an open engine; an async context manager that listens from entering to leaving.

    Leaving it without `shut_down` ends all streams and connections at once.

    Args:
        engine: stays open, and is its owner's.
        settings: where and how to listen.
        metrics: observes the server; None makes them.

    Raises:
        InvalidRequest: the broker's URL cannot be used.
        MissingExtra: a broker is named, and aiomqtt is not installed.

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
        self.registry = StreamRegistry(engine, limits=limits, observer=self.metrics)
        self.gateway = Gateway(self.registry, settings.auth)
        self.metrics.watch(engine, self.gateway)
        # With a token, a page that reached the server under a false name still has none.
        is_open = settings.is_loopback and not settings.auth.required
        hosts = {*LOOPBACK_NAMES, settings.host.strip("[]")} if is_open else None
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
        self._uvicorn = _Uvicorn(config, self._sockets)
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
        """
        listener = _listen(self.settings.host, self.settings.port)
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
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End what `shut_down` has left: streams, connections and the tasks behind them."""
        self.metrics.unwatch()
        self.gateway.announce_closing(0.0)
        await self.registry.shut_down(0.0, grace_s=HURRY_S)
        self._uvicorn.ask_exit()
        self._uvicorn.abort_connections()
        for task in self._tasks[1:]:  # uvicorn's ends by itself, once its connections have
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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

    async def _mend(self, engine: "MendableEngine") -> None:
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


@runtime_checkable
class MendableEngine(Protocol):
    """An engine whose backend can fail, and be loaded anew."""

    async def wait_failed(self) -> None:
        """Wait until the backend has failed. Safe to cancel."""
        ...

    async def reload(self) -> None:
        """Load the model anew, and accept requests again."""
        ...


class _Uvicorn(uvicorn.Server):
    """uvicorn's server without its signal handlers and listener, which tells when it listens."""

    def __init__(self, config: uvicorn.Config, sockets: Sockets) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self._asked = asyncio.Event()
        self._sockets = sockets
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        # uvicorn's own looks ten times a second whether it should end. It needs only the clock of
        # the Date header, every second.
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
        assert sockets is not None
        await self.lifespan.startup()
        self.servers = []
        (self._listener,) = sockets
        accepting = accept_forever(self._listener, self._sockets, self._new_protocol)
        self._accepting = asyncio.create_task(accepting, name="d2f-accept")
        self.started = True
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
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
        yield

    async def finish_responses(self, timeout_s: float) -> None:
        """Take no connections any more and let HTTP responses end."""
        await self._stop_accepting()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=timeout_s)

    def abort_connections(self) -> None:
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


async def serve(engine: Engine, settings: ServeSettings) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code: 0 after an orderly end.

    A second signal ends at once what the first has left running; the code then names that signal,
    as shells do it: 128 and its number. Where a step hangs, so that the engine could not be closed,
    this does not return: the process ends, with that code, or with 1.

    Raises:
        EngineFailed: the engine failed, and is not loaded again.
        AddressUnavailable: the address is in use, or is not this machine's.
    """
    raise_file_limit()
    with _signals() as signals:
        async with Server(engine, settings) as server:
            _say_ready(engine, server)
            try:
                if await _first(signals.get(), server.wait_failed()) is None:
                    raise RuntimeError("the server stopped by itself")
            except D2FError:
                await server.shut_down(0.0)  # whoever failed with the engine still hears of it
                raise
            deadline_s = settings.shutdown_deadline_s
            logger.info(
                "shutting down: %d streams have %g s to end; a second signal ends them now",
                server.registry.num_active,
                deadline_s,
            )
            hurried = await _first(signals.get(), server.shut_down(deadline_s))
    code = 0 if hurried is None else 128 + hurried
    if server.registry.num_abandoned:
        logger.error("a step of the model hangs; the process ends without it")
        _end_process(code or 1)
    return code


def _end_process(code: int) -> NoReturn:
    """End the process now, whatever its threads do."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


async def _first(signalled: Awaitable[int], work: Awaitable[None]) -> int | None:
    """Wait for either and cancel the other; return the signal that came, None where none did."""
    tasks = asyncio.ensure_future(signalled), asyncio.ensure_future(work)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        came, done = tasks
        if done.done():
            done.result()
        return came.result() if came.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def check_address(settings: ServeSettings) -> None:
    """Try to listen, so that an address in use is told before a model is loaded for minutes.

    Raises:
        AddressUnavailable: it cannot be listened on.
    """
    _listen(settings.host, settings.port).close()


@contextlib.contextmanager
def _signals() -> Iterator["asyncio.Queue[int]"]:
    loop = asyncio.get_running_loop()
    came: asyncio.Queue[int] = asyncio.Queue()  # bounded by the patience of a person

    def note(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(came.put_nowait, number)

    # Not loop.add_signal_handler, which Windows lacks.
    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    listener: socket.socket | None = None
    try:
        found = socket.getaddrinfo(
            host.strip("[]") or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise AddressUnavailable(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another with --port, or 0 for a free one"
        ) from error
    return listener


def configure_logging(level: str = "info") -> None:
    """Write what the SDK and uvicorn log to standard error; for command lines. Idempotent.

    Args:
        level: debug, info, warning or error.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("d2f_stream", "uvicorn"):
        ours = logging.getLogger(name)
        if not any(isinstance(old, logging.StreamHandler) for old in ours.handlers):
            ours.addHandler(handler)
    logging.getLogger("d2f_stream").setLevel(level.upper())


def _say_ready(engine: Engine, server: Server) -> None:
    device = getattr(engine.info, "device", "")
    where = f" on {device}" if device else ""
    sys.stdout.write(
        f"d2f-stream serves {engine.info.name}{where} at {server.url} (stop with Ctrl-C)\n"
    )
    sys.stdout.flush()
