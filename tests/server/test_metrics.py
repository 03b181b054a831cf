import asyncio
from collections.abc import Callable
from itertools import count

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_stream.core.error_codes import error_from
from d2f_stream.core.errors import D2FError, Unauthorized
from d2f_stream.server.auth import Auth
from d2f_stream.server.metrics import Metrics
from d2f_stream.server.streams.gateway import Gateway
from d2f_stream.server.streams.registry import StreamRegistry
from d2f_stream.wire.protocol import Generate, Overrides
from fakes import engine_over
from openai_serving import TOKEN, chat, serving


def reader(metrics: Metrics) -> Callable[..., float | None]:
    def read(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"d2f_{name}", labels)

    return read


async def test_counts_after_a_run_are_exact() -> None:
    backend = ScriptedBackend("twelve bytes")  # two blocks of 8 in four steps
    async with serving(backend) as served, served.http() as http:
        for stream in (False, True):
            await http.post("/v1/chat/completions", json=chat(stream=stream))
        await http.post("/v1/chat/completions", json=chat(max_tokens=4))
        await http.post("/v1/chat/completions", json=chat(presence_penalty=0.5))
        await http.post("/v1/chat/completions", json=chat(temperature=-1))
        read = reader(served.metrics)
        assert read("requests_total", outcome="eos") == 2
        assert read("requests_total", outcome="length") == 1
        assert read("requests_total", outcome="refused") == 2
        assert read("errors_total", code="unsupported_parameter") == 1
        assert read("errors_total", code="invalid_params") == 1
        assert read("streams_active") == 0
        assert read("blocks_total") == 2 * 2 + 1
        assert read("prompt_tokens_total") == 3 * len("user: hi\nassistant: ")
        assert read("completion_tokens_total") == 2 * 13 + 4
        steps = read("stream_steps_total")
        assert steps == backend.num_steps
        assert read("step_duration_seconds_count") == backend.num_steps
        assert read("step_rows_sum") == backend.num_steps
        assert read("tokens_per_step_count") == 3
        assert read("time_to_first_block_seconds_count") == 3
        assert read("block_interval_seconds_count") == 2
        assert read("resumes_total") == 0


async def test_times_are_those_of_the_clock() -> None:
    ticks = count(step=0.25)  # read at the start, then at each block
    metrics = Metrics(clock=lambda: next(ticks))
    async with engine_over(ScriptedBackend("a" * 20)) as engine:
        registry = StreamRegistry(engine, observer=metrics)
        stream = await registry.generate(Generate(request_id="r" * 16, prompt="hi"), client="ann")
        assert [event async for event in stream.follow()]
        await registry.shut_down(1.0)
    read = reader(metrics)
    assert read("time_to_first_block_seconds_sum") == 0.25
    assert read("time_to_first_block_seconds_bucket", le="0.2") == 0
    assert read("time_to_first_block_seconds_bucket", le="0.5") == 1
    assert (read("block_interval_seconds_sum"), read("block_interval_seconds_count")) == (0.5, 2)


async def test_load_is_what_the_engine_does_now() -> None:
    gate = StepGate()
    backend = ScriptedBackend("a" * 20, gate=gate, capacity=200)
    metrics = Metrics()
    async with engine_over(backend) as engine:
        registry = StreamRegistry(engine, observer=metrics)
        gateway = Gateway(registry)
        metrics.watch(engine, gateway)
        read = reader(metrics)
        for number in (1, 2):
            await registry.generate(
                Generate(request_id=f"{number}" * 16, prompt="hi"), client="ann"
            )
        await asyncio.to_thread(gate.wait_entered)
        async with asyncio.timeout(10):  # the second prompt may still be read, off the loop
            while not read("sessions_waiting"):  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0)
        assert read("streams_active") == 2
        assert (read("sessions_running"), read("sessions_waiting")) == (1, 1)
        assert read("kv_tokens") == sum(slot.capacity for slot in backend.open_slots.values()) > 0
        assert read("connections") == 0
        gate.open()
        await registry.shut_down(10.0)
        assert (read("sessions_running"), read("kv_tokens"), read("streams_active")) == (0, 0, 0)


async def test_resumes_cancels_and_failures_are_counted() -> None:
    gate = StepGate()
    metrics = Metrics()
    backend = ScriptedBackend("a" * 40, gate=gate, errors={1: RuntimeError("gone")})
    async with engine_over(backend) as engine:
        registry = StreamRegistry(engine, observer=metrics)
        first, second = (Generate(request_id=f"{n}" * 16, prompt="hi") for n in "12")
        stream = await registry.generate(first, client="ann")
        await registry.generate(first, client="ann")
        await registry.resume(stream.id, client="ann")
        await registry.generate(second, client="ann")
        with pytest.raises(D2FError):
            await registry.generate(Generate(request_id="short", prompt="hi"), client="ann")
        await asyncio.to_thread(gate.wait_entered)
        stream.cancel()
        gate.open()
        await registry.shut_down(10.0)
    read = reader(metrics)
    assert read("resumes_total") == 2
    assert read("requests_total", outcome="cancelled") == 1
    assert read("requests_total", outcome="failed") == 1
    assert read("requests_total", outcome="refused") == 1
    assert read("errors_total", code="engine_failed") == 1
    assert read("errors_total", code="invalid_request") == 1


async def test_drafts_that_nobody_took_in_time_are_counted() -> None:
    metrics = Metrics()
    backend = ScriptedBackend("a" * 7, tokens_per_step=1)  # one block in eight steps, with its EOS
    async with engine_over(backend) as engine:
        registry = StreamRegistry(engine, observer=metrics)
        request = Generate(
            request_id="r" * 16, prompt="hi", params=Overrides(drafts=True, max_active_blocks=1)
        )
        stream = await registry.generate(request, client="ann")
        absent = stream.read(drafts=True, wake=lambda: None)
        uninterested = stream.read(wake=lambda: None)
        await registry.shut_down(10.0)
    assert stream.num_drafts_dropped == 8  # all masks at first, then after each step but the last
    assert reader(metrics)("dropped_drafts_total") == 8
    assert absent.next_event() == uninterested.next_event() == stream.log[0]


def test_codes_that_no_class_has_share_a_label() -> None:
    metrics = Metrics()
    for number in range(3):
        metrics.on_refused(error_from(f"surprise_{number}", "a newer server says so"))
    metrics.on_refused(Unauthorized("no token was given"))
    assert reader(metrics)("errors_total", code="error") == 3
    assert reader(metrics)("errors_total", code="unauthorized") == 1


async def test_page_is_readable_and_says_what_each_metric_means() -> None:
    auth = Auth({"ann": TOKEN})
    async with serving(ScriptedBackend("hello"), auth=auth) as served, served.http() as http:
        await http.post("/v1/chat/completions", json=chat(), headers={"X-Token": "secret-1"})
        plain = await http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'd2f_requests_total{outcome="refused"} 1.0' in plain.text
    assert 'd2f_errors_total{code="unauthorized"} 1.0' in plain.text
    names = {line.split()[2] for line in plain.text.splitlines() if line.startswith("# TYPE")}
    helps = {line.split()[2]: line for line in plain.text.splitlines() if line[:6] == "# HELP"}
    for name in names:
        assert name.startswith("d2f_")
        if not name.endswith("_created"):
            assert len(helps[name].split()) > 5
    assert "secret" not in plain.text


async def test_two_servers_of_one_process_count_apart() -> None:
    async with (
        serving(ScriptedBackend("a")) as one,
        serving(ScriptedBackend("b")) as other,
        one.http() as http,
    ):
        answer = await http.post("/v1/chat/completions", json=chat())
    assert answer.status_code == 200
    assert reader(one.metrics)("requests_total", outcome="eos") == 1
    assert reader(other.metrics)("requests_total", outcome="eos") is None
