"""Tokens per second of whole answers through the public API, several models or settings in one run.

In each round every contender in turn answers all prompts, so that a drift of the machine's speed
falls on all alike. Only one model is loaded at a time: the idle threads of another one's runtime
would take part of the cores. Useful tokens only: up to the first EOS.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import d2f_stream
from d2f_stream.core.params import ParamOverrides
from lab.records import spread

__all__ = ["Contender", "compare", "read_prompts"]


@dataclass(frozen=True, slots=True)
class Contender:
    """A model folder (None: the embedded model) under one setting."""

    label: str
    model: Path | None
    overrides: ParamOverrides


@dataclass(slots=True)
class _Samples:
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_block_ms: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def read_prompts(path: Path, number: int) -> list[dict[str, str]]:
    """Read JSON lines with `prompt` and, for counting right answers, `ending`."""
    lines = path.read_text(encoding="utf-8").splitlines()[:number]
    return [json.loads(line) for line in lines]


async def compare(
    contenders: Sequence[Contender],
    prompts: Sequence[dict[str, str]],
    *,
    repeats: int = 3,
    backend: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Answer all prompts `repeats` times with every contender, each time after one warm-up."""
    samples = {contender.label: _Samples() for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            async with d2f_stream.load(contender.model, backend=backend, device=device) as engine:
                await engine.generate(
                    prompts[0]["prompt"], raw=True, **contender.overrides
                ).result()
                for prompt in prompts:
                    await _answer(engine, contender, prompt, samples[contender.label])
    return {label: _summary(sample) for label, sample in samples.items()}


async def _answer(
    engine: d2f_stream.Engine, contender: Contender, prompt: dict[str, str], sample: _Samples
) -> None:
    started = time.perf_counter()
    result = await engine.generate(prompt["prompt"], raw=True, **contender.overrides).result()
    sample.seconds.append(time.perf_counter() - started)
    sample.tokens.append(result.usage.completion_tokens)
    sample.steps.append(result.usage.steps)
    if result.timings.first_block_ms is not None:
        sample.first_block_ms.append(result.timings.first_block_ms)
    if "ending" in prompt:
        sample.right.append(result.text.endswith(prompt["ending"]))


def _summary(sample: _Samples) -> dict[str, Any]:
    rates = [n / s for n, s in zip(sample.tokens, sample.seconds, strict=True)]
    step_ms = [1e3 * s / n for n, s in zip(sample.steps, sample.seconds, strict=True)]
    return {
        "tokens_per_s": spread(rates, 1),
        "tokens_per_s_overall": round(sum(sample.tokens) / sum(sample.seconds), 1),
        "tokens_per_step": round(sum(sample.tokens) / sum(sample.steps), 2),
        "ms_per_step": spread(step_ms),
        "first_block_ms": spread(sample.first_block_ms, 1),
        "answer_ms": spread([1e3 * s for s in sample.seconds], 1),
        "mean_tokens": round(statistics.mean(sample.tokens), 1),
        "right": round(statistics.mean(sample.right), 4) if sample.right else None,
    }
