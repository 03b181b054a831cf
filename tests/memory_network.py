"""A server and a network to it inside one process: connections are cut where a test says."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_runtime.engine.local import Limits
from d2f_stream.channels import Channel
from d2f_stream.channels.memory import MemoryChannel
from d2f_stream.client.backoff import Backoff
from d2f_stream.client.remote_engine import RemoteEngine
from d2f_stream.client.websocket_line import connect_websocket
from d2f_stream.core.errors import ConnectionLost, D2FError
from d2f_stream.core.events import Event
from d2f_stream.core.session import Engine
from d2f_stream.server.auth import LOCAL, Auth
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.codec import JSON, Codec
from fakes import engine_over


class Notes:
    """An observer that counts."""

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()  # by request id
        self.ended: list[ServedStream] = []
        self.refused: list[D2FError] = []
        self.num_resumes = 0

    def on_start(self, stream: ServedStream) -> None:
        self.started[stream.request_id] += 1

    def on_event(self, stream: ServedStream, event: Event) -> None:
        pass

    def on_end(self, stream: ServedStream) -> None:
        self.ended.append(stream)

    def on_resume(self, stream: ServedStream) -> None:
        self.num_resumes += 1

    def on_refused(self, error: D2FError) -> None:
        self.refused.append(error)


class CutChannel(MemoryChannel):
    """A channel that breaks after so many messages, sent or received by either end."""

    def __init__(self, codec: Codec, capacity: int) -> None:
        super().__init__(codec, capacity)
        self.left = [-1]  # shared by both ends; -1 never breaks
        self.flow = asyncio.Event()  # cleared, nothing is received
        self.flow.set()

    def break_after(self, num_messages: int) -> None:
        peer = self._peer
        assert isinstance(peer, CutChannel)
        self.left = peer.left = [num_messages]

    def _count(self) -> None:
        self.left[0] -= 1
        if self.left[0] == 0:
            self.sever()

    async def receive(self) -> bytes:
        await self.flow.wait()
        message = await super().receive()
        self._count()  # this one still arrived; what is behind it is lost
        return message

    async def send(self, data: bytes) -> None:
        await super().send(data)
        self._count()  # sent, and lost with all that was not received


class Network:
    """One server in this process, and the way to it.

    Attributes:
        cuts: how many messages each new connection lives; once it is empty they stay whole.
        is_up: whether the server can be reached.
        dialled: the client's end of every connection so far.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: ServeLimits | None = None,
        auth: Auth | None = None,
        client: str | None = LOCAL,
        codec: Codec = JSON,
        capacity: int = 16,
        cuts: Iterator[int] | None = None,
    ) -> None:
        self.notes = Notes()
        self.engine = engine
        self.limits = limits
        self.is_up = True
        self.cuts = cuts or iter(())
        self.dialled: list[CutChannel] = []
        self._auth, self._client, self._codec, self._capacity = auth, client, codec, capacity
        self._tasks: set[asyncio.Task[None]] = set()
        self.start()

    def start(self) -> None:
        """Begin with an empty registry, as a restarted server does."""
        self.registry = StreamRegistry(self.engine, limits=self.limits, observer=self.notes)
        self.gateway = Gateway(self.registry, self._auth)

    @property
    def num_cut(self) -> int:
        """Connections that broke after their number of messages."""
        return sum(channel.left[0] == 0 for channel in self.dialled)

    async def dial(self) -> Channel:
        if not self.is_up:
            raise ConnectionLost("nobody answers")
        near, far = CutChannel.pair(codec=self._codec, capacity=self._capacity)
        if (num_messages := next(self.cuts, None)) is not None:
            near.break_after(num_messages)
        self.dialled.append(near)
        task = asyncio.create_task(self.gateway.serve(far, client=self._client))
        self._tasks.add(task)
        return near

    def cut(self) -> None:
        """Break every connection; what is under way is lost."""
        for channel in self.dialled:
            channel.sever()

    async def close(self) -> None:
        await self.registry.shut_down(0)
        for channel in self.dialled:
            await channel.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for task in self._tasks:
            task.result()


async def until(happened: Callable[[], object]) -> None:
    """Let the event loop turn until something is so; pytest's timeout ends it if it never is."""
    while not happened():  # noqa: ASYNC110 - what is awaited has no event of its own
        await asyncio.sleep(0)


def instantly(timeout_s: float = 30.0, *, chance: float = 1.0) -> Backoff:
    """A backoff whose clock is moved by its own waits only."""
    now_s = 0.0

    async def sleep(delay_s: float) -> None:
        nonlocal now_s
        now_s += delay_s
        await asyncio.sleep(0)

    return Backoff(timeout_s=timeout_s, sleep=sleep, chance=lambda: chance, clock=lambda: now_s)


@asynccontextmanager
async def network(
    backend: ScriptedBackend,
    *,
    engine_limits: Limits | None = None,
    check: Callable[[Network], None] | None = None,
    **options: Any,
) -> AsyncIterator[Network]:
    """A network to a server over the backend; at the end nothing may be left of it."""
    before = asyncio.all_tasks()
    async with engine_over(backend, limits=engine_limits) as engine:
        net = Network(engine, **options)
        try:
            yield net
        finally:
            if backend.gate is not None:
                backend.gate.open()
            await net.close()
        assert net.gateway.num_connections == 0
        assert net.registry.num_active == 0
    assert asyncio.all_tasks() <= before


def client_of(net: Network, **options: Any) -> RemoteEngine:
    return connect_websocket(net.dial, **{"backoff": instantly(), "linger_s": 0.0, **options})


@asynccontextmanager
async def connected(backend: ScriptedBackend, **options: Any) -> AsyncIterator[RemoteEngine]:
    """An entered remote engine over a network of its own."""
    async with network(backend, **options) as net, client_of(net) as engine:
        try:
            yield engine
        finally:
            if backend.gate is not None:
                backend.gate.open()
