"""Engines that are reached by calls: in this process, and by Serve's handles without a cluster."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import d2f_stream
from d2f_runtime.backends.scripted import SCRIPTED_INFO, ScriptedBackend, StepGate
from d2f_stream.cluster.calls import ReplicaLost
from d2f_stream.cluster.engines_url import EnginesUrl
from d2f_stream.cluster.handle_engine import HandleEngine
from d2f_stream.cluster.logging_handle_engine import LoggingHandleEngine
from d2f_stream.cluster.opening import checked
from d2f_stream.cluster.orders import read_facts
from d2f_stream.core.errors import (
    ConnectionLost,
    D2FError,
    EngineClosed,
    EngineFailed,
    InvalidParams,
    InvalidPrompt,
    InvalidRequest,
    PromptTooLong,
    UnsupportedModel,
)
from d2f_stream.core.events import (
    Block,
    Event,
    StreamFailed,
    StreamFinished,
    StreamNames,
    StreamStarted,
)
from fakes import ANSWER
from memory_network import until
from replicas import Replicas, replicas_over
from requirements import optional_module
from scripted_folder import write_model
from serving import check_whole

RAY = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its imports
NAMES = StreamNames("stream", "request", "ann")


def held(num_steps: int = 0) -> tuple[ScriptedBackend, StepGate]:
    gate = StepGate()
    gate.let_through(num_steps)
    return ScriptedBackend(ANSWER, gate=gate, tokens_per_step=2), gate


async def all_of(engine: HandleEngine, **overrides: object) -> list[Event]:
    session = engine.generate("prompt", names=NAMES, **overrides)  # type: ignore[arg-type]
    return [event async for event in session.events()]


async def test_answers_are_those_of_the_replica() -> None:
    backend = ScriptedBackend(ANSWER)
    async with replicas_over(backend) as (calls, _), HandleEngine(calls) as engine:
        assert engine.info.name == "scripted"
        assert engine.defaults.max_new_tokens == 128
        events = await all_of(engine)
        check_whole(events)
        first = events[0]
        assert isinstance(first, StreamStarted)
        assert (first.stream, first.request_id) == ("stream", "request")
        assert await engine.encode("abc") == [97, 98, 99]
        result = await engine.generate("prompt", stop=("whole",))
        assert result.text == ANSWER[: ANSWER.index("whole")]


async def test_answers_do_not_go_on_at_a_replica_of_another_model() -> None:
    first, gate = held(9)
    second = ScriptedBackend(ANSWER, info=replace(SCRIPTED_INFO, name="newer"))
    async with replicas_over(first, second) as (calls, workers), HandleEngine(calls) as engine:
        calls._next("")  # so that the first one is asked
        session = engine.generate("prompt", names=NAMES)
        for _ in range(3):
            await anext(session.events())
        calls.kill(workers[0])
        gate.open()
        *_, last = [event async for event in session.events()]
        assert isinstance(last, StreamFailed)
        assert last.code == "worker_lost"
        assert "begun by scripted" in last.message
        assert "where newer" in last.message
        check_whole(await all_of(engine))  # what is asked now is the new one's


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_killed_replica_s_answers_go_on_at_another_one(temperature: float) -> None:
    first, gate = held(9)
    second = ScriptedBackend(ANSWER)
    async with replicas_over(first, second) as (calls, workers), HandleEngine(calls) as engine:
        calls._next("")  # so that the first one is asked
        session = engine.generate("prompt", names=NAMES, temperature=temperature)
        events = [await anext(session.events()) for _ in range(3)]
        calls.kill(workers[0])
        gate.open()  # what is killed here still waits for its step
        events += [event async for event in session.events()]
        check_whole(events)
        assert second.num_opened == 1
        window = second.batches[0][0].window  # holds what was told, and was not asked again
        assert window.num_to_cache >= len(b"prompt") + 16


async def test_cancelled_answer_ends_as_cancelled_and_frees_its_slot() -> None:
    backend, gate = held(6)
    async with replicas_over(backend) as (calls, _), HandleEngine(calls) as engine:
        session = engine.generate("prompt", names=NAMES)
        assert isinstance(await anext(session.events()), StreamStarted)
        block = await anext(session)
        session.cancel()
        gate.open()
        *_, end = [event async for event in session.events()]
        assert isinstance(end, StreamFinished)
        assert end.reason == "cancelled"
        assert end.text_length == len(session.text) >= len(block.text)
        await until(lambda: not backend.open_slots)


async def test_what_is_refused_is_refused_as_by_the_engine_itself() -> None:
    async with replicas_over(ScriptedBackend(ANSWER)) as (calls, _):
        async with HandleEngine(calls) as engine:
            with pytest.raises(InvalidParams):
                engine.generate("prompt", temperature=-1)
            with pytest.raises(InvalidPrompt):
                await engine.generate("")
            with pytest.raises(InvalidPrompt):
                await engine.encode([300])
            with pytest.raises(PromptTooLong):
                engine.check_size([1] * 5000)
            with pytest.raises(InvalidRequest, match="lower max_new_tokens to 96") as refused:
                await engine.generate([1] * 4000, max_new_tokens=500)
            assert refused.value.code == "prompt_too_long"
            block = (await all_of(engine))[1]
            assert isinstance(block, Block)
            wrong = msgspec.structs.replace(block, seq=2)
            with pytest.raises(InvalidRequest, match="seq 2 but must have 1"):
                await engine.generate("prompt", committed=[wrong])
        with pytest.raises(EngineClosed):
            engine.generate("prompt")


async def test_failed_engine_s_answers_go_on_elsewhere_and_one_that_breaks_all_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2f_stream.cluster.attempts.BACKOFF_S", (0.0,))
    broken = ScriptedBackend(ANSWER, errors={4: RuntimeError("CUDA error")}, tokens_per_step=2)
    sound = ScriptedBackend(ANSWER)
    async with replicas_over(broken, sound) as (calls, workers), HandleEngine(calls) as engine:
        calls._next("")
        check_whole(await all_of(engine))
        with pytest.raises(EngineFailed):
            workers[0].check_health()
        workers[1].check_health()
    backends = [ScriptedBackend(ANSWER, errors={2: RuntimeError("poison")}) for _ in range(6)]
    async with replicas_over(*backends) as (calls, _), HandleEngine(calls) as engine:
        with pytest.raises(EngineFailed, match="poison"):
            await engine.generate("prompt").result()


async def test_versions_that_differ_and_logs_that_lack_are_told_at_once() -> None:
    async with replicas_over(ScriptedBackend(ANSWER)) as (calls, (worker,)):
        facts = msgspec.msgpack.decode(worker.facts())
        assert read_facts(worker.facts(), logs=False).card.name == "scripted"
        for version in ("0.0.9", "1.0"):
            other = msgspec.msgpack.encode({"version": version, "card": {"unknown": 1}})
            with pytest.raises(UnsupportedModel, match=f"{version} but this server is 0"):
                read_facts(other, logs=False)
        assert facts["version"] == d2f_stream.__version__
        with pytest.raises(UnsupportedModel, match="deployed without one"):
            await LoggingHandleEngine(calls).__aenter__()


async def test_cluster_without_a_working_engine_is_told_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2f_stream.cluster.handle_engine.CONNECT_S", 0.3)

    class NoReplicas(Replicas):
        async def call(self, method: str, data: bytes, *, conversation: str = "") -> bytes:
            raise ReplicaLost("the deployment is unavailable")

    with pytest.raises(ConnectionLost, match=r"within 0\.3 s: the deployment is unavailable; look"):
        await HandleEngine(NoReplicas([])).__aenter__()


def test_arguments_of_the_application_are_checked() -> None:
    assert checked({"max_sessions": "8", "may_narrow": "true"})["max_sessions"] == 8
    cases: list[tuple[dict[str, object], str]] = [
        ({"modell": "x"}, "modell"),
        ({"max_sessions": "many"}, "max_sessions"),
        ({"max_sessions": 0}, "max_sessions is 0 but must be"),
        ({"backend": "tensorrt"}, "backend"),
    ]
    for args, sentence in cases:
        with pytest.raises(D2FError, match=sentence):
            checked(args)


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("ray://", ("", "default")),
        ("ray:///d2f", ("", "d2f")),
        ("ray://10.0.0.1:6379", ("10.0.0.1:6379", "default")),
        ("ray://head:6379/d2f", ("head:6379", "d2f")),
        ("http://head:6379", None),
        ("ray://head/a/b", None),
    ],
)
def test_url_of_engines(url: str, parsed: tuple[str, str] | None) -> None:
    if parsed is not None:
        assert EnginesUrl.parse(url) == parsed
        return
    with pytest.raises(InvalidRequest, match="must be ray://"):
        EnginesUrl.parse(url)


@asynccontextmanager
async def local_serve(folder: Path, **args: object) -> AsyncIterator[HandleEngine]:
    """An engine over a handle of Serve's local testing mode."""
    optional_module("ray")
    from ray import serve

    from d2f_stream.cluster import app
    from d2f_stream.cluster.ray_calls import HandleCalls

    application = app({"model": str(folder), **args})
    handle = await asyncio.to_thread(serve.run, application, _local_testing_mode=True)
    async with HandleEngine(HandleCalls(handle)) as engine:
        yield engine


@RAY
async def test_serve_s_handles_carry_whole_answers(tmp_path: Path) -> None:
    async with local_serve(scripted(tmp_path)) as engine:
        assert engine.info.family == "scripted"
        results = await asyncio.gather(*(engine.generate(f"prompt {i}") for i in range(8)))
        assert {result.text for result in results} == {"abc"}
        with pytest.raises(InvalidPrompt):
            await engine.generate("")
        session = engine.generate("prompt")
        session.cancel()
        *_, end = [event async for event in session.events()]
        assert isinstance(end, StreamFinished)


def scripted(folder: Path) -> Path:
    write_model(folder)
    assert json.loads((folder / "script.json").read_text()) == {"answers": "abc"}
    return folder


@RAY
async def test_what_the_model_cannot_do_is_told_by_the_deployment(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"there is no|no model|not found"):
        async with local_serve(tmp_path / "missing"):
            pass
