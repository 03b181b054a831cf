"""Times a model's steps before anybody waits for them, as the scheduler needs to know.

On the model's device thread: real windows of a made-up prompt, of one session and of several. What
a device compiles or captures for such shapes is done by then, too.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

from d2f_runtime.backends.base import Slot
from d2f_runtime.decoding.width import Width
from d2f_runtime.engine.denoiser import Denoiser
from d2f_runtime.engine.request_kind import RequestKind, least_part
from d2f_runtime.engine.step_cost import TimedStep
from d2f_runtime.loaded_model import LoadedModel, SlotOwner
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.errors import OutOfCapacity
from d2f_stream.core.params import GenerationParams

__all__ = ["do_time_steps"]

logger = logging.getLogger("d2f_stream.engine")

NUM_STEPS: Final = 4
"""Steps of each shape; the first one holds the prompt."""
MAX_BLOCKS: Final = 8
"""Blocks of the answers, so that a pipeline can fill."""
SESSIONS: Final = (1, 4, 16, 64)
LONGEST_S: Final = 3.0
"""Seconds after which nothing more is timed; on a device that compiles, ten times that."""


def do_time_steps(
    model: LoadedModel, owner: SlotOwner, params: GenerationParams, *, max_sessions: int
) -> list[TimedStep]:
    """Run some steps and return what they took. Blocks; runs on the device thread.

    Args:
        model: loaded.
        owner: of the slots, all of which are closed again.
        params: of the requests to come.
        max_sessions: that may share a step.

    Raises:
        Exception: whatever the backend raises; the model is unusable then, as after any step.
    """
    info = model.do_load().info
    least = least_part(info, params.block_size)
    kind = RequestKind.of(params, params.block_size, least_part=least)
    if len(kind.widths) == 1:
        return []  # there is nothing to choose
    compiles = info.device != "cpu"  # in the first step of each shape
    timed: list[TimedStep] = []
    began = time.perf_counter()
    longest_s = 10 * LONGEST_S if compiles else LONGEST_S
    for num_sessions, width in _shapes(kind, 1 if info.one_by_one else max_sessions):
        for is_timed in (False, True) if compiles else (True,):
            if time.perf_counter() - began < longest_s:
                steps = _do_round(model, owner, params, width, num_sessions)
                timed += steps if is_timed else []
    took_s = time.perf_counter() - began
    most = max((step.sessions for step in timed), default=0)
    logger.info("timed %s steps of up to %s sessions in %.1f s", len(timed), most, took_s)
    return timed


def _shapes(kind: RequestKind, max_sessions: int) -> Iterator[tuple[int, Width]]:
    """Yield how many sessions and of which width, cheapest first."""
    for num_sessions in SESSIONS:
        if num_sessions <= max_sessions:
            narrowest, *_, widest = kind.widths
            widths = kind.widths if num_sessions == 1 else (narrowest, widest)
            yield from ((num_sessions, width) for width in widths)


def _do_round(
    model: LoadedModel,
    owner: SlotOwner,
    params: GenerationParams,
    width: Width,
    num_sessions: int,
) -> list[TimedStep]:
    """Return the steps of one width; () where there is no room for so many sessions."""
    info = model.do_load().info
    length = min(MAX_BLOCKS * params.block_size, info.max_len - 1)
    asked = params.with_overrides({"max_new_tokens": length, "tail": "cut", "seed": 0})
    slots: list[Slot] = []
    try:
        for _ in range(num_sessions):
            try:
                opened = model.do_open_slot(owner, 1 + length, lambda: None)
            except OutOfCapacity:  # not even alone
                return []
            if opened is None:
                return []
            slots.append(opened.slot)
        return _do_steps(model, slots, asked, width)
    finally:
        model.do_close_slots(slots)


def _do_steps(
    model: LoadedModel, slots: Sequence[Slot], params: GenerationParams, width: Width
) -> list[TimedStep]:
    info = model.do_load().info

    def begun() -> Denoiser:
        return Denoiser(prompt_tokens=[_plain_token(info)], params=params, info=info)

    streams = [begun() for _ in slots]
    timed: list[TimedStep] = []
    for number in range(NUM_STEPS):
        began = time.perf_counter()
        rows = [stream.row(slot, width) for slot, stream in zip(slots, streams, strict=True)]
        answers = model.do_step(rows)
        progress = [stream.apply(each) for stream, each in zip(streams, answers, strict=True)]
        wall_ms = 1e3 * (time.perf_counter() - began)
        if number:
            each = [made.num_rows for made in progress]
            timed.append(TimedStep(sum(each), len(rows), wall_ms, each))
        streams = [
            begun() if each.reason else stream
            for stream, each in zip(streams, progress, strict=True)
        ]
    return timed


def _plain_token(info: ModelInfo) -> int:
    """Return the first id that stands for some text."""
    special = {info.mask_id, *info.eos_ids}
    return next(token for token in range(info.num_tokens) if token not in special)
