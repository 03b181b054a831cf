"""A store that fails at any moment, in any way: every call ends, and so does closing."""

import asyncio
import contextlib
import re
from typing import Any, Literal

import pytest

from d2f_stream.core.errors import D2FError
from d2f_stream.core.events import Draft
from d2f_stream.server.limits import ServeLimits
from stores import ValkeyServer, events_of, request

pytest.importorskip("valkey", reason="valkey is not installed")

Failure = Literal["cut", "silent", "refusing", "talking nonsense"]
FAILURES: tuple[Failure, ...] = ("cut", "silent", "refusing", "talking nonsense")
COMMAND = re.compile(rb"\*\d+\r\n\$")
NUM_CALLS = 24
HANGS_S = 30.0
"""Every wait is far shorter, on any machine."""


class FailingStore:
    """A port that leads to a store, until so many messages of clients have passed."""

    def __init__(self, store: ValkeyServer, failure: Failure, after: int) -> None:
        self._port = store.port
        self._failure = failure
        self._left = after
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> Any:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        sides = [writer]
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            sides.append(back)
            async with asyncio.TaskGroup() as group:
                answers = group.create_task(self._answer(there, writer))
                await self._pass(reader, writer, back)
                answers.cancel()
        except asyncio.CancelledError:
            pass  # the server's own task: nobody waits for it
        finally:
            for side in sides:
                side.transport.abort()
            self._tasks.discard(task)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self._left -= 1
                if self._left >= 0:
                    back.write(data)
                elif self._failure == "cut":
                    break
                elif self._failure == "refusing":
                    refusal = b"-NOPERM this user may do nothing\r\n"
                    writer.write(refusal * len(COMMAND.findall(data)))
                elif self._failure == "talking nonsense":
                    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._left >= 0 or self._failure != "silent":
                    writer.write(data)


async def use(url: str, number: int) -> None:
    """Do all that a server does with a log; what it is refused is one of our errors."""
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    with contextlib.suppress(D2FError):
        async with ValkeyLog(url, ServeLimits(), lease_s=0.2) as log:
            asked = request(f"failing-{number}")
            stream, _ = await log.create(asked, client="a", asker="a", clamp=False)
            await log.of_request(asked.request_id, client="a")
            async with ValkeyLog(url, ServeLimits(), lease_s=0.2) as other:
                copy = await other.find(stream.id, client="a")
                work = await log.work(stream.id)
                assert work is not None
                async with work:
                    for event in events_of(stream.id):
                        await work.append(event)
                        await work.append(Draft(stream=stream.id, index=9, text="?"))
                await asyncio.gather(log.find(stream.id, client="a"), other.wait_free(copy))


@pytest.mark.parametrize("failure", FAILURES)
async def test_everything_ends_whenever_the_store_fails(
    store: ValkeyServer, monkeypatch: pytest.MonkeyPatch, failure: Failure
) -> None:
    from d2f_stream.server.streams.valkey import connecting, copies, log, news, work
    from d2f_stream.server.streams.valkey import store as commands

    for module in (copies, log, news, work):
        monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    for module in (connecting, commands):
        monkeypatch.setattr(module, "ANSWER_S", 0.2)
    monkeypatch.setattr(commands, "CLOSE_S", 0.1)
    before = asyncio.all_tasks()

    async def fail(after: int) -> None:
        failing = FailingStore(store, failure, after)
        async with failing.listening() as port:
            await use(f"valkey://127.0.0.1:{port}/7", after)

    async with asyncio.timeout(HANGS_S):
        await asyncio.gather(*map(fail, range(NUM_CALLS)))
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if left:  # ends of connections that nobody has any more
            await asyncio.wait(left)
