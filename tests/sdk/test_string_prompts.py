"""A prompt that is a string: what an engine continues, and a user's turn for `generate`."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import msgspec
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from d2f_stream import sync
from d2f_stream.core.session import Engine
from d2f_stream.server.serve import Server
from d2f_stream.server.settings import ServeSettings
from d2f_stream.sync import _opened
from d2f_stream.wire.codec import JSON
from d2f_stream.wire.protocol import Generate
from fakes import params
from openai_serving import serving_engine

SCRIPT = {"user: hi\nassistant: ": "as a turn", "hi": "verbatim"}


class Chatting(ByteCodec):
    chats = True


def chatting_engine() -> LocalEngine:
    return LocalEngine.over(ScriptedBackend(SCRIPT), Chatting(), defaults=params())


@asynccontextmanager
async def here() -> AsyncIterator[Engine]:
    async with chatting_engine() as engine:
        yield engine


@asynccontextmanager
async def on_a_server() -> AsyncIterator[Engine]:
    async with (
        chatting_engine() as engine,
        Server(engine, ServeSettings(port=0)) as server,
        d2f_stream.connect(f"ws://127.0.0.1:{server.port}") as remote,
    ):
        yield remote


@contextmanager
def without_a_loop() -> Iterator[sync.Engine]:
    with _opened(on_a_server) as engine:
        yield engine


@pytest.mark.parametrize("opened", [here, on_a_server])
async def test_string_is_continued_by_an_engine_and_answered_by_generate(
    opened: Callable[[], AbstractAsyncContextManager[Engine]],
) -> None:
    async with opened() as engine:
        assert (await engine.generate("hi")).text == "verbatim"
        assert (await engine.generate("hi", raw=False)).text == "as a turn"
        assert (await d2f_stream.generate("hi", model=engine)).text == "as a turn"
        assert (await d2f_stream.generate("hi", model=engine, raw=True)).text == "verbatim"


def test_string_is_the_same_without_an_event_loop_too() -> None:
    with without_a_loop() as engine:
        assert engine.generate("hi").result().text == "verbatim"
        assert sync.generate("hi", model=engine).result().text == "as a turn"
        assert engine.generate("hi", raw=False).result().text == "as a turn"
        assert sync.generate("hi", model=engine, raw=True).result().text == "verbatim"


@pytest.mark.parametrize("raw", [False, True])
async def test_messages_and_ids_are_what_they_are(raw: bool) -> None:
    async with here() as engine:
        messages = [{"role": "user", "content": "hi"}]
        assert (await engine.generate(messages, raw=raw)).text == "as a turn"
        assert (await engine.generate([*b"hi"], raw=raw)).text == "verbatim"


async def test_string_is_verbatim_for_a_model_without_a_template() -> None:
    async with LocalEngine.over(ScriptedBackend(SCRIPT), ByteCodec()) as engine:
        assert (await engine.generate("hi")).text == "verbatim"


def test_client_of_before_the_field_is_taken_verbatim() -> None:
    sent = {"type": "generate", "request_id": "request-000000000001", "prompt": "hi"}
    operation = JSON.decode_operation(msgspec.json.encode(sent).decode())
    assert isinstance(operation, Generate)
    assert operation.raw


async def test_completions_are_verbatim() -> None:
    async with here() as engine, serving_engine(engine) as served:
        answer = await served.openai().completions.create(model="d2f", prompt="hi")
    assert answer.choices[0].text == "verbatim"
