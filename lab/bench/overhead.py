"""What a step costs beyond the model: policy, engine and hand-over, on a scripted backend.

The scripted stream keeps a window of about 128 positions in four or five blocks of 32, with a few
acceptances a step. The time of the backend call itself is measured inside it and taken off. It
waits a little without the interpreter's lock, as a call does whose work is on a device: what the
engine does meanwhile costs nothing.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.decoding.decoder import BlockDecoder
from d2f_runtime.decoding.window import Proposals
from d2f_runtime.engine.local import LocalEngine
from d2f_runtime.loaded_model import MODELS, ModelKey, ModelParts
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.params import GenerationParams
from lab.records import spread

__all__ = ["overhead"]

PARAMS = GenerationParams(max_new_tokens=2048, block_size=32, max_active_blocks=4)
PROMPT = "x" * 64
NUM_ANSWERS = 24
DEVICE_S = 0.0005  # of a step


class _TimedBackend:
    """A ScriptedBackend that notes when each step entered and left it."""

    def __init__(self) -> None:
        self._inner: Backend = ScriptedBackend(answers=lambda _: [65] * 4000, confidence=_schedule)
        self.entered: list[float] = []
        self.left: list[float] = []
        self.widths: list[int] = []

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
        self.entered.append(time.perf_counter())
        self.widths.append(len(rows[0].window.tokens))
        result = self._inner.step(rows)
        time.sleep(DEVICE_S)
        self.left.append(time.perf_counter())
        return result

    def copy_prefix(self, source: Slot, target: Slot, num_tokens: int) -> None:
        self._inner.copy_prefix(source, target, num_tokens)

    def close_slot(self, slot: Slot) -> None:
        self._inner.close_slot(slot)

    def close(self) -> None:
        self._inner.close()


async def overhead() -> dict[str, Any]:
    """Return microseconds per step: of the policy alone, and of everything around the backend."""
    backend = _TimedBackend()
    key = ModelKey(Path("overhead"), "scripted", "cpu", "none")
    lease = MODELS.lease(key, "overhead", lambda: ModelParts(backend, ByteCodec(), PARAMS))
    async with LocalEngine(lease) as engine:
        for _ in range(NUM_ANSWERS):
            await engine.generate(PROMPT).result()
    gaps = [
        1e6 * (entered - left)
        for entered, left in zip(backend.entered[1:], backend.left, strict=False)
    ]
    return {
        "policy_us_per_step": spread([us for _ in range(NUM_ANSWERS) for us in _policy_times()], 1),
        "around_backend_us_per_step": spread(gaps, 1),
        "window": spread([float(width) for width in backend.widths], 0),
    }


def _policy_times() -> list[float]:
    """Time next_window and apply of the same stream, in process, without engine or thread."""
    backend = ScriptedBackend(answers=lambda _: [65] * 4000, confidence=_schedule)
    decoder = BlockDecoder(
        prompt_tokens=ByteCodec().encode(PROMPT),
        params=PARAMS,
        mask_id=SCRIPTED_INFO.mask_id,
        eos_ids=SCRIPTED_INFO.eos_ids,
    )
    slot = backend.open_slot(4096)
    times: list[float] = []
    while True:
        started = time.perf_counter()
        window = decoder.next_window()
        middle = time.perf_counter()
        if window is None:
            return times
        (proposals,) = backend.step([StepRow(slot, window)])
        resumed = time.perf_counter()
        decoder.apply(proposals)
        times.append(1e6 * (middle - started + time.perf_counter() - resumed))


def _schedule(position: int, step: int) -> float:
    """About one position in ten is confident in any step, so four blocks stay in flight."""
    return 0.95 if (position * 7 + step * 3) % 23 < 2 else 0.3
