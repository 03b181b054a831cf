"""StepPlan: a step's rows as the integers that the fast step reads. Plain numpy.

The rows of all sessions stand one after the other. A slot's K/V lie in one span, so a window is
written where its K/V would be cached, whether or not they will be: caching is then only counting.
What must not be written there goes to scratch places: windows of further rows of the same slot
(lookahead branches), and what reaches beyond the slot's capacity.

Shapes: R rows, N masks, T tiles, S sessions.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from d2f_runtime.backends.base import ModelInfo, Slot, StepRow
from d2f_runtime.backends.kv_pool import MAX_SLOTS, Span
from d2f_runtime.backends.rows import Ints, num_forwarded
from d2f_runtime.kernels.attention import TILE_FIELDS
from d2f_runtime.window import Window

__all__ = ["Int32s", "Layout", "Placement", "StepPlan", "plan_step"]

Int32s = npt.NDArray[np.int32]

NO_BORDER: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields lie in one flat array, given static numbers of rows, tiles and sessions.

    In this order: tokens, positions, places, visible [R], see `StepTensors`; head [R], of which N
    are used, a row whose final state predicts a mask, or -1 - i for the last cached state of the
    slot with index i; tiles [T * TILE_FIELDS]; last_from and last_to [S], a row with a slot's last
    cached state and the index of the slot.
    """

    rows: int
    tiles: int
    sessions: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of each field."""
        return (*[self.rows] * 5, self.tiles * TILE_FIELDS, self.sessions, self.sessions)

    @property
    def size(self) -> int:
        """Length of the flat array."""
        return sum(self.sizes)


class Placement(NamedTuple):
    """One window of a step: which rows are its, and where its K/V lie.

    Attributes:
        row: with the window.
        tokens: of the window.
        masks: window positions with a mask.
        first: of its rows among all rows of the step.
        num_rows: of the window that run.
        slot_index: of its slot.
        offset: pool place of canvas position 0.
        border: canvas position from which K/V lie in scratch places.
        elsewhere: pool place that canvas position 0 would have there.
        is_first: of the windows of its slot, so that it writes what they share.
    """

    row: StepRow
    tokens: Int32s
    masks: Ints
    first: int
    num_rows: int
    slot_index: int
    offset: int
    border: int
    elsewhere: int
    is_first: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step does.

    Attributes:
        placements: of its windows.
        num_rows: that run through the layers.
        num_masks: rows that run through the head.
        num_scratch: scratch places in use.
        shift: whether a state predicts the position after its own.
    """

    placements: Sequence[Placement]
    num_rows: int
    num_masks: int
    num_scratch: int
    shift: bool

    @property
    def masks(self) -> list[Ints]:
        """For each window the positions with a mask."""
        return [placement.masks for placement in self.placements]

    @property
    def geometry(self) -> tuple[object, ...]:
        """All that a step's integers depend on besides tokens and masks."""
        return tuple(
            (placement[3:], _shape_of(placement.row.window)) for placement in self.placements
        )

    def fill(
        self, flat: Int32s, layout: Layout, per_tile: int, *, same_geometry: bool = False
    ) -> None:
        """Write the fields into the flat array, padded, with attention tiles of `per_tile` rows.

        Args:
            flat: the array.
            layout: of the array.
            per_tile: rows of an attention tile.
            same_geometry: what the array holds is of a step of this geometry.
        """
        # slices of an array, one after the other: each numpy call costs a microsecond of every step
        size = layout.rows
        tokens, positions, places, visible, head = (
            flat[i * size : (i + 1) * size] for i in range(5)
        )
        num_heads = 0
        for placement in self.placements:
            masks, first = placement.masks, placement.first
            tokens[first : first + placement.num_rows] = placement.tokens[: placement.num_rows]
            heads = head[num_heads : num_heads + len(masks)]
            num_heads += len(masks)
            np.add(masks, first - self.shift, out=heads, casting="same_kind")
            if self.shift and len(masks) and masks[0] == 0:
                heads[0] = -1 - placement.slot_index  # predicted by the slot's last cached state
        head[num_heads:] = 0
        if same_geometry:
            return
        tiles: list[int] = []
        last: dict[int, int] = {}
        for placement in self.placements:
            window, first = placement.row.window, placement.first
            start, stop = window.start, window.start + placement.num_rows
            rows = slice(first, first + placement.num_rows)
            positions[rows] = _counting(start, stop)
            _fill_places(places[rows], placement)
            before = start
            for edge in window.block_stops:
                visible[first + before - start : min(rows.stop, first + edge - start)] = edge
                before = edge
            for at in range(0, placement.num_rows, per_tile):
                count = min(per_tile, placement.num_rows - at)
                tiles += (first + at, count, placement.offset, placement.border)
                tiles.append(placement.elsewhere)
            if window.num_to_cache:
                last[placement.slot_index] = first + window.num_to_cache - 1
        for values, padding in ((tokens, 0), (positions, 0), (places, -1), (visible, 0)):
            values[self.num_rows :] = padding
        rest = flat[5 * size :]
        rest[: len(tiles)] = tiles
        rest[len(tiles) :] = 0
        rest = rest[layout.tiles * TILE_FIELDS :]
        rest[: len(last)] = list(last.values())
        rest[layout.sessions :] = MAX_SLOTS  # nobody's
        rest[layout.sessions : layout.sessions + len(last)] = list(last.keys())


def _shape_of(window: Window) -> tuple[object, ...]:
    return window.start, window.num_to_cache, window.block_stops


def plan_step(
    rows: Sequence[StepRow], spans: Sequence[Span], info: ModelInfo, *, scratch: int
) -> StepPlan:
    """Lay the rows out.

    Args:
        rows: checked; those of one slot agree up to what they cache.
        spans: of their slots.
        info: of the model.
        scratch: the first scratch place of the pool.
    """
    seen: set[Slot] = set()
    placements: list[Placement] = []
    first = num_masks = num_scratch = 0
    mask_id = info.mask_id
    for row, span in zip(rows, spans, strict=True):
        window = row.window
        num_rows = num_forwarded(window, info)
        is_first = row.slot not in seen
        seen.add(row.slot)
        border, elsewhere = NO_BORDER, 0
        if not is_first or window.start + num_rows > span.capacity:
            border = window.start + window.num_to_cache
            elsewhere = scratch + num_scratch - border
            num_scratch += num_rows - window.num_to_cache
        # several times as fast as np.array of a tuple
        tokens = np.frombuffer(array("i", window.tokens), dtype=np.int32)
        masks = np.flatnonzero(tokens == mask_id)
        placements.append(
            Placement(
                row, tokens, masks, first, num_rows, span.index, span.offset, border, elsewhere,
                is_first,
            )
        )  # fmt: skip
        first += num_rows
        num_masks += len(masks)
    return StepPlan(placements, first, num_masks, num_scratch, info.shift_logits)


def _fill_places(places: Int32s, placement: Placement) -> None:
    """Write where the K/V of a window go."""
    window = placement.row.window
    start, stop = window.start, window.start + placement.num_rows
    own = min(stop, placement.border) - start
    if placement.is_first:
        places[:own] = _counting(start, start + own) + placement.offset
    else:  # the slot's first window writes what they share
        places[:own] = -1
    if own < placement.num_rows:
        places[own:] = _counting(start + own, stop) + placement.elsewhere


_COUNTING = np.arange(1 << 12, dtype=np.int32)


def _counting(start: int, stop: int) -> Int32s:
    """Return the integers start..stop; usually a view."""
    if stop > len(_COUNTING):
        return np.arange(start, stop, dtype=np.int32)
    return _COUNTING[start:stop]
