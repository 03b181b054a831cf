import asyncio

import pytest

from d2f_stream.core.errors import OutOfCapacity
from d2f_stream.core.events import Draft, Event
from fakes import Producer, block, draft, failed, finished, started, turn


async def drain(producer: Producer) -> list[Event]:
    return [event async for event in producer.session().events()]


async def test_events_come_out_in_the_order_they_went_in() -> None:
    producer = Producer()
    events: list[Event] = [started(), block(0), block(1), finished(3)]
    producer.put(*events)
    assert await drain(producer) == events


async def test_get_returns_none_after_the_last_event_again_and_again() -> None:
    producer = Producer()
    producer.put(finished())
    await producer.buffer.get()
    assert await producer.buffer.get() is None
    assert await producer.buffer.get() is None


async def test_get_waits_for_an_event() -> None:
    producer = Producer()
    reader = asyncio.create_task(producer.buffer.get())
    await turn()
    assert not reader.done()
    producer.put(started())
    assert await reader == started()


async def test_cancelled_reader_loses_no_event() -> None:
    producer = Producer()
    reader = asyncio.create_task(producer.buffer.get())
    await turn()
    producer.put(started())
    reader.cancel()  # after the event arrived, before the reader took it
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await producer.buffer.get() == started()


async def test_timeout_of_a_read_loses_no_event() -> None:
    producer = Producer()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await producer.buffer.get()
    producer.put(started())
    assert await producer.buffer.get() == started()


async def test_second_reader_is_an_error_and_the_first_reads_on() -> None:
    producer = Producer()
    reader = asyncio.create_task(producer.buffer.get())
    await turn()
    with pytest.raises(RuntimeError, match="one session at a time"):
        await producer.buffer.get()
    producer.put(started())
    assert await reader == started()


async def test_producer_is_paused_above_the_high_mark_and_resumed_at_a_quarter() -> None:
    producer = Producer(high=8)
    producer.put(*(block(i) for i in range(8)))
    assert producer.calls == []
    producer.put(block(8))
    assert producer.calls == ["pause"]
    for _ in range(6):
        await producer.buffer.get()
    assert producer.calls == ["pause"]
    await producer.buffer.get()
    assert producer.buffer.num_waiting == 2
    assert producer.calls == ["pause", "resume"]


async def test_what_is_put_while_paused_is_kept() -> None:
    producer = Producer(high=2)
    events: list[Event] = [started(), *(block(i) for i in range(9)), finished(10)]
    producer.put(*events)
    assert await drain(producer) == events
    assert producer.calls == ["pause", "resume"]


async def test_lifted_marks_resume_and_never_pause_again() -> None:
    producer = Producer(high=2)
    producer.put(*(block(i) for i in range(3)))
    producer.buffer.lift_marks()
    producer.put(*(block(i) for i in range(3, 30)))
    assert producer.calls == ["pause", "resume"]


async def test_draft_replaces_the_unread_draft_of_its_block_only() -> None:
    producer = Producer()
    producer.put(draft(0, "a"), draft(1, "b"), draft(0, "ab"), finished())
    assert await drain(producer) == [finished()]  # the end makes drafts worthless
    producer = Producer()
    producer.put(draft(0, "a"), draft(1, "b"), draft(0, "ab"))
    assert await producer.buffer.get() == draft(1, "b")
    assert await producer.buffer.get() == draft(0, "ab")


async def test_committed_block_drops_its_draft() -> None:
    producer = Producer()
    producer.put(draft(0), draft(1), block(0))
    assert [await producer.buffer.get(), await producer.buffer.get()] == [draft(1), block(0)]


async def test_drafts_are_dropped_while_durable_events_pile_up() -> None:
    producer = Producer(high=4)
    producer.put(started(), block(0), draft(1), block(1), draft(2), finished(3))
    assert not any(isinstance(event, Draft) for event in await drain(producer))


async def test_drafts_never_pause_the_producer() -> None:
    producer = Producer(high=1)
    producer.put(*(draft(i) for i in range(50)))
    assert producer.calls == []


async def test_text_and_ids_are_those_committed_read_or_not() -> None:
    producer = Producer()
    producer.put(started(), block(0, "one "), draft(1), block(1, "two"))
    assert producer.buffer.text == "one two"
    assert producer.buffer.token_ids == [1, 2, 3, 4, 1, 2, 3, 4]


async def test_cancel_reaches_the_producer_once() -> None:
    producer = Producer()
    producer.buffer.cancel()
    producer.buffer.cancel()
    assert producer.calls == ["cancel"]


@pytest.mark.parametrize("end", [finished(), failed()])
async def test_cancel_after_the_end_does_nothing(end: Event) -> None:
    producer = Producer()
    producer.put(end)
    producer.buffer.cancel()
    assert producer.calls == []


async def test_rejection_is_raised_by_every_read() -> None:
    producer = Producer()
    reader = asyncio.create_task(producer.buffer.get())
    await turn()
    producer.buffer.reject(OutOfCapacity("full"))
    with pytest.raises(OutOfCapacity, match="full"):
        await reader
    with pytest.raises(OutOfCapacity, match="full"):
        await producer.buffer.get()
