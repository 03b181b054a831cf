"""Engines seen from other threads and processes, and backends that cannot be closed."""

import asyncio
import os
import subprocess
import sys

import pytest

from d2f_runtime.backends.base import Slot
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine
from fakes import ANSWER, engine_over, texts

LONG = "a" * 4000
TIMEOUT_S = 20.0


async def test_session_of_a_running_loop_is_not_read_from_another_thread() -> None:
    async with engine_over(ScriptedBackend(LONG)) as engine:
        session = engine.generate("hi")
        await anext(session)
        with pytest.raises(RuntimeError, match="another event loop; read it there"):
            await asyncio.to_thread(lambda: asyncio.run(texts(session)))


async def test_session_may_be_cancelled_from_another_thread() -> None:
    backend = ScriptedBackend(LONG)
    async with engine_over(backend) as engine:
        session = engine.generate("hi", max_new_tokens=2000)
        await anext(session)
        await asyncio.to_thread(session.cancel)
        assert (await session.result()).reason == "cancelled"


FORK = """
import asyncio, gc, multiprocessing
import d2f_stream
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine

QUESTION = "Ben has 34 books. He buys 18 more books. How many books does he have now?"

async def ask():
    return (await d2f_stream.generate(QUESTION).result()).text

async def use(engine):
    async with asyncio.timeout(20):
        async with engine:
            return (await engine.generate("hi").result()).text

def in_child(function):
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(30)
    print(child.exitcode == 0, flush=True)
    if child.exitcode is None:
        child.kill()

engine = LocalEngine.over(ScriptedBackend("scripted"), ByteCodec())

def answer():
    print("52" in asyncio.run(ask()), flush=True)
    gc.collect()

def fail():
    try:
        asyncio.run(use(engine))
    except d2f_stream.EngineClosed as error:
        print("forked" in str(error), flush=True)

answer()
in_child(answer)
in_child(fail)
answer()
print(asyncio.run(use(engine)) == "scripted")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_gets_an_answer_or_an_error() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["True"] * 7


CLOSE_RAISES = """
import asyncio, logging, sys, time
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend
from d2f_runtime.engine.local import LocalEngine

class Stubborn(ScriptedBackend):
    def close(self):
        raise RuntimeError("the driver is gone")

async def ask(leaves):
    engine = LocalEngine.over(Stubborn("hello"), ByteCodec())
    if leaves:
        async with engine:
            return (await engine.generate("hi").result()).text
    return (await engine.generate("hi").result()).text

logging.getLogger("d2f_stream").addHandler(logging.StreamHandler(sys.stdout))
print(asyncio.run(ask(leaves=sys.argv[1] == "leaves")))
"""


@pytest.mark.parametrize("how", ["leaves", "exits"])
def test_backend_that_cannot_be_closed_holds_nobody_up(how: str) -> None:
    command = [sys.executable, "-c", CLOSE_RAISES, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hello" in done.stdout
    assert "the driver is gone" in done.stdout


async def test_slots_behind_one_that_cannot_be_closed_are_closed() -> None:
    class Stuck(ScriptedBackend):
        __slots__ = ()

        def close_slot(self, slot: Slot) -> None:
            ScriptedBackend.close_slot(self, slot)
            if slot == 0:
                raise RuntimeError("cannot free it")

    backend = Stuck(LONG)
    engine = LocalEngine.over(backend, ByteCodec())
    sessions = [engine.generate("hi") for _ in range(3)]
    await anext(sessions[0])
    async with asyncio.timeout(TIMEOUT_S):
        await engine.close()
    assert backend.open_slots == {}


async def test_observer_of_steps_can_be_taken_off() -> None:
    seen: list[str] = []
    async with engine_over(ScriptedBackend(ANSWER)) as engine:
        undo = engine.on_step(lambda _, __: seen.append("first"))
        engine.on_step(lambda _, __: seen.append("second"))
        await engine.generate("hi", max_new_tokens=4).result()
        assert seen == ["first", "second"]
        undo()
        undo()
        await engine.generate("hi", max_new_tokens=4).result()
    assert seen == ["first", "second", "second"]
