"""StreamRegistry: streams that outlive their readers, each read whole, in order and once."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream.core.errors import (
    InvalidRequest,
    PromptTooLong,
    StreamLost,
)
from d2f_stream.core.events import Draft, Event, StreamFinished, StreamStarted
from d2f_stream.server.streams.served_stream import Cursor, ServedStream
from d2f_stream.wire.protocol import Generate
from fakes import ANSWER, block, draft, finished, held, info, started
from memory_network import network, until
from registry_requests import LONG, read, request, text_of

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


TestReaders.settings = settings(max_examples=60, stateful_step_count=30)
