"""Whole answers through an engine, on a model whose proposals are never confident by themselves.

After the real step the host replaces the confidences, so that a given number of masks passes the
threshold: random weights then decode as a trained model would. What that takes is part of the wall
times, and is told apart.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.params import GenerationParams
from lab.records import spread

__all__ = ["time_engine"]

BLOCK = 32
ANSWER = 512  # tokens, at most


def time_engine(backend: TorchBackend, rate: float, *, cached: int, steps: int) -> dict[str, Any]:
    """Time whole answers through an engine; a step lasts from one backend call to the next.

    Args:
        backend: stays open.
        rate: acceptances per step, on average.
        cached: tokens before the window of the mean step.
        steps: at least.
    """
    accepting = _Accepting(_Borrowed(backend), rate)
    info = backend.info
    is_ar = info.native_block_size == 1
    length = min(int(rate * steps) + 64, ANSWER, info.max_len // 2)
    # so that the mean step has that many tokens before it
    num_prompt = max(16, min(cached, info.max_len - length) - length // 2)
    block = 1 if is_ar else min(BLOCK, info.max_block_size)
    params = GenerationParams(max_new_tokens=length, block_size=block, max_active_blocks=4)
    prompt = [10 + i % 100 for i in range(num_prompt)]
    answers: list[float] = []
    first_blocks: list[float] = []
    breaks: list[tuple[int, int]] = []

    async def run() -> None:
        async with LocalEngine.over(accepting, _Silent()) as engine:
            await engine.generate(prompt, params).result()  # captures what is still missing
            accepting.calls.clear()
            while len(accepting.calls) < steps:
                first = len(accepting.calls)
                began = time.perf_counter()
                result = await engine.generate(prompt, params).result()
                answers.append(length / (time.perf_counter() - began))
                first_blocks.append(result.timings.first_block_ms or 0.0)
                breaks.append((first, len(accepting.calls)))

    asyncio.run(run())
    by_width: dict[int, list[float]] = defaultdict(list)
    walls: list[float] = []
    gaps: list[float] = []
    emulation: list[float] = []
    for first, stop in breaks:
        for i in range(first + 1, stop - 1):  # the first is the prompt's, the last has no end
            call, begins = accepting.calls[i], accepting.calls[i + 1].began
            walls.append((begins - call.began) * 1e3)
            gaps.append((begins - call.ended) * 1e3)
            emulation.append((call.ended - call.stepped) * 1e3)
            by_width[call.width].append(walls[-1])
    per_step = sum(length for _ in breaks) / sum(stop - first for first, stop in breaks)
    return {
        "tokens_per_second": spread(answers, 1),
        "decode_tokens_per_second": round(per_step * 1e3 * len(walls) / sum(walls), 1),
        "tokens_per_step": round(per_step, 2),
        "first_block_ms": spread(first_blocks),
        "wall_ms": spread(walls),
        "around_backend_ms": spread(gaps),
        "emulation_ms": spread(emulation),
        "wall_ms_by_width": {
            width: spread(times) for width, times in sorted(by_width.items()) if len(times) > 9
        },
    }


class _Borrowed:
    """A backend that its engine's end does not close."""

    def __init__(self, inner: TorchBackend) -> None:
        self.info = inner.info
        self.check = inner.check
        self.warm_up = inner.warm_up
        self.open_slot = inner.open_slot
        self.step = inner.step
        self.copy_prefix = inner.copy_prefix
        self.close_slot = inner.close_slot

    def close(self) -> None:
        """Leave the model as it is."""


class _Silent:
    """A codec for token ids whose text nobody reads."""

    special_tokens: Mapping[str, int] = MappingProxyType({})
    longest_token = 1
    chats = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return "." * len(ids)

    def render(self, messages: Sequence[Any]) -> str:
        return "".join(str(message) for message in messages)


class _Call(NamedTuple):
    """A step's width, and when it began, was done, and had its confidences replaced; seconds."""

    width: int
    began: float
    stepped: float
    ended: float


class _Accepting:
    """A backend whose proposals are confident at `rate` masks per step on average.

    Half of them are the leftmost, as decoding goes, the others anywhere, so that blocks overlap.
    """

    def __init__(self, inner: Backend, rate: float) -> None:
        self._inner = inner
        self._rate = rate
        self._credit = 0.0
        self._random = random.Random(0)
        self._mask_id = inner.info.mask_id
        self.calls: list[_Call] = []

    @property
    def info(self) -> ModelInfo:
        return self._inner.info

    def check(self, params: GenerationParams) -> None:
        self._inner.check(params)

    def warm_up(self) -> None:
        self._inner.warm_up()

    def open_slot(self, capacity: int) -> Slot:
        return self._inner.open_slot(capacity)

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        began = time.perf_counter()
        found = self._inner.step(rows)
        stepped = time.perf_counter()
        changed = [self._accept(row, each) for row, each in zip(rows, found, strict=True)]
        width = len(rows[0].window.tokens)
        self.calls.append(_Call(width, began, stepped, time.perf_counter()))
        return changed

    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        self._inner.copy_prefix(source, target, num_tokens)

    def close_slot(self, slot: Slot) -> None:
        self._inner.close_slot(slot)

    def close(self) -> None:
        self._inner.close()

    def _accept(self, row: StepRow, proposals: Proposals) -> Proposals:
        tokens, mask_id = row.window.tokens, self._mask_id
        num_masks = tokens.count(mask_id)
        self._credit += self._rate
        number = min(int(self._credit), num_masks)
        self._credit -= int(self._credit)
        confidence = [0.1] * len(tokens)
        position = -1
        left = -(-number // 2)
        for _ in range(left):
            position = tokens.index(mask_id, position + 1)
            confidence[position] = 0.99
        for _ in range(number - left if num_masks > left else 0):
            at = position
            while tokens[at] != mask_id or at <= position:
                at = int(self._random.random() * len(tokens))
            # some fall together: the next steps make up for them
            self._credit += confidence[at] > 0.5
            confidence[at] = 0.99
        return Proposals(proposals.tokens, confidence, proposals.rank)
