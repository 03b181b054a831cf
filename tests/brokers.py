"""A real mosquitto for tests, a proxy that breaks its connections, and workers behind it."""

import asyncio
import contextlib
import os
import pwd
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import Block, Draft, Event, StreamFailed, StreamFinished, StreamStarted
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.mqtt.gateway import MqttGateway
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.log import StreamLog
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.codec import JSON, Codec
from d2f_stream.wire.protocol import Cancel, Operation, RequestRejected, Resume, ServerMessage
from d2f_stream.wire.topics import GROUP, OperationTopic
from fakes import engine_over
from requirements import require_program


async def brief(delay_s: float) -> None:
    """Wait between attempts to connect, but not as long as in earnest."""
    await asyncio.sleep(min(delay_s, 0.02))


class Mosquitto:
    """A broker on a free port of the loopback; keeps port and folder over restarts."""

    def __init__(self, folder: Path, *, lines: Sequence[str] = ("allow_anonymous true",)) -> None:
        self._program = require_program("mosquitto")
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        settings = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_interval 0",  # saves when it is stopped, and not when it is killed
            "set_tcp_nodelay true",
            "log_type all",
            f"user {pwd.getpwuid(os.getuid()).pw_name}",  # or it gives root's rights up
            *lines,
        ]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join(settings) + "\n")
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it listens."""
        log = (self._folder / "log").open("w")
        with log:
            self._process = subprocess.Popen(
                [self._program, "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, (self._folder / "log").read_text()

    def kill(self) -> None:
        """End it at once; what it had not saved is lost."""
        self._end(forcibly=True)

    def stop(self) -> None:
        """End it in order; it saves its state."""
        self._end(forcibly=False)

    def _end(self, *, forcibly: bool) -> None:
        if self._process is not None:
            (self._process.kill if forcibly else self._process.terminate)()
            self._process.wait()
            self._process = None


class Proxy:
    """A port that leads to another one, the target, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.blocked = False

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self.cut(block=True)
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self, *, block: bool = False) -> None:
        """Break every connection; with `block`, take no new ones."""
        self.blocked = block
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self.blocked:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
                self._writers |= {writer, far_writer}
                pumps = [
                    asyncio.create_task(self._pump(reader, far_writer)),
                    asyncio.create_task(self._pump(far_reader, writer)),
                ]
                try:
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in pumps:
                        pump.cancel()
                    await asyncio.wait(pumps)
                    far_writer.transport.abort()
                    self._writers -= {writer, far_writer}
        except (OSError, asyncio.CancelledError):
            pass  # the server's own task: nobody waits for it
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()


class Turnstile:
    """Observes a registry, and wakes whoever waits for streams to come or go."""

    def __init__(self) -> None:
        self.turned = asyncio.Event()

    def on_start(self, stream: ServedStream) -> None:
        self.turned.set()

    def on_event(self, stream: ServedStream, event: Event) -> None:
        pass

    def on_end(self, stream: ServedStream) -> None:
        self.turned.set()

    def on_resume(self, stream: ServedStream) -> None:
        pass

    def on_refused(self, error: D2FError) -> None:
        pass


class Worker:
    """A gateway that runs, over a scripted engine."""

    def __init__(
        self,
        gateway: MqttGateway,
        registry: StreamRegistry,
        backend: ScriptedBackend,
        turnstile: Turnstile,
    ) -> None:
        self.gateway, self.registry, self.backend = gateway, registry, backend
        self._turnstile = turnstile
        self.running = asyncio.create_task(gateway.run())

    async def wait_active(self, number: int) -> None:
        """Wait until so many streams run or wait here."""
        while self.registry.num_active != number:
            self._turnstile.turned.clear()
            await self._turnstile.turned.wait()

    async def stop(self) -> None:
        """End the gateway as a process does that is told to end."""
        self.running.cancel()
        await asyncio.wait((self.running,))


@asynccontextmanager
async def worker(
    url: str,
    backend: ScriptedBackend,
    *,
    limits: ServeLimits | None = None,
    node: str = "worker",
    group: str = GROUP,
    will_delay_s: int = 0,
    tls: ssl.SSLContext | None = None,
    log: StreamLog | None = None,
) -> AsyncIterator[Worker]:
    async with engine_over(backend) as engine:
        turnstile = Turnstile()
        registry = StreamRegistry(engine, limits=limits, observer=turnstile, log=log)
        gateway = MqttGateway(
            registry,
            url,
            hello=Gateway(registry).hello,
            node=node,
            group=group,
            will_delay_s=will_delay_s,
            tls=tls,
            sleep=brief,
        )
        one = Worker(gateway, registry, backend, turnstile)
        try:
            await gateway.wait_connected()
            yield one
        finally:
            await one.stop()
            if backend.gate is not None:
                backend.gate.open()
            await registry.shut_down(0.0)


class Device:
    """A client of its own make, as somebody would write it for a small device."""

    def __init__(self, broker: Mosquitto, name: str, **options: Any) -> None:
        expiry = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        expiry.SessionExpiryInterval = 600
        self.name = name
        self._client = aiomqtt.Client(
            "127.0.0.1",
            broker.port,
            identifier=f"device-{name}",
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=expiry,
            **options,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, error, trace)
        await asyncio.sleep(0)  # aiomqtt cancels its own task one turn later

    async def subscribe(self, *filters: str) -> None:
        for name in filters:
            await self._client.subscribe(name, qos=1)

    async def publish(self, topic: object, data: bytes, *, codec: Codec | None = None) -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if codec is not None:
            properties.ContentType = codec.content_type
        await self._client.publish(str(topic), data, qos=1, properties=properties)

    async def send(self, topic: object, operation: Operation, *, codec: Codec = JSON) -> None:
        await self.publish(topic, codec.encode(operation), codec=codec)

    async def receive(self) -> aiomqtt.Message:
        return await anext(aiter(self._client.messages))

    async def next_message(self, codec: Codec = JSON) -> ServerMessage | None:
        return codec.decode_message((await self.receive()).payload)

    async def next_rejection(self) -> RequestRejected:
        message = await self.next_message()
        assert isinstance(message, RequestRejected)
        return message

    async def wait_cancelled(self, node: str) -> None:
        """Wait until that worker has done what somebody's cancel told it.

        Both `operations_of` the node and our own events must be subscribed to.
        """
        while True:
            message = await self.receive()
            if f"/{node}/operations/" in message.topic.value:
                assert isinstance(JSON.decode_operation(message.payload), Cancel)
                break
        await self.settle(node)

    async def settle(self, node: str) -> None:
        """Wait until the worker has read all that was sent to it: it answers in turn."""
        name = "settle-0123456789"
        await self.send(OperationTopic(node, self.name, name), Resume(stream="none"))
        while f"/clients/{self.name}/{name}/" not in (await self.receive()).topic.value:
            pass

    async def events(self, codec: Codec = JSON) -> list[Event]:
        """All events up to the terminal one, as they come."""
        events: list[Event] = []
        while True:
            message = await self.next_message(codec)
            assert isinstance(
                message, StreamStarted | Block | Draft | StreamFinished | StreamFailed
            )
            events.append(message)
            if isinstance(message, StreamFinished | StreamFailed):
                return events


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Block))
