"""Replicas of this process, called without Ray, that can be killed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream.cluster.calls import ReplicaLost
from d2f_stream.cluster.replica_worker import ReplicaWorker, SharedLog
from fakes import params


class Replicas:
    """`Calls` over workers in turn; those that are killed are not asked again."""

    def __init__(self, workers: Sequence[ReplicaWorker]) -> None:
        self._living = list(workers)
        self._calls: dict[asyncio.Future[object], ReplicaWorker] = {}
        self.frozen: list[ReplicaWorker] = []  # take calls and never answer
        self.methods: list[str] = []
        self.conversations: list[str] = []  # of answers, one for each call

    async def call(self, method: str, data: bytes) -> bytes:
        worker = self._next(method)
        return (
            worker.facts() if method == "facts" else await self._bound(worker, worker.encode(data))
        )

    async def work(self, data: bytes, *, conversation: str = "", doubts: bool = False) -> bytes:
        worker = self._next("work", conversation)
        while doubts and worker in self.frozen:
            worker = self._next("work", conversation)
        if worker in self.frozen:
            await asyncio.Event().wait()
        return await self._bound(worker, worker.work(data))

    async def stream(
        self, method: str, data: bytes, *, conversation: str = ""
    ) -> AsyncIterator[bytes]:
        worker = self._next(method, conversation)
        answers = worker.answer(data)
        try:
            while True:
                try:
                    yield await self._bound(worker, anext(answers))
                except StopAsyncIteration:
                    return
        finally:
            await answers.aclose()  # type: ignore[attr-defined]  # it is a generator

    async def close(self) -> None:
        assert not self._calls

    def kill(self, worker: ReplicaWorker) -> None:
        """Let all its calls break off, and its work end amid whatever it does."""
        self._living.remove(worker)
        for call in [call for call, callee in self._calls.items() if callee is worker]:
            call.cancel()
        for work in worker._works:  # as a process's threads end: with no last words
            work.cancel()

    def _next(self, method: str, conversation: str = "") -> ReplicaWorker:
        self.methods.append(method)
        if method in ("answer", "work"):
            self.conversations.append(conversation)
        self._living.append(worker := self._living.pop(0))
        return worker

    async def _bound(self, worker: ReplicaWorker, work: object) -> bytes:
        call = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._calls[call] = worker
        try:
            answer: bytes = await call
        except asyncio.CancelledError:
            if worker in self._living:
                raise
            raise ReplicaLost("killed") from None
        finally:
            del self._calls[call]
        return answer


@asynccontextmanager
async def replicas_over(
    *backends: ScriptedBackend, logs: Sequence[SharedLog | None] = ()
) -> AsyncIterator[tuple[Replicas, list[ReplicaWorker]]]:
    """A worker for each backend, and calls to them."""
    async with AsyncExitStack() as stack:
        workers = []
        for number, backend in enumerate(backends):
            engine = LocalEngine.over(backend, ByteCodec(), defaults=params())
            worker = ReplicaWorker(engine, logs[number] if logs else None)
            workers.append(await stack.enter_async_context(worker))
        try:
            yield Replicas(workers), workers
        finally:
            for backend in backends:
                if backend.gate is not None:
                    backend.gate.open()
