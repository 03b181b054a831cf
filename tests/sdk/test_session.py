import asyncio
import gc
import threading

import pytest

from d2f_stream.core.errors import D2FError, EngineClosed, EngineFailed, OutOfCapacity
from d2f_stream.core.session import Session
from fakes import Producer, block, draft, failed, finished, started, texts, turn


async def test_iteration_yields_the_blocks_only() -> None:
    producer = Producer()
    producer.put(started(), draft(0), block(0, "a"), block(1, "b"), finished(3))
    assert await texts(producer.session()) == ["a", "b"]


async def test_events_yields_everything() -> None:
    producer = Producer()
    events = [started(), draft(0), block(1, "b"), failed(2)]
    producer.put(started(), draft(0))
    session = producer.session()
    iterator = session.events()
    assert [await anext(iterator), await anext(iterator)] == events[:2]
    producer.put(block(1, "b"), failed(2))
    assert [event async for event in iterator] == events[2:]


async def test_iteration_raises_what_ended_the_stream_after_its_blocks() -> None:
    producer = Producer()
    producer.put(started(), block(0, "a"), failed(2))
    session = producer.session()
    assert (await anext(session)).text == "a"
    with pytest.raises(EngineFailed, match="the GPU is gone"):
        await anext(session)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("engine_failed", EngineFailed),
        ("engine_closed", EngineClosed),
        ("out_of_capacity", OutOfCapacity),
        ("something_new", D2FError),
    ],
)
async def test_failure_code_chooses_the_error(code: str, kind: type[D2FError]) -> None:
    producer = Producer()
    producer.put(failed(0, code))
    with pytest.raises(kind, match="the GPU is gone") as caught:
        await producer.session().result()
    assert type(caught.value) is kind


async def test_result_holds_the_whole_answer() -> None:
    producer = Producer()
    producer.put(started(), block(0, "a"), block(1, "b"), finished(3))
    result = await producer.session().result()
    assert (result.text, result.token_ids, result.reason) == ("ab", (1, 2, 3, 4) * 2, "eos")
    assert result.usage.tokens_per_step == 2.0


async def test_result_leaves_the_events_readable() -> None:
    producer = Producer()
    producer.put(started(), block(0, "a"), finished(2))
    session = producer.session()
    await session.result()
    assert await texts(session) == ["a"]


async def test_result_does_without_back_pressure() -> None:
    producer = Producer(high=1)
    producer.put(started(), block(0), block(1))
    waiting = asyncio.create_task(producer.session().result())
    await turn()
    assert producer.calls == ["pause", "resume"]
    producer.put(finished(3))
    await waiting


async def test_several_tasks_may_await_the_result_while_one_reads() -> None:
    producer = Producer()
    session = producer.session()
    waiting = [asyncio.create_task(session.result()) for _ in range(3)]
    reading = asyncio.create_task(texts(session))
    await turn()
    producer.put(started(), block(0, "a"), finished(2))
    assert [(await task).text for task in waiting] == ["a"] * 3
    assert await reading == ["a"]


async def test_result_raises_why_the_request_was_turned_away() -> None:
    producer = Producer()
    producer.buffer.reject(OutOfCapacity("full"))
    with pytest.raises(OutOfCapacity):
        await producer.session().result()


async def test_text_grows_with_the_blocks() -> None:
    producer = Producer()
    session = producer.session()
    producer.put(started(), block(0, "a"))
    assert session.text == "a"
    producer.put(block(1, "b"))
    assert session.text == "ab"


async def test_cancelled_read_loses_no_block_and_does_not_cancel_the_session() -> None:
    producer = Producer()
    session = producer.session()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(session), 0)
    producer.put(started(), block(0, "a"), finished(2))
    assert await texts(session) == ["a"]
    assert producer.calls == []


async def test_cancel_is_idempotent() -> None:
    producer = Producer()
    session = producer.session()
    session.cancel()
    session.cancel()
    assert producer.calls == ["cancel"]


async def test_leaving_the_context_cancels_and_waits_for_the_end() -> None:
    producer = Producer()

    async def use() -> None:
        async with producer.session():
            pass

    using = asyncio.create_task(use())
    await turn()
    assert producer.calls == ["cancel"]
    assert not using.done()
    producer.put(finished())
    await using


async def test_dropped_session_is_cancelled() -> None:
    producer = Producer()
    session = producer.session()
    del session
    await turn()
    assert producer.calls == ["cancel"]


async def test_dropped_session_that_ended_is_not_cancelled() -> None:
    producer = Producer()
    session = producer.session()
    producer.put(finished())
    del session
    await turn()
    assert producer.calls == []


async def test_break_drops_the_session() -> None:
    producer = Producer()
    producer.put(started(), block(0), block(1))
    async for _ in producer.session():
        break
    await turn()
    assert producer.calls == ["cancel"]


async def test_break_out_of_events_drops_the_session() -> None:
    producer = Producer()
    producer.put(started(), block(0))
    async for _ in producer.session().events():
        break
    await turn()
    assert producer.calls == ["cancel"]


async def test_error_in_the_loop_body_drops_the_session() -> None:
    producer = Producer()
    producer.put(started(), block(0))
    try:
        async for _ in producer.session():
            raise ZeroDivisionError
    except ZeroDivisionError:
        await turn()
    assert producer.calls == ["cancel"]


@pytest.mark.parametrize("how", ["iteration", "events", "result", "anext"])
async def test_cancelled_task_drops_the_session_though_its_error_is_kept(how: str) -> None:
    producer = Producer()

    async def consume() -> None:
        match how:
            case "iteration":
                async for _ in producer.session():
                    pass
            case "events":
                async for _ in producer.session().events():
                    pass
            case "result":
                await producer.session().result()
            case _:
                await anext(producer.session())

    consumer = asyncio.create_task(consume())
    await turn()
    assert producer.calls == []
    consumer.cancel()
    results = await asyncio.gather(consumer, return_exceptions=True)
    await turn()
    assert producer.calls == ["cancel"]
    assert isinstance(results[0], asyncio.CancelledError)


async def test_held_session_outlives_a_break() -> None:
    producer = Producer()
    producer.put(started(), block(0, "a"), block(1, "b"), finished(3))
    session = producer.session()
    async for _ in session:
        break
    await turn()
    assert producer.calls == []
    assert await texts(session) == ["b"]


async def test_session_may_be_collected_on_another_thread() -> None:
    producer = Producer()
    cell = [producer.session()]
    thread = threading.Thread(target=cell.clear)
    thread.start()
    await asyncio.to_thread(thread.join)
    await turn()
    assert producer.calls == ["cancel"]


async def test_session_in_a_reference_cycle_is_cancelled_by_the_collector() -> None:
    producer = Producer()
    cycle: list[object] = [producer.session()]
    cycle.append(cycle)
    del cycle
    gc.collect()
    await turn()
    assert producer.calls == ["cancel"]


def test_session_may_outlive_its_event_loop() -> None:
    async def make() -> tuple[Session, Producer]:
        producer = Producer()
        return producer.session(), producer

    session, producer = asyncio.run(make())
    del session
    assert producer.calls == ["cancel"]
