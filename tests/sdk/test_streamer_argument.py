"""`generate(streamer=)`: sessions that write into a streamer while they are read."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.errors import (
    D2FError,
    EngineClosed,
    InvalidParams,
    InvalidPrompt,
)
from fakes import ANSWER, engine_over, turn
from serving import serving
from streamers import DraftRecorder, Recorder


class Ending(Recorder):
    """Tells the event loop when it has ended; for where nobody awaits the session's end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def end(self) -> None:
        super().end()
        self._loop.call_soon_threadsafe(self.ended.set)


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
