"""Sessions into streamers: what a streamer is told, and transformers' own where it is installed."""

import asyncio
import subprocess
import sys
import threading
from typing import Any

import msgspec
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.errors import (
    EngineFailed,
    MissingExtra,
)
from d2f_stream.core.events import Event
from d2f_stream.transformers_streamer import stream_to
from fakes import ANSWER, Producer, block, draft, engine_over, failed, finished, started
from streamers import Bytes, DraftRecorder, Recorder


async def test_prompt_blocks_and_end_arrive_in_order() -> None:
    producer, streamer = Producer(), Recorder()
    producer.put(started(), block(0), block(1), finished(seq=3))
    result = await stream_to(producer.session(), streamer, prompt_ids=[7, 8])
    ids = [1, 2, 3, 4]
    assert streamer.calls == [("put", [7, 8]), ("put", ids), ("put", ids), ("end", None)]
    assert result.text == "texttext"


async def test_first_put_stands_for_the_prompt_even_without_one() -> None:
    producer, streamer = Producer(), Recorder()
    producer.put(started(), finished(seq=1))
    await stream_to(producer.session(), streamer)
    assert streamer.calls == [("put", []), ("end", None)]


async def test_drafts_of_all_active_blocks_are_shown_and_come_back_after_a_block() -> None:
    producer, streamer = Producer(), DraftRecorder()
    events: list[Event] = [draft(0, "ab"), draft(1, "cd"), block(0), draft(1, "cde"), block(1)]
    calls = [1, 1, 2, 1, 1]  # the wiped draft is shown again
    producer.put(started())
    feeding = asyncio.create_task(stream_to(producer.session(), streamer))
    wanted = 1  # the prompt
    for event, number in zip(events, calls, strict=True):
        producer.put(event)  # one by one, or a later draft takes an earlier one's place
        wanted += number
        while len(streamer.calls) < wanted:  # noqa: ASYNC110 - the calls come from a thread
            await asyncio.sleep(0)
    producer.put(finished(seq=3))
    await feeding
    shown = [value for name, value in streamer.calls if name == "draft"]
    assert shown == ["ab", "abcd", "cd", "cde"]


async def test_streamer_without_put_draft_gets_no_drafts() -> None:
    producer, streamer = Producer(), Recorder()
    producer.put(started(), draft(0), block(0), finished(seq=2))
    await stream_to(producer.session(), streamer)
    assert [name for name, _ in streamer.calls] == ["put", "put", "end"]


async def test_failed_stream_ends_the_streamer_and_raises() -> None:
    producer, streamer = Producer(), Recorder()
    producer.put(started(), block(0), failed(seq=2))
    with pytest.raises(EngineFailed, match="the GPU is gone"):
        await stream_to(producer.session(), streamer)
    assert streamer.calls[-1] == ("end", None)


async def test_cancelling_waits_for_the_call_in_flight_and_ends_the_streamer() -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Recorder):
        def put(self, value: Any) -> None:
            entered.set()
            leave.wait(30)
            super().put(value)

    streamer = Slow()
    async with engine_over(ScriptedBackend(answers=ANSWER, gate=StepGate())) as engine:
        session = engine.generate("prompt")
        feeding = asyncio.create_task(stream_to(session, streamer))
        await asyncio.to_thread(entered.wait, 30)
        feeding.cancel()
        await asyncio.sleep(0)
        assert not feeding.done()
        leave.set()
        with pytest.raises(asyncio.CancelledError):
            await feeding
        session.cancel()
    assert [name for name, _ in streamer.calls] == ["put", "end"]


async def test_ids_may_be_of_any_kind() -> None:
    class Plain:
        def __init__(self) -> None:
            self.values: list[object] = []

        def put(self, value: object) -> None:
            self.values.append(value)

        def end(self) -> None:
            pass

    producer, streamer = Producer(), Plain()
    producer.put(started(), block(0), finished(seq=2))
    await stream_to(producer.session(), streamer, ids=tuple)
    assert streamer.values == [(), (1, 2, 3, 4)]


async def test_missing_numpy_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(MissingExtra, match="numpy"):
        await stream_to(Producer().session(), Recorder())


async def texts_of(streamer: Any) -> str:
    return "".join([text async for text in streamer])


def test_import_is_light() -> None:
    code = (
        "import sys, d2f_stream.transformers_streamer as _;"
        "assert not {'transformers', 'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestTransformersOwn:
    @pytest.fixture
    def tokenizer(self) -> Any:
        pytest.importorskip("transformers")
        return Bytes()

    @pytest.mark.parametrize("drafts", [False, True])
    async def test_text_streamer_prints_the_answer(
        self, tokenizer: Any, capsys: pytest.CaptureFixture[str], drafts: bool
    ) -> None:
        from transformers import TextStreamer

        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            session = engine.generate("prompt", drafts=drafts)
            await stream_to(session, TextStreamer(tokenizer))
        assert capsys.readouterr().out == ANSWER + "\n"

    async def test_prompt_is_shown_or_skipped_as_the_streamer_wants(
        self, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from transformers import TextStreamer

        prompt = list(b"prompt: ")
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            for skip in (False, True):
                streamer = TextStreamer(tokenizer, skip_prompt=skip)
                await stream_to(engine.generate(prompt), streamer, prompt_ids=prompt)
        assert capsys.readouterr().out == f"prompt: {ANSWER}\n{ANSWER}\n"

    async def test_iterator_streamer_feeds_a_reader_on_another_thread(self, tokenizer: Any) -> None:
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(tokenizer, timeout=30)
        reader = asyncio.create_task(asyncio.to_thread(lambda: "".join(streamer)))
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            await stream_to(engine.generate("prompt"), streamer)
            assert await reader == ANSWER

    async def test_async_iterator_streamer_feeds_a_reader_on_the_loop(self, tokenizer: Any) -> None:
        from transformers import AsyncTextIteratorStreamer

        streamer = AsyncTextIteratorStreamer(tokenizer)

        async def read() -> str:
            return "".join([text async for text in streamer])

        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            reader = asyncio.create_task(read())
            await stream_to(engine.generate("prompt"), streamer)
            assert await reader == ANSWER

    async def test_text_streamer_as_an_argument(
        self, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from transformers import TextStreamer

        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            streamer = TextStreamer(tokenizer, skip_prompt=True)
            await d2f_stream.generate("prompt", model=engine, streamer=streamer).result()
        assert capsys.readouterr().out == ANSWER + "\n"

    async def test_async_iterator_streamer_as_an_argument(self, tokenizer: Any) -> None:
        from transformers import AsyncTextIteratorStreamer

        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            streamer = AsyncTextIteratorStreamer(tokenizer)
            d2f_stream.generate("prompt", model=engine, streamer=streamer)
            assert await texts_of(streamer) == ANSWER

    async def test_diffusion_streamer_shows_drafts_and_leaves_the_answer(
        self, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, "TextDiffusionStreamer"):
            pytest.skip("this transformers has no TextDiffusionStreamer")
        drawn = asyncio.Event()
        loop = asyncio.get_running_loop()

        base: Any = transformers.TextDiffusionStreamer

        class Noticed(base):  # type: ignore[misc]
            def put_draft(self, value: Any, **options: Any) -> None:
                super().put_draft(value, **options)
                loop.call_soon_threadsafe(drawn.set)

        producer = Producer()
        producer.put(started(), draft(0, "dra"))
        feeding = asyncio.create_task(stream_to(producer.session(), Noticed(tokenizer)))
        await drawn.wait()
        ids = tuple(ANSWER.encode())
        producer.put(msgspec.structs.replace(block(0), token_ids=ids), finished(seq=2))
        await feeding
        printed = capsys.readouterr().out
        assert printed == f"\0337\033[33mdra\033[0m\0338\033[J{ANSWER}\n"
