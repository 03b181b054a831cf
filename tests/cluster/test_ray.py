"""A real Ray cluster with two engines, servers over one log, and whatever of them is killed."""

import asyncio
import contextlib
import itertools
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from brokers import Proxy
from d2f_stream.core.events import StreamFinished
from lab.cluster.ray_engines import RayEngines, ray_engines, write_paced_model
from outliving import ANSWER, answering
from requirements import optional_module
from serving import Address, Peer
from stores import ValkeyServer

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

CANCEL_S = 1.0  # 0.2 s where the machine is not shared


class Cluster:
    """Engines, servers, and a port that leads to one of the servers."""

    def __init__(self, engines: RayEngines, log: str, proxy: Proxy) -> None:
        self.engines = engines
        self.proxy = proxy
        self.url = f"ws://127.0.0.1:{proxy.port}"
        self._log = log
        self._servers: list[Process] = []

    async def start_server(self) -> tuple[Process, int]:
        """Start one more and lead the port to it; return it and its own port."""
        command = ("-m", "d2f_stream", "serve", "--port", "0", "--engines", self.engines.url)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command, "--log", self._log),
            stdout=PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=self.engines.environment,
        )
        self._servers.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(60.0):
            line = (await process.stdout.readline()).decode()
        self.proxy.target = port = int(line.split("127.0.0.1:")[1].split()[0])
        return process, port

    async def close(self) -> None:
        for process in self._servers:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    store: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    optional_module("ray")
    folder: Path = tmp_path_factory.mktemp("model") / "paced"
    model = write_paced_model(folder, ANSWER, step_ms=10, prompt_attention="causal")
    async with ray_engines(model, store.url) as engines, Proxy(0) as proxy:
        cluster = Cluster(engines, store.url, proxy)
        try:
            yield cluster
        finally:
            await cluster.close()


async def test_answers_outlive_an_engine_a_server_and_both_at_once(cluster: Cluster) -> None:
    one, _ = await cluster.start_server()
    async with answering(cluster.url) as answers:
        await answers.wait_blocks(3)
        cluster.engines.kill_one()
    assert answers.longest_pause_s < 5.0
    two, _ = await cluster.start_server()
    await cluster.engines.wait_alive(2)
    async with answering(cluster.url) as answers:
        await answers.wait_blocks(3)
        three, _ = await cluster.start_server()
        two.kill()
        await answers.wait_blocks(3)
        three.kill()
        cluster.engines.kill_one()
        cluster.proxy.target = (await cluster.start_server())[1]
    assert answers.longest_pause_s < 20.0
    assert one.returncode is None


async def test_cancel_frees_the_slot_wherever_it_is_said(cluster: Cluster) -> None:
    _, port = await cluster.start_server()
    _, elsewhere = await cluster.start_server()
    async with Peer.to(Address(port)) as peer, Peer.to(Address(elsewhere)) as other:
        await peer.hello()
        await other.hello()
        started = await peer.generate(params={"max_new_tokens": 300})
        await peer.receive()
        began_s = time.monotonic()
        await other.cancel(started.stream)
        *_, last = await peer.answer()
        assert isinstance(last, StreamFinished)
        assert last.reason == "cancelled"
        assert time.monotonic() - began_s < CANCEL_S


async def test_conversation_stays_where_its_turns_are_whichever_server_is_asked(
    cluster: Cluster, store: ValkeyServer
) -> None:
    import valkey.asyncio as valkey  # not at the top: this is skipped where it lacks

    await cluster.engines.wait_alive(2)
    _, port = await cluster.start_server()
    _, elsewhere = await cluster.start_server()
    async with (
        Peer.to(Address(port)) as peer,
        Peer.to(Address(elsewhere)) as other,
        valkey.Valkey.from_url(store.url) as leases,
    ):
        await peer.hello()
        await other.hello()

        async def holder(peer: Peer, number: int, *turns: str) -> bytes:
            """Ask, and see who answers."""
            said = [{"role": "user", "content": text} for text in (f"question {number}", *turns)]
            started = await peer.generate(prompt=said, params={"max_new_tokens": 40})
            held: bytes = await leases.get(f"d2f:0:l:{started.stream}")
            await peer.answer()
            assert held, "nobody has the lease of an answer that has just begun"
            return held

        numbers = itertools.count(100)
        for asked in (peer, other):
            seen: set[bytes] = set()
            async with asyncio.timeout(60.0):
                while len(seen) < 2:  # until each server knows of both engines
                    seen.add(await holder(asked, next(numbers)))
        homes = {await holder(peer, number): number for number in range(16)}
        assert len(homes) == 2
        for turns in (("one",), ("one", "two"), ("one", "two", "three")):
            for home, number in homes.items():
                for asked in (peer, other):
                    assert await holder(asked, number, *turns) == home


async def test_answers_and_requests_outlive_ray_s_head_for_a_while(cluster: Cluster) -> None:
    """The last test: Ray ends all its processes a minute later."""
    await cluster.engines.wait_alive(2)
    _, port = await cluster.start_server()
    async with answering(cluster.url) as answers, Peer.to(Address(port)) as peer:
        await peer.hello()
        await answers.wait_blocks(3)
        cluster.engines.kill_head()
        await answers.wait_blocks(3)
        assert answers.num_running == 8
        started = await peer.generate(params={"max_new_tokens": 40})
        *_, last = await peer.answer()
        assert isinstance(last, StreamFinished)
        assert last.stream == started.stream
    assert answers.longest_pause_s < 5.0
