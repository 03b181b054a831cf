"""Servers that are killed: their answers go on at others, and nobody misses or repeats a block."""

import asyncio
import contextlib
import itertools
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from brokers import Proxy
from d2f_stream.core.events import Block, StreamFinished
from outliving import ANSWER, NUM_TOKENS, answering
from serving import Address, Peer, request
from stores import ValkeyServer

SCRIPT = Path(__file__).parent / "paced_server.py"
_databases = itertools.cycle(range(16))


class Servers:
    """Processes that serve over one log, and a port that leads to one of them."""

    def __init__(self, log: str, proxy: Proxy) -> None:
        self._log = log
        self._processes: list[Process] = []
        self.proxy = proxy
        self.url = f"ws://127.0.0.1:{proxy.port}"

    async def start(self, *, number: int = 1) -> "list[Server]":
        """Start more of them, and lead the port to the first."""
        started = await asyncio.gather(*(self._start() for _ in range(number)))
        self.lead_to(started[0])
        return started

    def lead_to(self, server: "Server") -> None:
        """Lead the port to a server, and break the connections to others."""
        self.proxy.target = server.port
        self.proxy.cut()

    async def _start(self) -> "Server":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, SCRIPT, "--port", "0", "--log", self._log),
            stdout=PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._processes.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(60.0):
            line = (await process.stdout.readline()).decode()
        return Server(process, int(line.split("127.0.0.1:")[1].split()[0]))

    async def close(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class Server(Address):
    """One of the processes."""

    def __init__(self, process: Process, port: int) -> None:
        super().__init__(port)
        object.__setattr__(self, "process", process)

    process: Process

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@pytest.fixture
async def servers(store: ValkeyServer) -> AsyncIterator[Servers]:
    async with Proxy(0) as proxy:
        chosen = Servers(f"{store.url}/{next(_databases)}", proxy)
        try:
            yield chosen
        finally:
            await chosen.close()


async def test_answers_outlive_every_server_that_worked_for_them(servers: Servers) -> None:
    one, two, three = await servers.start(number=3)
    async with answering(servers.url) as answers:
        await answers.wait_blocks(3)
        servers.lead_to(two)  # the readers go to another server, the first works on
        await answers.wait_blocks(3)
        assert answers.num_running == 8
        await one.kill()  # the readers' server takes over
        await answers.wait_blocks(3)
        assert answers.num_running == 8
        await two.kill()  # readers and work are lost at once
        servers.lead_to(three)
        await answers.wait_blocks(3)
        assert answers.num_running == 8
    assert answers.longest_pause_s < 10.0


async def test_server_that_freezes_is_replaced_and_changes_nothing_when_it_wakes(
    servers: Servers,
) -> None:
    one, two = await servers.start(number=2)
    async with answering(servers.url) as answers:
        await answers.wait_blocks(3)
        servers.lead_to(two)
        await answers.wait_blocks(3)
        assert answers.num_running == 8
        one.process.send_signal(signal.SIGSTOP)  # its sockets stay open, as a lost machine's do
        began_s = asyncio.get_running_loop().time()
        await answers.wait_blocks(3)
        assert asyncio.get_running_loop().time() - began_s < 10.0
        assert answers.num_running == 8
        one.process.send_signal(signal.SIGCONT)


async def test_server_that_is_told_to_end_leaves_its_answers_to_others(servers: Servers) -> None:
    one, two = await servers.start(number=2)
    async with answering(servers.url) as answers:
        await answers.wait_blocks(3)
        servers.proxy.target = two.port
        assert answers.num_running == 8
        for _ in range(2):  # the second ends at once what the first lets end
            one.process.send_signal(signal.SIGTERM)
        await one.process.wait()


async def test_request_sent_again_elsewhere_goes_on_where_it_was(servers: Servers) -> None:
    asked = request(params={"max_new_tokens": NUM_TOKENS})
    (one,) = await servers.start()
    async with Peer.to(one) as peer:
        await peer.hello()
        await peer.send(asked)
        first = await peer.started()
        for _ in range(3):
            assert isinstance(await peer.receive(), Block)
        await one.kill()
    (two,) = await servers.start()
    async with Peer.to(two) as peer, asyncio.timeout(20.0):
        await peer.hello()
        await peer.send(asked)
        events = await peer.answer()
        assert events[0] == first
        assert "".join(e.text for e in events if isinstance(e, Block)) == ANSWER


async def test_cancelled_stream_whose_worker_is_gone_ends_as_cancelled(servers: Servers) -> None:
    (one,) = await servers.start()
    async with Peer.to(one) as peer:
        await peer.hello()
        stream = (await peer.generate(params={"max_new_tokens": 100_000})).stream
        assert isinstance(await peer.receive(), Block)
        await one.kill()
    (two,) = await servers.start()
    async with Peer.to(two) as peer, asyncio.timeout(20.0):
        await peer.hello()
        await peer.cancel(stream)
        await peer.resume(stream)
        *_, last = await peer.answer()
        assert isinstance(last, StreamFinished)
        assert last.reason == "cancelled"
