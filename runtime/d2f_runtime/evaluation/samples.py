"""Many prompts, one engine: answers side by side, and a record of what each of them took.

Knows engines and sessions, not tasks; so the same code answers for lm-evaluation-harness and for a
sweep over settings.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import msgspec

import d2f_stream
from d2f_runtime.engine.local import Limits
from d2f_runtime.engine.opening import open_engine
from d2f_stream.core.errors import InvalidRequest, PromptTooLong
from d2f_stream.core.params import GenerationParams
from d2f_stream.core.session import Engine, Prompt, Result

__all__ = ["Question", "Sample", "answer_all", "opened"]

NEVER_NARROWED = 2**31  # tokens that a step aims for: windows stay as the request has them

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, a string verbatim, and how it is to be answered."""

    prompt: Prompt
    params: GenerationParams


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What one answer took.

    Attributes:
        text: the answer, cut before the first stop string.
        reason: eos, length or stop; "refused" where the engine did not take the request.
        prompt_tokens: of the prompt.
        useful_tokens: of the answer up to its first EOS or stop string; None where the engine is
            too far away to count them.
        total_tokens: of the answer up to its first EOS, with what followed a stop string.
        steps: backend calls that the answer took part in.
        latency_ms: from admission to the end of the answer.
        first_block_ms: from admission to the first final block.
        error: why the request was refused.
    """

    text: str
    reason: str
    prompt_tokens: int = 0
    useful_tokens: int | None = None
    total_tokens: int = 0
    steps: int = 0
    latency_ms: float | None = None
    first_block_ms: float | None = None
    error: str | None = None

    @property
    def tokens_per_step(self) -> float | None:
        """Useful tokens per step; of all tokens where the useful ones are unknown."""
        tokens = self.total_tokens if self.useful_tokens is None else self.useful_tokens
        return round(tokens / self.steps, 4) if self.steps else None

    def to_dict(self) -> dict[str, object]:
        """Return the fields and `tokens_per_step`, times rounded to microseconds."""
        values = msgspec.structs.asdict(self)
        for name in ("latency_ms", "first_block_ms"):
            if values[name] is not None:
                values[name] = round(values[name], 3)
        return {**values, "tokens_per_step": self.tokens_per_step}


def opened(
    model: str | None,
    *,
    concurrency: int,
    adapter: str | None = None,
    backend: str = "auto",
    quantization: str = "auto",
    device: str = "auto",
    token: str | None = None,
) -> AbstractAsyncContextManager[Engine]:
    """Return an engine for `concurrency` answers at a time, to be entered.

    A local engine does not narrow its windows as sessions grow, so that no answer depends on those
    beside it; what a server does is its own choice.

    Args:
        model: a folder, GGUF file or hub id, None for the default model, or a server's address.
        concurrency: answers that share a step.
        adapter: a LoRA to merge into a local model.
        backend: of a local model.
        quantization: of a local model.
        device: of a local model.
        token: of a server that asks for one.

    Raises:
        InvalidRequest: a server is told how to run its model.
        D2FError: the model cannot be opened; most errors come on entering.
    """
    if model is not None and "://" in model:
        if (adapter, backend, quantization, device) != (None, "auto", "auto", "auto"):
            raise InvalidRequest(
                f"{model} is a server: adapter, backend, quantization and device are its own "
                "choice; leave them out"
            )
        return d2f_stream.connect(model, token=token)
    limits = Limits(max_sessions=concurrency, max_rows=concurrency, max_step_tokens=NEVER_NARROWED)
    return open_engine(
        model,
        adapter=adapter,
        backend=backend,
        quantization=quantization,
        device=device,
        limits=limits,
    )


async def answer_all(
    engine: Engine,
    questions: Sequence[Question],
    *,
    concurrency: int,
    decode: Decode | None = None,
    on_sample: Callable[[int, Sample], object] | None = None,
) -> list[Sample]:
    """Answer all questions, `concurrency` at a time; samples in order of the questions.

    A question that the engine refuses gives a sample that says so; anything else that goes wrong
    is raised and ends the other answers. Safe to cancel; all sessions end.

    Args:
        engine: open; its own limits may allow fewer answers at a time.
        questions: prompts and parameters.
        concurrency: sessions at a time.
        decode: of the engine's model, to count the tokens before a stop string.
        on_sample: called with number and sample as soon as each is there.

    Raises:
        D2FError: the engine failed or was closed.
    """
    samples: list[Sample | None] = [None] * len(questions)
    numbers = iter(range(len(questions)))

    async def work() -> None:
        for number in numbers:
            sample = await _answer(engine, questions[number], decode)
            samples[number] = sample
            if on_sample is not None:
                on_sample(number, sample)

    try:
        async with asyncio.TaskGroup() as group:
            for worker in range(min(concurrency, len(questions))):
                group.create_task(work(), name=f"d2f-evaluation-{worker}")
    except BaseExceptionGroup as failed:  # an engine that fails, fails all of them alike
        raise failed.exceptions[0] from None
    return [sample for sample in samples if sample is not None]


async def _answer(engine: Engine, question: Question, decode: Decode | None) -> Sample:
    try:
        async with engine.generate(question.prompt, question.params, raw=True) as session:
            result = await session.result()
    except PromptTooLong as error:
        room = getattr(error, "max_len", 0) - getattr(error, "num_prompt_tokens", 0)
        if not 0 < room < question.params.max_new_tokens:
            return Sample(text="", reason="refused", error=str(error))
        params = question.params.with_overrides({"max_new_tokens": room})
        return await _answer(engine, replace(question, params=params), decode)
    except InvalidRequest as error:
        return Sample(text="", reason="refused", error=str(error))
    return Sample(
        text=result.text,
        reason=result.reason,
        prompt_tokens=result.usage.prompt_tokens,
        useful_tokens=_num_useful(result, decode),
        total_tokens=result.usage.completion_tokens,
        steps=result.usage.steps,
        latency_ms=result.timings.total_ms,
        first_block_ms=result.timings.first_block_ms,
    )


def _num_useful(result: Result, decode: Decode | None) -> int | None:
    """Count the tokens that the text needs: all, unless a stop string cut it."""
    ids = result.token_ids
    if result.reason != "stop":
        return len(ids)
    if decode is None:
        return None
    low, high = 0, len(ids)
    while low < high:  # more tokens never decode to less text
        middle = (low + high) // 2
        if len(decode(ids[:middle])) < len(result.text):
            low = middle + 1
        else:
            high = middle
    return low
