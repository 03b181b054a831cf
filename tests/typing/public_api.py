"""What a type checker sees of the public API: scripts/check reads it, nothing runs it."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import assert_type

import d2f_stream
from d2f_stream import (
    Block,
    Draft,
    Engine,
    Event,
    FinishReason,
    GenerationParams,
    Result,
    Session,
    StreamFailed,
    StreamFinished,
    StreamStarted,
    sync,
)


async def blocks_of_an_answer() -> None:
    session = d2f_stream.generate("How many?", max_new_tokens=32, stop=("\n",), temperature=0.5)
    assert_type(session, Session)
    async for block in session:
        assert_type(block, Block)
        assert_type(block.text, str)
        assert_type((block.start, block.stop), tuple[int, int])
    result = await session.result()
    assert_type(result, Result)
    assert_type(result.text, str)
    session.cancel()


async def answer_is_awaited() -> None:
    assert_type(await d2f_stream.generate("How many?"), Result)
    assert_type(await d2f_stream.generate("How many?").result(), Result)
    assert_type(await d2f_stream.generate("How many", raw=True), Result)


def answers_without_an_event_loop() -> None:
    for block in sync.generate("How many?", max_new_tokens=32, stop=["\n"]):
        assert_type(block, Block)
    assert_type(sync.generate("How many?").result(), Result)
    for event in sync.generate("How many?").events():
        assert_type(event, Event)
    with sync.load("model", device="cpu") as engine, sync.connect("http://host") as other:
        assert_type(engine, sync.Engine)
        assert_type(other.generate([1, 2]), sync.Session)
        assert_type(sync.generate("How many?", model=engine, raw=True), sync.Session)
        assert_type(other.generate("How many", raw=True), sync.Session)
    sync.generate("How many?", max_tokens=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sync.load(quantisation="fp8")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def stop_is_a_string_a_list_or_a_tuple() -> None:
    d2f_stream.generate("How many?", stop="\n", seed=-1, may_narrow=False)
    d2f_stream.generate("How many?", stop=["\n", "."])
    GenerationParams(stop="\n")
    GenerationParams(stop=["\n", "."])


async def events_are_a_union_that_can_be_matched() -> None:
    async with d2f_stream.generate([{"role": "user", "content": "How many?"}]) as session:
        async for event in session.events():
            assert_type(event, Event)
            match event:
                case StreamStarted():
                    assert_type(event.prompt_tokens, int)
                case Block() | Draft():
                    assert_type(event.text, str)
                case StreamFinished():
                    assert_type(event.reason, FinishReason)
                case StreamFailed():
                    assert_type(event.message, str)


async def engines_are_alike_wherever_the_model_is() -> None:
    local = d2f_stream.load(Path("model"), device="cpu", limits=d2f_stream.Limits(max_sessions=4))
    d2f_stream.load("wss://host", token="secret")
    remote = d2f_stream.connect("ws://127.0.0.1:8000", token="secret")
    assert_type(remote, AbstractAsyncContextManager[Engine])
    async with local as engine, remote as other:
        assert_type(engine, Engine)
        assert_type(engine.generate([1, 2, 3]), Session)
        assert_type(engine.generate("How many", raw=True), Session)
        assert_type(d2f_stream.generate("How many?", model=other), Session)
        assert_type(engine.info.max_len, int)
        assert_type(engine.defaults, GenerationParams)


def mistakes_are_found() -> None:
    d2f_stream.generate("How many?", max_tokens=32)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    d2f_stream.generate(3.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    d2f_stream.load(quantisation="fp8")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(GenerationParams().block_size, int)
