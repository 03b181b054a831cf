"""StreamRegistry: how long streams are kept, and how clients share the room for them."""

import asyncio
import gc
import weakref
from typing import Any

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.errors import (
    D2FError,
    PromptTooLong,
    RequestConflict,
    StreamLost,
    TooManyStreams,
)
from d2f_stream.core.events import StreamFinished, StreamStarted
from d2f_stream.server.limits import ServeLimits
from d2f_stream.server.streams.memory_log import MemoryLog
from fakes import ANSWER, held, turn
from memory_network import network, until
from registry_requests import read, request, text_of
from stalls import pass_time, stall

# How long streams are kept.


async def test_stream_can_be_resumed_for_its_time_and_no_longer() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        stream = await net.registry.generate(request(), client="alice")
        await read(stream)
        await pass_time(299)
        assert await net.registry.resume(stream.id, client="alice") is stream
        await pass_time(2)
        with pytest.raises(StreamLost, match="ended more than 300 s ago"):
            await net.registry.resume(stream.id, client="alice")
        assert net.registry.num_retained == 0


async def test_stream_can_be_resumed_after_a_stall_of_the_server() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        stream = await net.registry.generate(request(), client="alice")
        await read(stream)
        stall()
        await turn()
        assert await net.registry.resume(stream.id, client="alice") is stream


async def test_running_stream_is_kept_however_long_it_takes() -> None:
    backend, gate = held()
    async with network(backend) as net:
        stream = await net.registry.generate(request(), client="alice")
        await pass_time(1000)
        assert await net.registry.resume(stream.id, client="alice") is stream
        gate.open()
        assert text_of(await read(stream)) == ANSWER


async def test_name_may_be_used_again_once_its_stream_is_forgotten() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        first = await net.registry.generate(request(), client="alice")
        await read(first)
        await pass_time(301)
        second = await net.registry.generate(request(), client="alice")
        assert second is not first
        await pass_time(301)  # the first one's time is over again; the second one's is not
        assert await net.registry.resume(second.id, client="alice") is second
        await read(second)


async def test_stream_that_made_room_holds_no_memory() -> None:
    limits = ServeLimits(max_retained_bytes=3000)
    async with network(ScriptedBackend("hello"), limits=limits) as net:
        first = await net.registry.generate(request("first"), client="a")
        await read(first)
        await until(lambda: net.registry.num_active == 0)
        net.notes.ended.clear()
        gone = weakref.ref(first)
        del first
        await read(await net.registry.generate(request("second"), client="a"))
        await until(lambda: net.registry.num_active == 0)
        gc.collect()
        assert gone() is None


async def test_running_streams_are_never_forgotten_for_room() -> None:
    backend, gate = held()
    async with network(backend, limits=ServeLimits(max_running_tokens=250)) as net:
        running = [
            await net.registry.generate(request("r", max_new_tokens=100), client=client)
            for client in ("a", "b")
        ]
        with pytest.raises(TooManyStreams, match="250 tokens in all"):
            await net.registry.generate(request("r", max_new_tokens=100), client="c")
        assert net.registry.num_retained == 2
        gate.open()
        for stream in running:
            assert text_of(await read(stream)) == ANSWER


async def test_one_client_leaves_running_tokens_to_others() -> None:
    backend, gate = held()
    async with network(backend, limits=ServeLimits(max_running_tokens=400)) as net:
        mallory = [
            await net.registry.generate(request(f"m{n}", max_new_tokens=100), client="mallory")
            for n in range(3)
        ]
        with pytest.raises(TooManyStreams, match="300 tokens together"):
            await net.registry.generate(request("m3", max_new_tokens=1), client="mallory")
        bobs = await net.registry.generate(request(max_new_tokens=100), client="bob")
        mallory[0].cancel()
        await until(lambda: net.registry.num_active == 3)
        await net.registry.generate(request("m3", max_new_tokens=100), client="mallory")
        gate.open()
        assert text_of(await read(bobs)) == ANSWER


async def test_share_of_the_running_tokens_does_not_bind_an_only_stream() -> None:
    limits = ServeLimits(max_running_tokens=200, max_running_tokens_per_client=1)
    async with network(ScriptedBackend(ANSWER), limits=limits) as net:
        for name in ("first", "second"):
            stream = await net.registry.generate(request(name, max_new_tokens=200), client="a")
            assert text_of(await read(stream)) == ANSWER
            await until(lambda: net.registry.num_active == 0)


@pytest.mark.parametrize("tokens", [290, 5000, 10**12])
async def test_request_that_is_refused_costs_others_nothing(tokens: int) -> None:
    limits = ServeLimits(max_running_tokens=300, max_retained_bytes=8000)
    async with network(ScriptedBackend("hello"), limits=limits) as net:
        kept = await net.registry.generate(request("kept", max_new_tokens=100), client="alice")
        await read(kept)
        with pytest.raises(D2FError):
            await read(
                await net.registry.generate(
                    request("mean", prompt="", max_new_tokens=tokens), client="mallory"
                )
            )
        assert await net.registry.resume(kept.id, client="alice") is kept


async def test_ended_streams_are_bounded_in_bytes_and_whoever_has_most_gives_way() -> None:
    limits = ServeLimits(max_retained_bytes=20_000)
    async with network(ScriptedBackend("hello"), limits=limits) as net:
        bobs = await net.registry.generate(request("bob"), client="bob")
        await read(bobs)
        alices = []
        for number in range(30):
            alices.append(await net.registry.generate(request(f"alice-{number}"), client="alice"))
            await read(alices[-1])
        assert await net.registry.resume(bobs.id, client="bob") is bobs
        assert await net.registry.resume(alices[-1].id, client="alice") is alices[-1]
        with pytest.raises(StreamLost):
            await net.registry.resume(alices[0].id, client="alice")
        assert net.registry.num_retained * bobs.num_bytes <= 20_000
        await until(lambda: net.registry.num_active == 0)
        log = net.registry._log
        assert isinstance(log, MemoryLog)
        assert len(log._shelf._expiries) == net.registry.num_retained


async def test_request_id_stands_for_one_request() -> None:
    async with network(ScriptedBackend("hello")) as net:
        first = await net.registry.generate(request(), client="alice")
        assert await net.registry.generate(request(), client="alice") is first
        for other in (request(prompt="another"), request(max_new_tokens=5)):
            with pytest.raises(RequestConflict, match="another request of yours"):
                await net.registry.generate(other, client="alice")
        assert await net.registry.generate(request(prompt="another"), client="bob") is not first
        assert text_of(await read(first)) == "hello"


async def test_answer_takes_the_room_that_is_left_unless_its_length_is_named() -> None:
    backend = ScriptedBackend("y" * 4096)
    async with network(backend) as net:
        max_len = net.registry.engine.info.max_len
        cases: list[tuple[str, dict[str, Any], bool]] = [
            ("open", {}, False),
            ("clamped", {"max_new_tokens": 1000}, True),
        ]
        for name, fields, clamp in cases:
            prompt = "x" * (max_len - 10)
            stream = await net.registry.generate(
                request(name, prompt=prompt, **fields), client="alice", clamp=clamp
            )
            log = await read(stream)
            assert (len(text_of(log)), getattr(log[-1], "reason", None)) == (10, "length")
        for name, prompt, clamp in (
            ("named", "x" * (max_len - 10), False),
            ("full", "x" * max_len, True),
        ):
            fields = dict[str, Any]() if clamp else {"max_new_tokens": 11}
            with pytest.raises(PromptTooLong):
                await read(
                    await net.registry.generate(
                        request(name, prompt=prompt, **fields), client="alice", clamp=clamp
                    )
                )


async def test_clients_take_turns_however_much_one_of_them_asks() -> None:
    backend, gate = held()
    limits = ServeLimits(max_running=4)
    async with network(backend, limits=limits) as net:
        alices = [await net.registry.generate(request(f"a{n}"), client="alice") for n in range(20)]
        await until(lambda: net.registry.num_waiting == 17)  # three quarters of 4 may run
        step = 0
        while sum(stream.started for stream in alices) < 3:  # steps began before all were there
            step += 1
            await asyncio.to_thread(gate.wait_entered, step)
            gate.let_through(1)
        bobs = [await net.registry.generate(request(f"b{n}"), client="bob") for n in range(2)]
        gate.open()
        await until(lambda: all(stream.started for stream in bobs))
        assert sum(stream.started for stream in alices) < 12
        for stream in (*alices, *bobs):
            assert text_of(await read(stream)) == ANSWER
        assert net.registry.num_waiting == 0


async def test_stream_that_waits_for_its_turn_is_cancelled_at_once() -> None:
    backend, gate = held()
    async with network(backend, limits=ServeLimits(max_running=1)) as net:
        running = await net.registry.generate(request("first"), client="alice")
        await until(lambda: running.started)
        waiting = await net.registry.generate(request("second"), client="alice")
        await until(lambda: net.registry.num_waiting == 1)
        waiting.cancel()
        start, end = await read(waiting)
        assert isinstance(start, StreamStarted)
        assert (start.seq, start.request_id) == (0, waiting.request_id)
        assert isinstance(end, StreamFinished)
        assert (end.seq, end.reason) == (1, "cancelled")
        assert net.registry.num_waiting == 0
        gate.open()
        assert text_of(await read(running)) == ANSWER
