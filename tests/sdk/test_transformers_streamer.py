"""Sessions into streamers: transformers' own where it is installed, and some of the test's."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.errors import (
    D2FError,
    EngineClosed,
    EngineFailed,
    InvalidParams,
    InvalidPrompt,
    MissingExtra,
)
from d2f_stream.core.events import Event
from d2f_stream.transformers_streamer import stream_to
from fakes import ANSWER, Producer, block, draft, engine_over, failed, finished, started, turn
from serving import serving


class Recorder:
    """Notes its calls, and that never two run at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def put(self, value: Any) -> None:
        self._note("put", value.tolist())

    def end(self) -> None:
        self._note("end", None)

    def _note(self, name: str, value: Any) -> None:
        assert self._lock.acquire(blocking=False)
        self.calls.append((name, value))
        self._lock.release()


class Bytes:
    """A tokenizer whose tokens are the scripted backend's: the bytes of the text."""

    def decode(self, ids: Any, **_: Any) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode(errors="replace")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(text.encode())


class DraftRecorder(Recorder):
    tokenizer = Bytes()

    def put_draft(self, value: Any, **_: Any) -> None:
        self._note("draft", self.tokenizer.decode(value.tolist()))


class Ending(Recorder):
    """Tells the event loop when it has ended; for where nobody awaits the session's end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def end(self) -> None:
        super().end()
        self._loop.call_soon_threadsafe(self.ended.set)


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


class TestAsAnArgument:
    """generate(streamer=...): the streamer and the reader of the session get the same answer."""

    async def test_streamer_has_everything_before_the_result_is_there(self) -> None:
        streamer = Recorder()
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            session = d2f_stream.generate([7, 8], model=engine, streamer=streamer)
            result = await session.result()
        assert streamer.calls[0] == ("put", [7, 8])
        assert streamer.calls[-1] == ("end", None)
        ids = [token for name, value in streamer.calls[1:] if name == "put" for token in value]
        assert tuple(ids) == result.token_ids
        assert result.text == ANSWER

    async def test_reader_iterates_beside_the_streamer(self) -> None:
        streamer = Recorder()
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            blocks = [
                block
                async for block in d2f_stream.generate("prompt", model=engine, streamer=streamer)
            ]
        assert "".join(block.text for block in blocks) == ANSWER
        puts = [value for name, value in streamer.calls if name == "put"]
        assert puts == [[], *(list(block.token_ids) for block in blocks)]

    async def test_nobody_need_read_or_hold_the_session(self) -> None:
        streamer = Ending()
        backend = ScriptedBackend(answers="many words " * 40, tokens_per_step=2)  # past every mark
        async with engine_over(backend) as engine:
            d2f_stream.generate("prompt", model=engine, streamer=streamer, max_new_tokens=440)
            await streamer.ended.wait()
        ids = [token for name, value in streamer.calls if name == "put" for token in value]
        assert bytes(ids).decode() == "many words " * 40  # no EOS: the answer is as long as asked

    async def test_reader_who_leaves_ends_the_answer_for_the_streamer_too(self) -> None:
        streamer, gate = Ending(), StepGate()
        backend = ScriptedBackend(answers=ANSWER, gate=gate)
        async with engine_over(backend) as engine:
            gate.let_through(2)
            async for _ in d2f_stream.generate("prompt", model=engine, streamer=streamer):
                break
            gate.open()
            await streamer.ended.wait()
        assert 0 < sum(len(value) for _, value in streamer.calls[:-1]) < len(ANSWER.encode()) // 2

    async def test_cancelling_ends_the_streamer_and_then_the_session(self) -> None:
        streamer, gate = Recorder(), StepGate()
        async with engine_over(ScriptedBackend(answers=ANSWER, gate=gate)) as engine:
            session = d2f_stream.generate("prompt", model=engine, streamer=streamer)
            await asyncio.to_thread(gate.wait_entered)
            session.cancel()
            gate.open()
            result = await session.result()
            assert result.reason == "cancelled"
            assert streamer.calls[-1] == ("end", None)

    async def test_streamer_that_raises_ends_the_answer_and_is_the_cause(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Recorder):
            def put(self, value: Any) -> None:
                super().put(value)
                if len(self.calls) == 3:
                    raise OSError("the pipe is gone")

        streamer = Broken()
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            session = d2f_stream.generate("prompt", model=engine, streamer=streamer)
            assert (await anext(session)).text
            with pytest.raises(
                D2FError, match=r"the streamer failed: .*the pipe is gone"
            ) as caught:
                await anext(session)
        assert isinstance(caught.value.__cause__, OSError)
        assert [name for name, _ in streamer.calls] == ["put", "put", "put", "end"]
        assert "a streamer failed" in caplog.text

    async def test_failing_end_is_told_too(self) -> None:
        class Broken(Recorder):
            def end(self) -> None:
                raise OSError("the disk is full")

        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            session = d2f_stream.generate("prompt", model=engine, streamer=Broken())
            with pytest.raises(D2FError, match="the disk is full"):
                await session.result()

    async def test_refused_request_ends_the_streamer(self, tmp_path: Path) -> None:
        (tmp_path / "script.json").write_text('{"answers": "hi"}')
        streamer = Recorder()
        session = d2f_stream.generate("", model=tmp_path, streamer=streamer)  # refused once loaded
        with pytest.raises(InvalidPrompt, match="empty"):
            await session.result()
        assert streamer.calls == [("put", []), ("end", None)]

    async def test_engine_that_closes_ends_both(self) -> None:
        streamer, gate = Recorder(), StepGate()
        async with engine_over(ScriptedBackend(answers=ANSWER, gate=gate)) as engine:
            session = d2f_stream.generate("prompt", model=engine, streamer=streamer)
            await asyncio.to_thread(gate.wait_entered)
        with pytest.raises(EngineClosed):
            await session.result()
        assert streamer.calls[-1] == ("end", None)

    def test_event_loop_that_ends_leaves_nothing_behind(self, tmp_path: Path) -> None:
        (tmp_path / "script.json").write_text('{"answers": "hi"}')
        streamer = Recorder()

        async def leave() -> None:
            d2f_stream.generate("prompt", model=tmp_path, streamer=streamer)
            await turn()

        asyncio.run(leave())
        assert streamer.calls[-1] == ("end", None)

    async def test_drafts_come_to_a_streamer_that_shows_them(self) -> None:
        drawn, gate = asyncio.Event(), StepGate()
        loop = asyncio.get_running_loop()

        class Noticed(DraftRecorder):
            def put_draft(self, value: Any, **options: Any) -> None:
                super().put_draft(value, **options)
                loop.call_soon_threadsafe(drawn.set)

        async with engine_over(ScriptedBackend(answers=ANSWER, gate=gate)) as engine:
            session = d2f_stream.generate("prompt", model=engine, streamer=Noticed())
            await drawn.wait()
            gate.open()
            assert (await session.result()).text == ANSWER

    async def test_drafts_can_be_refused(self) -> None:
        streamer = DraftRecorder()
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            await d2f_stream.generate(
                "prompt", model=engine, streamer=streamer, drafts=False
            ).result()
        assert {name for name, _ in streamer.calls} == {"put", "end"}

    async def test_answer_of_a_server_feeds_one_too(self) -> None:
        streamer = Recorder()
        async with (
            serving(ScriptedBackend(answers=ANSWER)) as server,
            d2f_stream.connect(f"ws://127.0.0.1:{server.port}") as engine,
        ):
            session = d2f_stream.generate("prompt", model=engine, streamer=streamer)
            assert (await session.result()).text == ANSWER
        ids = [token for name, value in streamer.calls if name == "put" for token in value]
        assert bytes(token for token in ids if token < 256).decode() == ANSWER

    async def test_what_is_no_streamer_is_refused_before_anything_starts(self) -> None:
        async with engine_over(ScriptedBackend(answers=ANSWER)) as engine:
            with pytest.raises(InvalidParams, match=r"streamer is .* the methods put and end"):
                d2f_stream.generate("prompt", model=engine, streamer=print)  # type: ignore[arg-type]


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
