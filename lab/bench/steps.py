"""How long one backend step takes, by the shape of its window.

Random tokens: the time of a step does not depend on them. The folders take turns, and each shape's
fastest turn counts: on shared cores whole seconds run at half speed.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from d2f_runtime.backends import choose_backend, open_backend
from d2f_runtime.backends.base import Backend, StepRow
from d2f_runtime.decoding.window import Window
from lab.records import spread

__all__ = ["SHAPES", "Shape", "compare_steps", "step_times"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A window: `cached` tokens before it, `filled` at its head, then blocks of masks."""

    cached: int
    filled: int
    masks: tuple[int, ...]


SHAPES = {
    "prompt of 60 and 16 masks": Shape(0, 60, (16,)),
    "1 mask": Shape(128, 0, (1,)),
    "16 masks": Shape(96, 0, (16,)),
    "16 filled, 16 masks": Shape(96, 16, (16,)),
    "16 filled, 64 masks": Shape(96, 16, (16, 16, 16, 16)),
    "32 filled, 32 masks": Shape(96, 32, (32,)),
}


def step_times(backend: Backend, *, repeats: int = 50) -> dict[str, dict[str, float]]:
    """Return milliseconds per step for each of SHAPES, one session."""
    rng = random.Random(0)
    size = backend.info.num_tokens
    tokens = [rng.randrange(size) for _ in range(256)]
    other = (backend.info.mask_id + 1) % size
    tokens = [other if token == backend.info.mask_id else token for token in tokens]
    return {name: _time(backend, shape, tokens, repeats) for name, shape in SHAPES.items()}


def compare_steps(
    folders: Sequence[Path], *, backend: str, device: str, repeats: int, turns: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Time every folder `turns` times, in turn, and keep the best turn of each shape."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for folder in list(folders) * turns:
        name = choose_backend(folder, backend, device=device)
        opened = open_backend(name, folder, device=device, quantization="auto")
        label = f"{folder.name}, {opened.info.quantization}, {opened.info.device}, {name}"
        times = step_times(opened, repeats=repeats)
        opened.close()
        best = results.setdefault(label, times)
        for shape, found in times.items():
            best[shape] = min(best[shape], found, key=lambda spread: spread["median"])
    return results


def _time(backend: Backend, shape: Shape, tokens: Sequence[int], repeats: int) -> dict[str, float]:
    start, stop = shape.cached, shape.cached + shape.filled
    slot = backend.open_slot(stop + sum(shape.masks))
    if start:
        prompt = Window(0, tuple(tokens[:start]), num_to_cache=start, block_stops=(start,))
        backend.step([StepRow(slot, prompt)])
    edges = [*([stop] if shape.filled else []), *accumulate(shape.masks, initial=stop)]
    window = Window(
        start=start,
        tokens=(*tokens[start:stop], *[backend.info.mask_id] * sum(shape.masks)),
        num_to_cache=0,  # what is cached would shorten the next window
        block_stops=tuple(sorted(set(edges) - {start})),
    )
    milliseconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        backend.step([StepRow(slot, window)])
        milliseconds.append((time.perf_counter() - began) * 1e3)
    backend.close_slot(slot)
    return spread(milliseconds[repeats // 10 :])
