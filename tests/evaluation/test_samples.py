import asyncio
from collections.abc import Sequence

import pytest

from d2f_runtime.backends.scripted import ScriptedBackend, StepGate
from d2f_runtime.evaluation.samples import Question, Sample, answer_all, opened
from d2f_stream.core.errors import EngineClosed, InvalidRequest
from fakes import engine_over, params

QUESTIONS = [Question(f"prompt {number}", params()) for number in range(7)]


def echo(prompt: Sequence[int]) -> list[int]:
    return list(b"It was " + bytes(prompt) + b".")


async def test_samples_come_in_the_order_of_the_questions() -> None:
    seen: list[int] = []
    async with engine_over(ScriptedBackend(answers=echo)) as engine:
        samples = await answer_all(
            engine, QUESTIONS, concurrency=3, on_sample=lambda number, _: seen.append(number)
        )
    assert [sample.text for sample in samples] == [f"It was prompt {n}." for n in range(7)]
    assert sorted(seen) == list(range(7))


async def test_no_more_than_so_many_answers_run_at_a_time() -> None:
    most = 0
    async with engine_over(ScriptedBackend(answers=echo)) as engine:

        def note(_: float, __: int) -> None:
            nonlocal most
            load = engine.current_load
            most = max(most, load.num_running + load.num_waiting)

        engine.on_step(note)
        await answer_all(engine, QUESTIONS, concurrency=3)
    assert most == 3


async def test_refused_question_is_a_sample_and_the_others_are_answered() -> None:
    questions = [QUESTIONS[0], Question("", params()), QUESTIONS[1]]
    async with engine_over(ScriptedBackend(answers=echo)) as engine:
        samples = await answer_all(engine, questions, concurrency=2)
    assert [sample.reason for sample in samples] == ["eos", "refused", "eos"]
    assert samples[1].error == "the prompt is empty"


async def test_engine_that_ends_is_one_error() -> None:
    gate = StepGate()
    async with engine_over(ScriptedBackend(answers=echo, gate=gate)) as engine:
        answering = asyncio.create_task(answer_all(engine, QUESTIONS, concurrency=2))
        await asyncio.sleep(0)
        engine.shut()
        gate.open()
        with pytest.raises(EngineClosed):
            await answering


def test_tokens_per_step_counts_the_useful_ones() -> None:
    sample = Sample(text="", reason="stop", useful_tokens=6, total_tokens=9, steps=3)
    assert sample.tokens_per_step == 2.0
    unknown = Sample(text="", reason="stop", total_tokens=9, steps=3)
    assert unknown.tokens_per_step == 3.0


def test_server_is_not_told_how_to_run_its_model() -> None:
    with pytest.raises(InvalidRequest, match="ws://host is a server"):
        opened("ws://host", concurrency=1, device="cuda")
