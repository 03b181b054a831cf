"""RemoteStream: whatever comes twice, late or from elsewhere, the reader sees each event once."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2f_stream.client.remote import RemoteStream
from d2f_stream.core.errors import StreamLost
from d2f_stream.core.events import Block, Event, StreamFailed, StreamFinished
from d2f_stream.wire.protocol import Generate
from fakes import STREAM, Producer, block, draft, finished, started

REQUEST = Generate(request_id="request-1-------", prompt="hi")
LOG: list[Event] = [
    msgspec.structs.replace(started(), request_id=REQUEST.request_id),
    *(block(index, f"{index} ") for index in range(6)),
    finished(7, 12),
]


def stream_of() -> tuple[RemoteStream, Producer]:
    producer = Producer(high=1000)
    return RemoteStream(REQUEST, producer.buffer), producer


async def all_events(producer: Producer) -> list[Event]:
    return [event async for event in producer.session().events()]


def renamed(event: Event, stream: str) -> Event:
    return msgspec.structs.replace(event, stream=stream)


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, len(LOG) - 1), st.integers(1, len(LOG)), st.booleans()),
        max_size=20,
    )
)
def test_pieces_of_the_log_in_any_order_and_number_join_to_it(
    arrivals: list[tuple[int, int, bool]],
) -> None:
    """Each arrival is a piece of the log, of ours or of a second worker's; a gap asks for more."""
    stream, producer = stream_of()
    taken = 0
    for first, num, is_ours in arrivals:
        for seq, event in enumerate(LOG[first : first + num], start=first):
            if not is_ours and not taken:
                continue  # a second worker is one that comes second
            in_order = stream.receive(event if is_ours else renamed(event, "stream-2"))
            if is_ours and seq == taken:
                taken += 1
            assert in_order == (not is_ours or seq < taken or stream.ended)
            assert stream.last_seq == taken - 1
            assert stream.started == (taken > 0)
    for event in LOG[stream.last_seq + 1 :]:
        assert stream.receive(event)
    assert stream.ended
    assert producer.buffer.text == "0 1 2 3 4 5 "
    assert producer.buffer.num_waiting == len(LOG)


async def test_drafts_pass_and_do_not_count() -> None:
    stream, producer = stream_of()
    assert not stream.receive(draft(0))  # its stream is not known yet
    stream.receive(LOG[0])
    assert stream.receive(draft(0))
    assert stream.receive(renamed(draft(0), "stream-2"))
    assert stream.last_seq == 0
    stream.receive(LOG[1])
    for event in LOG[2:]:
        stream.receive(event)
    events = await all_events(producer)
    assert events == LOG


async def test_start_of_another_request_is_not_ours() -> None:
    stream, _ = stream_of()
    assert stream.receive(started())
    assert not stream.started


async def test_failure_before_the_start_turns_the_request_away() -> None:
    stream, producer = stream_of()
    stream.fail(StreamLost("gone"))
    stream.fail(StreamLost("twice"))
    with pytest.raises(StreamLost, match="gone"):
        await producer.session().result()
    assert stream.receive(LOG[0])  # and is ignored
    assert producer.buffer.num_waiting == 0


async def test_failure_after_the_start_ends_the_stream_after_its_blocks() -> None:
    stream, producer = stream_of()
    stream.receive(LOG[0])
    stream.receive(LOG[1])
    stream.fail(StreamLost("gone"))
    *_, last_block, end = await all_events(producer)
    assert isinstance(last_block, Block)
    assert end == StreamFailed(stream=STREAM, seq=2, code="stream_lost", message="gone")


async def test_stream_cancelled_on_this_side_tells_what_had_come() -> None:
    stream, producer = stream_of()
    for event in LOG[:3]:
        stream.receive(event)
    stream.end_cancelled()
    stream.end_cancelled()
    *_, end = await all_events(producer)
    assert isinstance(end, StreamFinished)
    assert (end.stream, end.seq, end.reason) == (STREAM, 3, "cancelled")
    assert end.text_length == len("0 1 ")
    assert (end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.steps) == (3, 8, 2)
    assert (end.timings.first_block_ms, end.timings.total_ms) == (1.0, 1.0)
