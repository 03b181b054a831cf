"""d2f_stream.sync: the same answers without an event loop, and nothing left behind."""

import asyncio
import inspect
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import d2f_stream
from d2f_runtime.backends.scripted import ByteCodec, ScriptedBackend, StepGate
from d2f_runtime.engine import LocalEngine
from d2f_stream import Block, EngineClosed, InvalidParams, InvalidRequest, StreamFinished, sync
from d2f_stream.background import shared_background

LONG = "x" * 2000
FIRST_BLOCK = 10  # steps, enough for it
MANY_STEPS = len(LONG) // 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    script = {"answers": {"hi": "hello there, friend", "ho": "ho ho"}, "tokens_per_step": 3}
    (tmp_path / "script.json").write_text(json.dumps(script))
    return tmp_path


@contextmanager
def engine_over(backend: ScriptedBackend) -> Iterator[sync.Engine]:
    with sync._opened(lambda: LocalEngine.over(backend, ByteCodec())) as engine:
        try:
            yield engine
        finally:
            if backend.gate is not None:
                backend.gate.open()  # the end waits for the step, also where a test fails
    assert not backend.open_slots


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT interrupt, which it does not in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_blocks_come_in_a_plain_loop(folder: Path) -> None:
    blocks = list(sync.generate("hi", model=folder))
    assert "".join(block.text for block in blocks) == "hello there, friend"
    assert len(blocks) > 1


def test_names_are_found_on_the_package() -> None:
    code = "import d2f_stream; print(d2f_stream.sync.generate.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "d2f_stream.sync\n"


def test_result_and_events_and_text(folder: Path) -> None:
    session = sync.generate("ho", model=folder, max_new_tokens=64)
    assert session.result().text == session.text == "ho ho"
    events = list(session.events())
    assert isinstance(events[-1], StreamFinished)
    assert "".join(event.text for event in events if isinstance(event, Block)) == "ho ho"


def test_load_opens_an_engine_for_several_threads(folder: Path) -> None:
    with sync.load(folder, device="cpu") as engine, ThreadPoolExecutor(8) as threads:
        assert engine.info.family == "scripted"
        assert engine.defaults.block_size == engine.info.native_block_size
        answers = list(threads.map(lambda _: engine.generate("hi").result().text, range(16)))
        shared = sync.generate("hi", model=engine).result().text
    assert {*answers, shared} == {"hello there, friend"}
    with pytest.raises(EngineClosed):
        engine.generate("hi")


def test_arguments_are_those_of_the_other_functions() -> None:
    parameters = inspect.signature(d2f_stream.load).parameters
    assert set(parameters) - {"model"} == set(sync.LoadOptions.__annotations__)
    theirs = inspect.signature(d2f_stream.connect).parameters
    assert set(theirs) == set(inspect.signature(sync.connect).parameters)


def test_errors_are_raised_where_the_call_stands(folder: Path) -> None:
    with pytest.raises(InvalidParams, match="block_size"):
        sync.generate("hi", model=folder, block_size=1000).result()
    with pytest.raises(InvalidRequest, match="http, https"):
        sync.generate("hi", model="ftp://host")
    with pytest.raises(InvalidRequest, match="wss://host"), sync.connect("ws://"):
        pass


def test_leaving_the_loop_ends_the_answer() -> None:
    gate = StepGate()
    backend = ScriptedBackend({"hi": LONG, "ho": "ho"}, gate=gate)
    with engine_over(backend) as engine:
        gate.let_through(FIRST_BLOCK)
        for _ in engine.generate("hi", max_new_tokens=len(LONG)):
            break
        gate.open()
        assert engine.generate("ho").result().text == "ho"
        assert len(backend.batches) < MANY_STEPS / 10


def test_leaving_the_context_waits_until_the_slot_is_free() -> None:
    gate = StepGate()
    backend = ScriptedBackend(LONG, gate=gate)
    with engine_over(backend) as engine:
        with engine.generate("hi", max_new_tokens=len(LONG)) as session:
            gate.let_through(FIRST_BLOCK)
            next(session)
            gate.open()
        assert len(backend.batches) < MANY_STEPS / 10
        assert session.result().reason == "cancelled"


def test_interrupted_read_ends_the_answer() -> None:
    gate = StepGate()
    backend = ScriptedBackend({"hi": LONG, "ho": "ho"}, gate=gate)
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        gate.wait_entered(FIRST_BLOCK + 1)
        signal.pthread_kill(main, signal.SIGINT)

    def read(engine: sync.Engine) -> None:
        for _ in engine.generate("hi", max_new_tokens=len(LONG)):
            pass

    with engine_over(backend) as engine, interruptible():
        gate.let_through(FIRST_BLOCK)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            read(engine)
        thread.join()
        gate.open()
        assert engine.generate("ho").result().text == "ho"
        assert len(backend.batches) < MANY_STEPS / 10


async def test_it_works_where_a_loop_runs_and_refuses_its_own(folder: Path) -> None:
    assert sync.generate("ho", model=folder).result().text == "ho ho"
    background = shared_background()

    async def within() -> None:
        sync.generate("ho", model=folder)

    with pytest.raises(RuntimeError, match="would wait for itself"):
        background.run(within())


@pytest.mark.parametrize("mode", ["held", "amid a loop"])
def test_process_ends_cleanly_amid_an_answer(folder: Path, mode: str) -> None:
    code = f"""
from d2f_stream import sync
if {mode == "held"}:
    session = sync.generate("hi", model={str(folder)!r})
    print(next(session).text)
else:
    for block in sync.generate("hi", model={str(folder)!r}):
        print(block.text)
        raise SystemExit
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello th\n", "")


def _ask_in_a_child(folder: Path, inherited: sync.Session) -> None:
    try:
        next(inherited)
    except EngineClosed as error:
        told = "forked" in str(error)
    else:
        told = False
    text = sync.generate("ho", model=folder).result().text
    os._exit(0 if told and text == "ho ho" else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_begins_anew(folder: Path) -> None:
    session = sync.generate("hi", model=folder)
    next(session)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_ask_in_a_child, args=(folder, session))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert session.result().text == "hello there, friend"


async def test_session_can_be_awaited(folder: Path) -> None:
    result = await d2f_stream.generate("ho", model=folder)
    assert (result.text, result.reason) == ("ho ho", "eos")
    sessions = [d2f_stream.generate("ho", model=folder) for _ in range(2)]
    assert [result.text for result in await asyncio.gather(*sessions)] == ["ho ho"] * 2
    waited = asyncio.wait_for(d2f_stream.generate("hi", model=folder), 60)
    assert (await waited).text == "hello there, friend"


def test_call_without_an_event_loop_says_what_to_do(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"asyncio\.run\(main\(\)\).*d2f_stream\.sync"):
        d2f_stream.generate("hi", model=folder)
