"""StreamRegistry: streams that outlive their readers, each read whole, in order and once."""

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import d2f_stream.server.streams.registry as streams_module
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.errors import (
    D2FError,
    InvalidParams,
    InvalidPrompt,
    InvalidRequest,
    MessageTooLarge,
    PromptTooLong,
    RateLimited,
    RequestConflict,
    ServerShuttingDown,
    StreamLost,
    TooManyStreams,
)
from d2f_stream.core.events import Block, Draft, Event, StreamFinished, StreamStarted
from d2f_stream.server.limits import RateLimit, ServeLimits
from d2f_stream.server.streams.memory_log import MemoryLog
from d2f_stream.server.streams.served_stream import Cursor, ServedStream
from d2f_stream.wire.protocol import Generate, OnDisconnect, Overrides
from fakes import ANSWER, block, draft, finished, info, started
from memory_network import network, until

LONG = "a" * 4000


def request(
    name: str = "request",
    *,
    prompt: str = "hi",
    on_disconnect: OnDisconnect = "continue",
    **fields: Any,
) -> Generate:
    return Generate(
        request_id=name.ljust(16, "-"),
        prompt=prompt,
        params=Overrides(**fields),
        on_disconnect=on_disconnect,
    )


def held(answers: str = ANSWER) -> tuple[ScriptedBackend, StepGate]:
    gate = StepGate()
    return ScriptedBackend(answers, gate=gate), gate


async def read(stream: ServedStream, *, after_seq: int = -1, drafts: bool = False) -> list[Event]:
    return [event async for event in stream.follow(after_seq=after_seq, drafts=drafts)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Block))


# Names.


async def test_stream_carries_the_names_that_clients_know() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        stream = await net.registry.generate(request("mine"), client="alice")
        events = await read(stream)
        assert isinstance(events[0], StreamStarted)
        assert (events[0].request_id, events[0].stream) == (stream.request_id, stream.id)
        assert {event.stream for event in events} == {stream.id}
        assert text_of(events) == ANSWER


async def test_request_without_a_length_takes_the_room_that_is_left() -> None:
    async with network(ScriptedBackend(LONG, info=info(max_len=100))) as net:
        events = await read(await net.registry.generate(request(prompt="x" * 90), client="alice"))
        assert len(text_of(events)) == 10
        with pytest.raises(PromptTooLong, match="max_new_tokens is 11"):
            await read(
                await net.registry.generate(
                    request("2", prompt="x" * 90, max_new_tokens=11), client="alice"
                )
            )


async def test_same_request_attaches_whether_it_runs_or_has_ended() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        stream = await net.registry.generate(request(), client="alice")
        assert await net.registry.generate(request(), client="alice") is stream
        await read(stream)
        assert await net.registry.generate(request(), client="alice") is stream
        assert net.notes.started == {stream.request_id: 1}
        assert net.notes.num_resumes == 2


async def test_same_name_of_two_clients_is_two_streams() -> None:
    async with network(ScriptedBackend(ANSWER)) as net:
        alice = await net.registry.generate(request(), client="alice")
        bob = await net.registry.generate(request(), client="bob")
        assert alice.id != bob.id
        await net.registry.cancel(bob.request_id, client="bob")
        assert text_of(await read(alice)) == ANSWER


async def test_nobody_reaches_the_stream_of_another() -> None:
    backend, gate = held()
    async with network(backend) as net:
        stream = await net.registry.generate(request(), client="alice")
        with pytest.raises(StreamLost):
            await net.registry.resume(stream.id, client="bob")
        for name in (stream.id, stream.request_id):
            with pytest.raises(StreamLost):
                await net.registry.cancel(name, client="bob")
        gate.open()
        assert text_of(await read(stream)) == ANSWER


@pytest.mark.parametrize("name", ["short", "x" * 129, "with space in it!", "ünicode-ünicode-ü"])
async def test_name_that_could_be_guessed_or_does_not_fit_is_refused(name: str) -> None:
    async with network(ScriptedBackend()) as net:
        asked = Generate(request_id=name, prompt="hi")
        with pytest.raises(InvalidRequest, match="request_id"):
            await net.registry.generate(asked, client="alice")
        assert [error.code for error in net.notes.refused] == ["invalid_request"]


async def test_stream_ids_are_long_and_differ() -> None:
    ids = {ServedStream(request(), client="a").id for _ in range(1000)}
    assert len(ids) == 1000
    assert min(map(len, ids)) >= 24


# Reading.


@pytest.mark.parametrize("after_seq", [-2, 0, 1, 10**9])
async def test_reader_ahead_of_a_stream_without_events_is_refused(after_seq: int) -> None:
    stream = ServedStream(request(), client="alice")
    with pytest.raises(InvalidRequest, match="after_seq"):
        stream.read(after_seq=after_seq, wake=lambda: None)


async def test_reader_ahead_of_the_log_is_refused() -> None:
    async with network(ScriptedBackend("hello")) as net:
        stream = await net.registry.generate(request(), client="alice")
        assert len(await read(stream)) == 3
        assert await read(stream, after_seq=2) == []
        with pytest.raises(InvalidRequest, match="the last event of the stream is 2"):
            await read(stream, after_seq=3)


async def test_slow_and_fast_readers_read_the_same() -> None:
    backend = ScriptedBackend(LONG)
    async with network(backend) as net:
        stream = await net.registry.generate(request(max_new_tokens=400), client="alice")
        fast, late = await asyncio.gather(read(stream), read(stream))
        assert fast == late == await read(stream)
        assert text_of(fast) == LONG[:400]
        assert await read(stream, after_seq=20) == fast[21:]


async def test_follower_that_leaves_early_is_forgotten() -> None:
    backend, gate = held()
    async with network(backend) as net:
        stream = await net.registry.generate(request(), client="alice")
        gate.let_through(1)
        async with aclosing(stream.follow()) as events:  # type: ignore[type-var]
            await anext(events)
        assert stream.num_readers == 0
        gate.open()
        assert text_of(await read(stream)) == ANSWER


async def test_stream_that_is_to_end_with_its_readers_ends_with_the_last() -> None:
    backend, gate = held(LONG)
    async with network(backend) as net:
        asked = request(on_disconnect="cancel", max_new_tokens=4000)
        stream = await net.registry.generate(asked, client="alice")
        readers = [stream.read(wake=lambda: None) for _ in range(2)]
        readers[0].detach()
        readers[0].detach()
        assert not stream.ended
        readers[1].detach()
        gate.open()
        await until(lambda: stream.ended)
        assert isinstance(stream.log[-1], StreamFinished)
        assert stream.log[-1].reason == "cancelled"


def test_draft_is_not_read_after_its_block() -> None:
    stream = ServedStream(request(), client="alice")
    stream.append(started())
    reader = stream.read(drafts=True, wake=lambda: None)
    for event in (draft(0), draft(1), block(0)):
        stream.append(event)
    assert [reader.next_event() for _ in range(4)] == [started(), block(0), draft(1), None]


class Readers(RuleBasedStateMachine):
    """Any number of readers over one stream, with events and reads in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = ServedStream(request(), client="alice")
        self.stream.append(started())
        self.num_blocks = 0
        self.over = False
        self.readers: list[tuple[Cursor, list[Event], int]] = []
        self.woken: set[int] = set()
        self._attach(-1, drafts=True)

    @precondition(lambda self: not self.over)
    @rule(ahead=st.integers(0, 2), text=st.text(max_size=2))
    def draft(self, ahead: int, text: str) -> None:
        self.woken.clear()
        self.stream.append(draft(self.num_blocks + ahead, text))

    @precondition(lambda self: not self.over)
    @rule()
    def commit(self) -> None:
        self.woken.clear()
        self.stream.append(block(self.num_blocks))
        self.num_blocks += 1
        assert self.woken == set(range(len(self.readers)))

    @precondition(lambda self: not self.over)
    @rule()
    def finish(self) -> None:
        self.over = True
        self.stream.append(finished(self.num_blocks + 1))
        self.stream.end()

    @rule(data=st.data(), drafts=st.booleans())
    def attach(self, data: st.DataObject, drafts: bool) -> None:
        self._attach(data.draw(st.integers(-1, len(self.stream.log) - 1)), drafts=drafts)

    def _attach(self, after_seq: int, *, drafts: bool) -> None:
        number = len(self.readers)
        cursor = self.stream.read(
            after_seq=after_seq, drafts=drafts, wake=lambda: self.woken.add(number)
        )
        self.readers.append((cursor, [], after_seq))
        assert number in self.woken

    @rule(data=st.data(), times=st.sampled_from([1, 2, 100]))
    def take(self, data: st.DataObject, times: int) -> None:
        cursor, seen, _ = data.draw(st.sampled_from(self.readers))
        for _ in range(times):
            if (event := cursor.next_event()) is not None:
                seen.append(event)
                if isinstance(event, Draft):
                    assert event.index >= self.num_blocks
                    assert not self.over

    @invariant()
    def every_reader_sees_each_event_once_and_in_order(self) -> None:
        for _, seen, after_seq in self.readers:
            durable = [event for event in seen if not isinstance(event, Draft)]
            first = after_seq + 1
            assert durable == self.stream.log[first : first + len(durable)]

    def teardown(self) -> None:
        for cursor, seen, after_seq in self.readers:
            while (event := cursor.next_event()) is not None:
                seen.append(event)
            durable = [event for event in seen if not isinstance(event, Draft)]
            assert durable == self.stream.log[after_seq + 1 :]
            assert cursor.exhausted == self.over


TestReaders = Readers.TestCase
TestReaders.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


# How long streams are kept.


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can put forward."""

    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


def run_skipping(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        runner.run(main)


async def skip(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SkippingLoop)
    loop.skipped_s += seconds
    for _ in range(3):
        await asyncio.sleep(0)


def test_stream_can_be_resumed_for_its_time_and_no_longer() -> None:
    async def main() -> None:
        async with network(ScriptedBackend(ANSWER)) as net:
            stream = await net.registry.generate(request(), client="alice")
            await read(stream)
            await skip(299)
            assert await net.registry.resume(stream.id, client="alice") is stream
            await skip(2)
            with pytest.raises(StreamLost, match="kept for 300 s"):
                await net.registry.resume(stream.id, client="alice")
            assert net.registry.num_retained == 0

    run_skipping(main())


def test_running_stream_is_kept_however_long_it_takes() -> None:
    async def main() -> None:
        backend, gate = held()
        async with network(backend) as net:
            stream = await net.registry.generate(request(), client="alice")
            await skip(10_000)
            assert await net.registry.resume(stream.id, client="alice") is stream
            gate.open()
            assert text_of(await read(stream)) == ANSWER

    run_skipping(main())


def test_name_may_be_used_again_once_its_stream_is_forgotten() -> None:
    async def main() -> None:
        async with network(ScriptedBackend(ANSWER)) as net:
            first = await net.registry.generate(request(), client="alice")
            await read(first)
            await skip(301)
            second = await net.registry.generate(request(), client="alice")
            assert second is not first
            await skip(301)  # the first one's time is over again; the second one's is not
            assert await net.registry.resume(second.id, client="alice") is second
            await read(second)

    run_skipping(main())


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
        await until(lambda: sum(stream.started for stream in alices) == 3)  # three quarters
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
