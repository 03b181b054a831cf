"""Backends of every kind over one tiny model, and its own answers to hold them against."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from d2f_runtime.backends.base import Backend, Slot, StepRow
from d2f_runtime.decoding.window import Proposals, Window
from d2f_runtime.models.transformer import Transformer
from tiny_models import MASK, NUM_TOKENS, recompute

# fp32 sums in another order: rounding of logits of about 30 reaches confidences as 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Rig:
    """A backend under test and the model that it must agree with."""

    backend: Backend
    model: Transformer

    @property
    def shifted(self) -> bool:
        return self.model.config.shift_logits


NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


KINDS = [
    "torch",
    "onnx",
    "fast-references",  # the fast step's code over the kernels' plain references
    pytest.param("fast", marks=NEEDS_CUDA),
    pytest.param("fast-uncaptured", marks=NEEDS_CUDA),
]


@dataclass(frozen=True)
class Canvas:
    """Tokens, the edges of the attention blocks, and where the masks begin."""

    tokens: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def first_mask(self) -> int:
        return self.tokens.index(MASK) if MASK in self.tokens else len(self.tokens)

    def window(self, start: int, num_to_cache: int = 0, stop: int | None = None) -> Window:
        stop = len(self.tokens) if stop is None else stop
        return Window(
            start=start,
            tokens=self.tokens[start:stop],
            num_to_cache=num_to_cache,
            block_stops=tuple(s for s in self.stops if start < s <= stop),
        )

    def cached(self, start: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.tokens[:start], tuple(stop for stop in self.stops if stop <= start)


def canvas(seed: int, *, sizes: Sequence[int] = (11, 4, 4, 4), num_filled: int = 2) -> Canvas:
    """Blocks of the given sizes: the first `num_filled` are filled, the others hold masks."""
    rng = random.Random(seed)
    tokens: list[int] = []
    for index, size in enumerate(sizes):
        ids = [rng.randrange(4, NUM_TOKENS) for _ in range(size)]
        if index >= num_filled:
            ids = [MASK if rng.random() < 0.7 else token for token in ids]
            ids[rng.randrange(size)] = MASK
        tokens += ids
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return Canvas(tuple(tokens), tuple(stops))


def cache_up_to(backend: Backend, slot: Slot, case: Canvas, edges: Sequence[int]) -> None:
    """Cache the canvas piece by piece; the windows end with the piece."""
    for start, stop in pairwise((0, *edges)):
        backend.step([StepRow(slot, case.window(start, stop - start, stop))])


def expected(rig: Rig, case: Canvas, window: Window) -> Proposals:
    return recompute(rig.model, window, *case.cached(window.start))


def assert_same(found: Proposals, wanted: Proposals) -> None:
    assert list(found.tokens) == list(wanted.tokens)
    assert list(found.confidence) == pytest.approx(list(wanted.confidence), abs=TOLERANCE)
