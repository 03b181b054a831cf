import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ScriptedBackend
from d2f_stream import sync
from d2f_stream.core.errors import (
    EngineClosed,
    InvalidParams,
    InvalidRequest,
    ModelDamaged,
    ModelNotFound,
    PromptTooLong,
    UnsupportedModel,
)
from fakes import engine_over, texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    script = {"answers": {"hi": "hello there, friend", "ho": "ho ho"}, "tokens_per_step": 3}
    (tmp_path / "script.json").write_text(json.dumps(script))
    return tmp_path


async def test_generate_on_an_open_engine() -> None:
    async with engine_over(ScriptedBackend("hello")) as engine:
        assert await texts(d2f_stream.generate("hi", model=engine)) == ["hello"]


@pytest.mark.parametrize("as_text", [True, False])
async def test_generate_on_a_folder(folder: Path, as_text: bool) -> None:
    text = ""
    async for block in d2f_stream.generate("hi", model=str(folder) if as_text else folder):
        text += block.text
    assert text == "hello there, friend"


async def test_generate_takes_params_and_overrides(folder: Path) -> None:
    params = d2f_stream.GenerationParams(block_size=4, max_new_tokens=100)
    session = d2f_stream.generate("hi", model=folder, params=params, max_new_tokens=6)
    assert await texts(session) == ["hell", "o "]


async def test_requests_of_a_loop_share_an_engine_and_its_steps(folder: Path) -> None:
    sessions = [d2f_stream.generate("hi", model=folder) for _ in range(3)]
    results = await asyncio.gather(*(session.result() for session in sessions))
    assert {result.usage.steps for result in results} == {results[0].usage.steps}


def test_shared_engine_serves_one_event_loop_after_the_other(folder: Path) -> None:
    async def ask() -> str:
        return (await d2f_stream.generate("ho", model=folder).result()).text

    assert [asyncio.run(ask()) for _ in range(3)] == ["ho ho"] * 3


def test_shared_engine_ends_with_its_loop_amid_a_session(folder: Path) -> None:
    async def leave() -> d2f_stream.Session:
        session = d2f_stream.generate("hi", model=folder)
        await anext(session)
        return session

    session = asyncio.run(leave())

    async def read_on() -> None:
        async for _ in session:
            pass

    with pytest.raises(EngineClosed):
        asyncio.run(read_on())


async def test_bad_request_raises_at_once_when_the_model_is_loaded(folder: Path) -> None:
    await d2f_stream.generate("hi", model=folder).result()
    with pytest.raises(PromptTooLong):
        d2f_stream.generate("x" * 5000, model=folder)


async def test_bad_request_raises_at_the_first_await_while_the_model_loads(folder: Path) -> None:
    session = d2f_stream.generate("hi", model=folder, block_size=100)
    with pytest.raises(InvalidParams, match="block_size"):
        await anext(session)


async def test_load_gives_an_engine(folder: Path) -> None:
    async with d2f_stream.load(folder) as engine:
        assert (engine.info.name, engine.info.family) == (folder.name, "scripted")
        assert engine.defaults.block_size == engine.info.native_block_size
        assert (await engine.generate("ho").result()).text == "ho ho"
    with pytest.raises(EngineClosed):
        engine.generate("ho")


async def test_model_loaded_twice_is_held_once(folder: Path) -> None:
    async with d2f_stream.load(folder) as first, d2f_stream.load(str(folder)) as second:
        assert first.info is second.info


@pytest.mark.parametrize("url", ["ftp://host/v1/stream", "hf://model", "://"])
async def test_address_of_no_known_kind_lists_the_known(url: str) -> None:
    with pytest.raises(InvalidRequest, match="ws, wss, http, https, mqtt, mqtts"):
        d2f_stream.generate("hi", model=url)
    with pytest.raises(InvalidRequest, match="ws, wss, http, https, mqtt, mqtts"):
        d2f_stream.connect(url)
    with pytest.raises(InvalidRequest, match="ws, wss, http, https, mqtt, mqtts"):
        async with d2f_stream.load(url):
            pass


async def test_address_without_a_scheme_is_told_with_one() -> None:
    with pytest.raises(InvalidRequest, match="http://localhost:8000 would be one"):
        d2f_stream.connect("localhost:8000")
    with pytest.raises(ModelNotFound, match="give its whole address: http://localhost:8000"):
        d2f_stream.generate("hi", model="localhost:8000")


async def test_model_that_is_no_engine_is_refused_with_what_would_be_one(folder: Path) -> None:
    with sync.load(folder) as other:
        for wrong in (d2f_stream.load(folder), other, 3):
            with pytest.raises(
                InvalidRequest, match=r"async with d2f_stream.load\(...\) as engine"
            ):
                d2f_stream.generate("hi", model=wrong)  # type: ignore[arg-type]


async def test_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere.*manifest\.json"):
        d2f_stream.generate("hi", model=tmp_path / "nowhere")


async def test_unknown_backend_lists_the_known(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'jax'; it must be one of auto, onnx, torch"):
        async with d2f_stream.load(folder, backend="jax"):
            pass


async def test_damaged_model_can_be_mended_and_asked_again(folder: Path) -> None:
    good = (folder / "script.json").read_text()
    (folder / "script.json").write_text("{")
    with pytest.raises(ModelDamaged):
        await d2f_stream.generate("hi", model=folder).result()
    (folder / "script.json").write_text(good)
    assert (await d2f_stream.generate("ho", model=folder).result()).text == "ho ho"


def test_process_ends_cleanly_with_a_session_open(folder: Path) -> None:
    code = f"""
import asyncio, d2f_stream
async def main():
    session = d2f_stream.generate("hi", model={str(folder)!r})
    print((await anext(session)).text)
    globals()["session"] = session
asyncio.run(main())
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello th\n", "")
