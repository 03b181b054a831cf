"""Measures what steps take on the machine at hand: a curve for the simulation.

The least of several times, taken in turns, since the machine is shared: what a step takes when
nothing else holds it up.
"""

import time
from collections.abc import Sequence
from typing import Final

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.decoding.window import Window
from d2f_runtime.engine.opening import open_engine
from d2f_runtime.engine.step_cost import TimedStep
from d2f_runtime.loaded_model import LoadedModel

__all__ = ["measure_curve"]

CACHED: Final = 64
"""Tokens that each session holds before its window."""


async def measure_curve(
    model: str | None,
    *,
    adapter: str | None,
    shapes: Sequence[tuple[int, int]],
    block_size: int,
    turns: int,
) -> tuple[list[TimedStep], bool]:
    """Return a step of each shape: (rows in all, sessions), of blocks of masks.

    Also whether sessions run one after another there.
    """
    async with open_engine(model, adapter=adapter) as engine:
        loaded = engine._model  # the benchmark's own engine, between its requests
        timed = await loaded.device.call(_do_measure, loaded, shapes, block_size, turns)
        return timed, engine.info.one_by_one


def _do_measure(
    model: LoadedModel, shapes: Sequence[tuple[int, int]], block_size: int, turns: int
) -> list[TimedStep]:
    most = max(rows // sessions for rows, sessions in shapes)
    slots: list[Slot] = []
    for _ in range(max(sessions for _, sessions in shapes)):
        opened = model.do_open_slot(_Nobody(), CACHED + most + 1, lambda: None)
        assert opened is not None
        slots.append(opened.slot)
    prompt = Window(0, (5,) * CACHED, CACHED, tuple(range(1, CACHED + 1)))
    for slot in slots:
        model.do_step([StepRow(slot, prompt)])
    least = dict.fromkeys(shapes, float("inf"))
    for _ in range(turns):
        for shape in shapes:
            least[shape] = min(least[shape], _do_step(model, slots, *shape, block_size))
    model.do_close_slots(slots)
    return [TimedStep(rows, sessions, ms) for (rows, sessions), ms in least.items()]


def _do_step(
    model: LoadedModel, slots: Sequence[Slot], rows: int, sessions: int, block_size: int
) -> float:
    info = model.do_load().info
    each = rows // sessions
    masks = [info.mask_id] * each
    stops = [*range(CACHED + block_size, CACHED + each, block_size), CACHED + each]
    if each == 1:  # an autoregressive step: a token, and the mask that it predicts
        masks, stops = [5, info.mask_id], [CACHED + 1, CACHED + 2]
    window = Window(CACHED, tuple(masks), 1 if each == 1 else 0, tuple(stops))
    batch = [StepRow(slot, window) for slot in slots[:sessions]]
    began = time.perf_counter()
    model.do_step(batch)
    return 1e3 * (time.perf_counter() - began)


class _Nobody:
    def is_gone(self) -> bool:
        """Say that it stays."""
        return False
