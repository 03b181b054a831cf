"""Continuations: what a model writes after many prompts, side by side over one backend."""

from collections.abc import Sequence
from dataclasses import replace

from d2f_export.evaluate import Answer, decode_all
from d2f_runtime.backends.base import Backend, ModelInfo, Slot, StepRow
from d2f_runtime.noise import SamplingNoise
from d2f_runtime.window import Proposals
from d2f_stream.params import GenerationParams

__all__ = ["continue_all"]


def continue_all(
    backend: Backend, prompts: Sequence[Sequence[int]], params: GenerationParams, *, rows: int = 256
) -> list[Answer]:
    """Continue every prompt, greedily or with noise seeded by the prompt's number."""
    if params.temperature > 0:
        backend = _Sampling(backend, params)
    return decode_all(backend, prompts, params, rows=rows)


class _Sampling:
    """A backend whose rows draw their tokens: the noise of slot n is seeded by n."""

    def __init__(self, backend: Backend, params: GenerationParams) -> None:
        self._backend = backend
        self._params = params
        self._noise: dict[Slot, SamplingNoise] = {}
        self._num_steps: dict[Slot, int] = {}

    @property
    def info(self) -> ModelInfo:
        return self._backend.info

    def check(self, params: GenerationParams) -> None:
        self._backend.check(params)

    def warm_up(self) -> None:
        self._backend.warm_up()

    def open_slot(self, capacity: int, *, prefix: Slot | None = None) -> Slot:
        slot = self._backend.open_slot(capacity, prefix=prefix)
        self._noise[slot] = SamplingNoise(len(self._noise))
        self._num_steps[slot] = 0
        return slot

    def step(self, rows: Sequence[StepRow]) -> list[Proposals]:
        return self._backend.step([self._drawn(row) for row in rows])

    def close_slot(self, slot: Slot) -> None:
        self._backend.close_slot(slot)

    def close(self) -> None:
        self._backend.close()

    def _drawn(self, row: StepRow) -> StepRow:
        step = self._num_steps[row.slot]
        self._num_steps[row.slot] = step + 1
        return replace(
            row,
            temperature=self._params.temperature,
            top_p=self._params.top_p,
            uniforms=self._noise[row.slot].uniforms(row.window, step),
        )
