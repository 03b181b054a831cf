"""What backends do with their rows before and after the device. Plain Python and numpy.

Which positions run through the model, which are predicted, how the answers become proposals.

Shapes: B rows, W the longest window, N masks over all rows.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from d2f_runtime.backends.base import ModelInfo, StepRow
from d2f_runtime.window import NO_TOKEN, Proposals, Window

__all__ = ["Floats", "Ints", "check_row", "num_forwarded", "to_proposals"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def num_forwarded(window: Window, info: ModelInfo) -> int:
    """Return how many leading positions of a window must run through the model.

    A last attention block that is one mask is seen by nobody else, and a model with shifted logits
    predicts it from the position before: a placeholder, so that an autoregressive step has one row.
    """
    stops = window.block_stops
    last_start = stops[-2] if len(stops) > 1 else window.start
    is_placeholder = (
        info.shift_logits and stops[-1] - last_start == 1 and window.tokens[-1] == info.mask_id
    )
    return len(window.tokens) - int(is_placeholder)


def check_row(row: StepRow, *, num_cached: int, capacity: int) -> None:
    """Refuse a row that does not continue its slot; a mistake of the caller.

    Raises:
        ValueError: the window starts elsewhere, caches past the capacity, or lacks its uniforms.
    """
    window = row.window
    if window.start not in (0, num_cached):
        raise ValueError(f"window starts at {window.start} but the slot holds {num_cached} tokens")
    stop = window.start + window.num_to_cache
    if stop > capacity:
        raise ValueError(f"caching up to {stop} exceeds the slot's capacity of {capacity} tokens")
    if row.temperature > 0 and (row.uniforms is None or len(row.uniforms) < len(window.tokens)):
        raise ValueError("a temperature above 0 needs one uniform number per window position")


def to_proposals(
    rows: Sequence[StepRow], where: tuple[Ints, Ints], answers: npt.NDArray[np.float64 | np.float32]
) -> list[Proposals]:
    """Spread the answers at masks over the windows.

    Args:
        rows: B rows.
        where: [N] row and [N] window position of each mask.
        answers: [4, N] token, confidence, margin, neg_entropy.
    """
    shape = (len(rows), max(len(row.window.tokens) for row in rows))
    tokens = np.full(shape, NO_TOKEN, dtype=np.int64)
    tokens[where] = answers[0]
    scores = np.zeros((3, *shape), dtype=np.float64)
    scores[:, where[0], where[1]] = answers[1:]
    token_lists, score_lists = tokens.tolist(), scores.tolist()
    proposals = []
    for index, row in enumerate(rows):
        width = len(row.window.tokens)
        ranks = {"margin": score_lists[1], "neg_entropy": score_lists[2]}.get(row.rank)
        proposals.append(
            Proposals(
                tokens=token_lists[index][:width],
                confidence=score_lists[0][index][:width],
                rank=None if ranks is None else ranks[index][:width],
            )
        )
    return proposals
