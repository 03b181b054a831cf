from dataclasses import replace

import pytest

from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import Limits, LocalEngine
from d2f_stream.core.errors import EngineFailed
from d2f_stream.core.params import GenerationParams
from fakes import check_clean

PIPELINE = GenerationParams(block_size=8, max_new_tokens=64)


async def test_steps_are_timed_before_the_engine_is_ready() -> None:
    backend = ScriptedBackend("abcdefgh" * 8)
    limits = Limits(may_narrow=True, max_rows=4)
    async with LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=limits, warm_up=True
    ) as engine:
        assert {len(batch) for batch in backend.batches} == {1, 4}
        widths = {len(row.window.tokens) for batch in backend.batches for row in batch}
        assert len(widths) > 2, "windows of several widths"
        assert not backend.open_slots
        assert (await engine.generate("hi").result()).text == "abcdefgh" * 8
    check_clean(backend)


async def test_of_sessions_that_run_one_by_one_one_is_timed() -> None:
    backend = ScriptedBackend("abcdefgh" * 8)
    backend.info = replace(backend.info, one_by_one=True)
    limits = Limits(may_narrow=True, max_rows=4)
    async with LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=limits, warm_up=True
    ):
        assert {len(batch) for batch in backend.batches} == {1}
    check_clean(backend)


async def test_an_answer_that_ends_at_once_is_begun_again() -> None:
    backend = ScriptedBackend("")
    limits = Limits(may_narrow=True, max_rows=1)
    async with LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=limits, warm_up=True
    ):
        assert backend.num_steps == 16  # four of each width
    check_clean(backend)


async def test_nothing_is_timed_where_windows_are_the_requests_own() -> None:
    backend = ScriptedBackend("abc")
    async with LocalEngine.over(backend, ByteCodec(), defaults=PIPELINE, warm_up=True):
        assert (backend.num_warm_ups, backend.num_steps) == (1, 0)


async def test_sessions_for_which_there_is_no_room_are_not_timed() -> None:
    backend = ScriptedBackend("abcdefgh" * 8, capacity=3 * 65)
    async with LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=Limits(may_narrow=True), warm_up=True
    ):
        assert {len(batch) for batch in backend.batches} == {1}
    check_clean(backend)


async def test_a_model_that_holds_little_is_not_timed() -> None:
    backend = ScriptedBackend("abc", capacity=20)
    async with LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=Limits(may_narrow=True), warm_up=True
    ) as engine:
        assert backend.num_steps == 0
        assert (await engine.generate("hi", max_new_tokens=8).result()).text == "abc"
    check_clean(backend)


async def test_a_step_that_fails_then_fails_the_engine() -> None:
    backend = ScriptedBackend("abc", errors={3: RuntimeError("broken")})
    engine = LocalEngine.over(
        backend, ByteCodec(), defaults=PIPELINE, limits=Limits(may_narrow=True), warm_up=True
    )
    with pytest.raises(EngineFailed, match="cannot be warmed up"):
        await engine.__aenter__()
    check_clean(backend)
