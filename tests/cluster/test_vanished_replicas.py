"""Replicas that are gone without a word: calls to them never end, and only the log tells."""

import asyncio
import itertools

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.cluster.logging_handle_engine import LoggingHandleEngine
from d2f_stream.cluster.replica_worker import ReplicaWorker
from d2f_stream.core.events import Block, StreamNames
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.admission import measured
from d2f_stream.server.streams.served_stream import ServedStream
from d2f_stream.wire.protocol import Generate
from fakes import ANSWER
from memory_network import until
from replicas import Replicas, replicas_over
from stores import ValkeyServer

LEASE_S = 0.2
_databases = itertools.cycle(range(16))


@pytest.mark.parametrize("has_begun", [True, False])
async def test_stream_of_a_replica_that_vanishes_goes_on_at_another_one(
    store: ValkeyServer, has_begun: bool
) -> None:
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    url, limits = f"{store.url}/{next(_databases)}", ServeLimits()
    gate = StepGate()
    gate.let_through(9)
    first, second = ScriptedBackend(ANSWER, gate=gate, tokens_per_step=2), ScriptedBackend(ANSWER)
    logs = [ValkeyLog(url, limits, lease_s=LEASE_S) for _ in range(2)]
    async with (
        replicas_over(first, second, logs=logs) as (calls, workers),
        LoggingHandleEngine(calls) as engine,
        ValkeyLog(url, limits, lease_s=LEASE_S) as log,
    ):
        while calls._living[0] is not workers[0]:
            calls._next("")
        if not has_begun:
            calls.frozen.append(workers[0])
        request = Generate(request_id="vanishing", prompt="hi")
        stream, _ = await log.create(request, client="ann", asker="ann", clamp=False)
        await log.follow(stream)

        async def is_deserted() -> bool:
            await log.wait_free(stream, is_given=True)
            return not stream.has_terminal

        async def bring_to_its_end() -> None:
            while not stream.has_terminal:  # else another worker has it, who may be the frozen one
                await engine.work(
                    StreamNames(stream.id, stream.request_id, stream.client),
                    measured(request, engine, limits, clamp=False),
                    max_prompt_tokens=None,
                    is_deserted=is_deserted,
                )

        work = asyncio.create_task(bring_to_its_end())
        if has_begun:
            await until(lambda: num_blocks(stream) >= 2)
            freeze(logs[0], workers[0], calls)
        await work
        assert "".join(event.text for event in stream.log if isinstance(event, Block)) == ANSWER
        assert second.num_opened == 1
        gate.open()


def num_blocks(stream: ServedStream) -> int:
    return sum(isinstance(event, Block) for event in stream.log)


def freeze(log: object, worker: ReplicaWorker, calls: Replicas) -> None:
    """Let a replica say nothing any more, as one whose machine is gone: its steps hang already."""
    calls.frozen.append(worker)
    log._loops[1].cancel()  # type: ignore[attr-defined]  # its beats


async def test_call_that_waits_for_room_is_given_up_less_and_less_often(
    store: ValkeyServer,
) -> None:
    from d2f_stream.server.streams.valkey.copies import CLAIM_LOOKS
    from d2f_stream.server.streams.valkey.log import ValkeyLog

    url = f"{store.url}/{next(_databases)}"
    async with ValkeyLog(url, ServeLimits(), lease_s=600) as log:  # it looks by itself too late
        request = Generate(request_id="waiting", prompt="hi")
        stream, _ = await log.create(request, client="ann", asker="ann", clamp=False)
        await log.follow(stream)
        for patience in (CLAIM_LOOKS, 2 * CLAIM_LOOKS, 4 * CLAIM_LOOKS):
            waiting = asyncio.create_task(log.wait_free(stream, is_given=True))
            await asyncio.sleep(0)
            for look in range(patience):
                assert not waiting.done(), look
                log.copies.note_kept(stream.id, has_worker=False, is_settled=True)
                await asyncio.sleep(0)
            await waiting
