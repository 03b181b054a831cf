"""What backends do with their rows before and after the device. Mostly plain Python.

Which positions run through the model, which are predicted, how the answers become proposals.

Shapes: B rows, W the longest window, N masks over all rows.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from d2f_runtime.backends.base import StepRow
from d2f_runtime.decoding.window import NO_TOKEN, Proposals, Window
from d2f_runtime.models.facts import ModelInfo
from d2f_stream.core.params import Rank

__all__ = [
    "MAX_BRANCH_MASKS",
    "Floats",
    "Ints",
    "Masks",
    "Stored",
    "broken_rows",
    "check_rows",
    "divisor_of",
    "num_forwarded",
    "shifted_positions",
    "to_proposals",
]

MIN_TEMPERATURE = 1e-6
MAX_BRANCH_MASKS: Final = 1024  # of all branches of a step
_RANKS: tuple[Rank, ...] = ("confidence", "margin", "neg_entropy")  # the order of the answers

T = TypeVar("T")

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

Masks = Sequence[Sequence[int]]
"""For each row of a step the entries of its window to predict; see `Window.asked`."""


class Stored(Protocol):
    """What a slot holds, tokens."""

    capacity: int
    num_cached: int


def num_forwarded(window: Window, info: ModelInfo) -> int:
    """Return how many leading positions of a window must run through the model."""
    return window.num_forwarded(
        info.mask_id, shift_logits=info.shift_logits, drafts_in_place=info.drafts_in_place
    )


def shifted_positions(positions: Sequence[int], num_to_cache: int) -> list[int]:
    """Return what to ask a model with shifted logits for, so that drafts are predicted in place.

    A state predicts the position after its own, so that of a draft is asked for one further. The
    first draft is predicted by the cached row before it, as what is verified is.

    Args:
        positions: window positions to predict.
        num_to_cache: of the window.
    """
    return [at + (at > num_to_cache) for at in positions]


def check_rows(rows: Sequence[StepRow], slots: Sequence[Stored]) -> None:
    """Refuse rows that do not continue their slots; a mistake of the caller.

    Raises:
        ValueError: a window starts behind what is stored, ends past the capacity or lacks its
            uniforms, or two rows have the same slot.
    """
    for row, slot in zip(rows, slots, strict=True):
        window, held = row.window, slot.num_cached
        if window.start > held:
            raise ValueError(f"window starts at {window.start} but the slot holds {held} tokens")
        if window.stop > slot.capacity:
            raise ValueError(
                f"window ends at {window.stop} but the slot has room for {slot.capacity} tokens"
            )
        if row.temperature > 0 and (row.uniforms is None or len(row.uniforms) < window.num_entries):
            raise ValueError("a temperature above 0 needs one uniform number per entry")
    if len({row.slot for row in rows}) < len(rows):
        raise ValueError("two rows of a step have the same slot")


def divisor_of(row: StepRow) -> float:
    """Return the temperature that a row's logits are divided by; 0 is greedy.

    Below some value all are the same to fp32, but the quotient would overflow.
    """
    return max(row.temperature, MIN_TEMPERATURE) if row.temperature > 0 else 0.0


def broken_rows(masks: Masks, answers: npt.NDArray[np.floating]) -> list[int]:
    """Return the rows in which a confidence is no number, as the logits behind it were none.

    Args:
        masks: see Masks; N in all.
        answers: [4, N] token, confidence, margin, neg_entropy.
    """
    if math.isfinite(sum(answers[1].tolist())):  # which nearly always says all
        return []
    ends = np.cumsum([len(positions) for positions in masks])
    return sorted(
        set(np.searchsorted(ends, np.flatnonzero(np.isnan(answers[1])), "right").tolist())
    )


def to_proposals(
    rows: Sequence[StepRow],
    masks: Masks,
    answers: npt.NDArray[np.floating],
) -> list[Proposals]:
    """Spread the answers over the windows.

    Args:
        rows: B rows.
        masks: see Masks; N in all.
        answers: [4, N] token, confidence, margin, neg_entropy.
    """
    found, confidence = answers[:2].tolist()
    tokens = list(map(int, found))
    proposals: list[Proposals] = []
    first = 0
    for row, positions in zip(rows, masks, strict=True):
        part = slice(first, first + len(positions))
        first = part.stop
        width = row.window.num_entries
        rank = None
        if which := _RANKS.index(row.rank):
            rank = _spread(positions, answers[1 + which, part].tolist(), width, 0.0)
        proposals.append(
            Proposals(
                _spread(positions, tokens[part], width, NO_TOKEN),
                _spread(positions, confidence[part], width, 0.0),
                rank,
            )
        )
    return proposals


def _spread(positions: Sequence[int], values: list[T], width: int, nothing: T) -> list[T]:
    """Return [width] the values at their positions, ascending, and `nothing` elsewhere."""
    if not positions:
        return [nothing] * width
    before, last = positions[0], positions[-1]
    if last - before + 1 == len(positions):  # as in a verified answer's windows
        return [*[nothing] * before, *values, *[nothing] * (width - 1 - last)]
    spread = [nothing] * width
    for at, value in zip(positions, values, strict=True):
        spread[at] = value
    return spread
