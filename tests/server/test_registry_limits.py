"""StreamRegistry: what is refused for its size, number or rate, and how it all ends."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

import d2f_stream.server.streams.registry as streams_module
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.errors import (
    D2FError,
    InvalidParams,
    InvalidPrompt,
    InvalidRequest,
    MessageTooLarge,
    PromptTooLong,
    RateLimited,
    ServerShuttingDown,
    TooManyStreams,
)
from d2f_stream.core.events import StreamFinished
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.wire.protocol import Generate
from fakes import ANSWER, held
from memory_network import network, until
from registry_requests import LONG, read, request, text_of

# What is refused.


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (request(prompt=""), InvalidPrompt),
        (request(prompt="x" * 5000), PromptTooLong),
        (request(temperature=-1.0), InvalidParams),
        (request(block_size=999), InvalidParams),
        (request(max_new_tokens=513), MessageTooLarge),
        (Generate(request_id="large-id--------", prompt=[2**70]), InvalidPrompt),
        (Generate(request_id="mixed-prompt-----", prompt=[1, {"role": "user"}]), InvalidRequest),
        (Generate(request_id="no-role----------", prompt=[{"content": "x"}]), InvalidPrompt),
    ],
)
async def test_request_that_does_not_fit_is_refused_and_leaves_nothing(
    asked: Generate, kind: type[D2FError]
) -> None:
    limits = ServeLimits(max_new_tokens=512)
    async with network(ScriptedBackend(ANSWER), limits=limits) as net:
        with pytest.raises(kind):
            await read(await net.registry.generate(asked, client="alice"))
        await until(lambda: net.registry.num_active == 0)
        assert net.registry.num_retained == 0
        assert net.registry._admission.num_tokens == 0


async def test_number_of_streams_is_bounded_for_each_client_and_in_all() -> None:
    backend, gate = held()
    limits = ServeLimits(max_streams=3, max_streams_per_client=2)
    async with network(backend, limits=limits) as net:
        generate = net.registry.generate
        first = await generate(request("a1"), client="alice")
        await generate(request("a2"), client="alice")
        with pytest.raises(TooManyStreams, match="2 of your streams"):
            await generate(request("a3"), client="alice")
        assert await generate(request("a1"), client="alice") is first  # attaching is no new stream
        await generate(request("b1"), client="bob")
        with pytest.raises(TooManyStreams, match="3 streams are running or waiting"):
            await generate(request("b2"), client="bob")
        gate.open()
        await until(lambda: not net.registry.num_active)
        await generate(request("a3"), client="alice")


async def test_stream_turned_away_later_may_be_asked_for_again() -> None:
    backend = ScriptedBackend(ANSWER, capacity=10)  # no slot is ever large enough
    async with network(backend) as net:
        for _ in range(2):
            stream = await net.registry.generate(request(), client="alice")
            with pytest.raises(D2FError, match="10"):
                await read(stream)
            assert net.registry.num_retained == 0
        assert net.notes.started[stream.request_id] == 2


@given(
    per_minute=st.integers(1, 120),
    gaps=st.lists(st.floats(0, 100), max_size=80),
)
def test_rate_is_never_above_its_limit_and_its_advice_is_good(
    per_minute: int, gaps: list[float]
) -> None:
    rate, now_s = RateLimit(per_minute), 1000.0
    taken: list[float] = []
    for gap in gaps:
        now_s += gap
        try:
            rate.take("alice", now_s)
        except RateLimited as error:
            now_s += (error.retry_after_s or 0.0) + 1e-6
            rate.take("alice", now_s)
        taken.append(now_s)
    for first in range(len(taken)):
        within = [t for t in taken[first:] if t - taken[first] < 60]
        assert len(within) <= 2 * per_minute


def test_clients_have_rates_of_their_own() -> None:
    rate = RateLimit(1)
    rate.take("alice", 0.0)
    rate.take("bob", 0.0)
    with pytest.raises(RateLimited, match="1 requests a minute"):
        rate.take("alice", 1.0)


# The end.


async def test_shutting_down_lets_streams_end() -> None:
    backend, gate = held()
    async with network(backend) as net:
        stream = await net.registry.generate(request(), client="alice")
        closing = asyncio.create_task(net.registry.shut_down(60))
        await asyncio.sleep(0)
        assert not net.registry.admits
        with pytest.raises(ServerShuttingDown):
            await net.registry.generate(request("new"), client="alice")
        assert await net.registry.generate(request(), client="alice") is stream
        gate.open()
        await closing
        assert text_of(await read(stream)) == ANSWER


async def test_shutting_down_cancels_what_is_left_at_the_deadline() -> None:
    backend = ScriptedBackend(LONG)
    async with network(backend) as net:
        stream = await net.registry.generate(request(max_new_tokens=4000), client="alice")
        await net.registry.shut_down(0)
        assert isinstance(stream.log[-1], StreamFinished)
        assert stream.log[-1].reason == "cancelled"
        assert backend.open_slots == {}


async def test_pump_that_is_cancelled_tells_its_readers() -> None:
    backend, gate = held()
    async with network(backend) as net:
        stream = await net.registry.generate(request(), client="alice")
        reading = asyncio.create_task(read(stream))
        await asyncio.to_thread(gate.wait_entered)
        (pump,) = net.registry._runs._pumps
        pump.cancel()
        with pytest.raises(ServerShuttingDown):
            await reading


def test_module_needs_no_extra() -> None:
    assert not {"starlette", "uvicorn", "websockets"} & set(vars(streams_module))
