"""StepPlan: a step's rows as the integers that the fast step reads. Plain Python.

All of this runs between two steps, while the device waits, on caches that the wait has left cold:
arrays and memory views take about half of what numpy's calls take there.

The rows of all sessions stand one after the other. A slot's K/V lie in one span, so a window is
written where its K/V would be cached, whether or not they will be: caching is then only counting.
The masks of branches stand behind their window's rows, and their K/V in a part of the pool that is
no slot's, as other rows of the step have the same canvas positions.

Shapes: R rows, N masks, T tiles, S sessions.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from struct import pack_into
from typing import Final, NamedTuple

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.kv_pool import MAX_SLOTS, Span
from d2f_runtime.backends.rows import num_forwarded, shifted_positions
from d2f_runtime.decoding.window import Window
from d2f_runtime.kernels.attention import TILE_FIELDS
from d2f_runtime.models.facts import ModelInfo

__all__ = ["Layout", "Placement", "StepPlan", "plan_step"]

NO_BORDER: Final = 2**31 - 1  # all K/V of a session lie in one span
NOBODY: Final = MAX_SLOTS  # the index of no slot


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the fields lie in one flat array, given static numbers of rows, tiles and sessions.

    In this order: tokens, positions, places, visible [R], see `StepTensors`; head [R], of which N
    are used, a row whose final state predicts a position that is asked, or -1 - i for the last
    cached state of the slot with index i; drafts [R], 1 for rows that are not to be cached; tiles
    [T * TILE_FIELDS]; last_from and last_to [S], a row with a slot's last cached state and the
    index of the slot.
    """

    rows: int
    tiles: int
    sessions: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of each field."""
        return (*[self.rows] * 6, self.tiles * TILE_FIELDS, self.sessions, self.sessions)

    @property
    def size(self) -> int:
        """Length of the flat array."""
        return sum(self.sizes)


class Placement(NamedTuple):
    """One window of a step: which rows are its, and where its K/V lie.

    Attributes:
        row: with the window.
        masks: entries of the window that are asked.
        first: of its rows among all rows of the step.
        num_rows: of the window's positions that run; the branches' follow.
        slot_index: of its slot.
        offset: pool place of canvas position 0.
        branches: pool place of the first branch's first mask.
    """

    row: StepRow
    masks: list[int]
    first: int
    num_rows: int
    slot_index: int
    offset: int
    branches: int


class StepPlan(NamedTuple):
    """What a step does.

    Attributes:
        placements: of its windows.
        num_rows: that run through the layers.
        num_masks: rows that run through the head.
        shift: whether a state predicts the position after its own.
        in_place: whether those of drafts predict their own all the same.
        mask_id: of the masks of branches.
    """

    placements: Sequence[Placement]
    num_rows: int
    num_masks: int
    shift: bool
    in_place: bool
    mask_id: int

    @property
    def num_branch_masks(self) -> int:
        """Masks of all branches."""
        return sum(placement.row.window.num_branch_masks for placement in self.placements)

    @property
    def num_runs(self) -> int:
        """Runs of rows that see one run of keys each, or its beginning and their own."""
        return sum(1 + len(placement.row.window.branches) for placement in self.placements)

    @property
    def masks(self) -> list[list[int]]:
        """For each window the positions with a mask."""
        return [placement.masks for placement in self.placements]

    @property
    def geometry(self) -> tuple[object, ...]:
        """All that a step's integers depend on besides tokens and masks."""
        return tuple(
            (placement[2:], _shape_of(placement.row.window)) for placement in self.placements
        )

    def fill(
        self, flat: memoryview, layout: Layout, per_tile: int, *, same_geometry: bool = False
    ) -> None:
        """Write the fields into the flat array, padded, with attention tiles of `per_tile` rows.

        Args:
            flat: the array, of C's int, 4 bytes each.
            layout: of the array.
            per_tile: rows of an attention tile.
            same_geometry: what the array holds is of a step of this geometry.
        """
        heads: list[int] = []
        for row, masks, first, num_rows, slot_index, _, _ in self.placements:
            window = row.window
            pack_into(f"{num_rows}i", flat, 4 * first, *window.tokens[:num_rows])
            if self.in_place:
                masks = shifted_positions(masks, window.num_to_cache)
            own = len(masks) - window.num_branch_masks
            if shift := first - self.shift:
                heads += [shift + position for position in masks[:own]]
            else:
                heads += masks[:own]
            if self.shift and own and masks[0] == 0:
                # predicted by the slot's last cached state
                heads[-own] = -1 - slot_index
            if window.branches:
                begin = first + num_rows
                end = begin + window.num_branch_masks
                heads += range(begin, end)
                pack_into(f"{end - begin}i", flat, 4 * begin, *[self.mask_id] * (end - begin))
        size = layout.rows
        heads += [0] * (size - len(heads))
        pack_into(f"{size}i", flat, 16 * size, *heads)
        if not same_geometry:
            self._fill_geometry(flat, layout, per_tile)

    def _fill_geometry(self, flat: memoryview, layout: Layout, per_tile: int) -> None:
        """Write what depends on the geometry alone, and all padding."""
        size = layout.rows
        fields = (flat[i * size : (i + 1) * size] for i in range(6))
        tokens, positions, places, visible, _, drafts = fields
        tiles: list[int] = []
        last: dict[int, int] = {}
        for placement in self.placements:
            window, first = placement.row.window, placement.first
            start, stop = window.start, window.start + placement.num_rows
            end = first + placement.num_rows
            positions[first:end] = _counting(start, stop)
            places[first:end] = _counting(placement.offset + start, placement.offset + stop)
            clean = min(window.num_to_cache, placement.num_rows)
            drafts[first : first + clean] = array("i", (0,)) * clean
            drafts[first + clean : end] = array("i", (1,)) * (placement.num_rows - clean)
            before = start
            for edge in window.block_stops:
                at, until = first + before - start, min(end, first + edge - start)
                visible[at:until] = array("i", (edge,)) * (until - at)
                before = edge
            for at in range(0, placement.num_rows, per_tile):
                count = min(per_tile, placement.num_rows - at)
                tiles += (first + at, count, placement.offset, NO_BORDER, 0)
            at, place = end, placement.branches
            for branch in window.branches:
                until, stop = at + branch.num_masks, branch.start + branch.num_masks
                positions[at:until] = _counting(branch.start, stop)
                places[at:until] = _counting(place, place + branch.num_masks)
                visible[at:until] = array("i", (stop,)) * branch.num_masks
                drafts[at:until] = array("i", (1,)) * branch.num_masks
                for row in range(at, until, per_tile):
                    count = min(per_tile, until - row)
                    elsewhere = place - branch.start
                    tiles += (row, count, placement.offset, branch.start, elsewhere)
                at, place = until, place + branch.num_masks
            if window.num_to_cache:
                last[placement.slot_index] = first + window.num_to_cache - 1
        rest = size - self.num_rows
        paddings = ((tokens, 0), (positions, 0), (places, -1), (visible, 0), (drafts, 0))
        for values, padding in paddings:
            values[self.num_rows :] = array("i", (padding,)) * rest
        tiles += [0] * (layout.tiles * TILE_FIELDS - len(tiles))
        unused = layout.sessions - len(last)
        last_from, last_to = [*last.values()] + [0] * unused, [*last] + [NOBODY] * unused
        flat[6 * size :] = array("i", tiles + last_from + last_to)


def _shape_of(window: Window) -> tuple[object, ...]:
    return window.start, window.num_to_cache, window.block_stops, window.branches


def plan_step(
    rows: Sequence[StepRow], spans: Sequence[Span], info: ModelInfo, *, scratch: int = 0
) -> StepPlan:
    """Lay the rows out.

    Args:
        rows: checked.
        spans: of their slots.
        info: of the model.
        scratch: the first pool place that is for the masks of branches.
    """
    placements: list[Placement] = []
    first = num_masks = 0
    mask_id = info.mask_id
    for row, span in zip(rows, spans, strict=True):
        window = row.window
        num_rows = num_forwarded(window, info)
        masks = window.asked(mask_id)
        placements.append(Placement(row, masks, first, num_rows, span.index, span.offset, scratch))
        scratch += window.num_branch_masks
        first += num_rows + window.num_branch_masks
        num_masks += len(masks)
    return StepPlan(placements, first, num_masks, info.shift_logits, info.drafts_in_place, mask_id)


_COUNTING = memoryview(array("i", range(1 << 14)))


def _counting(start: int, stop: int) -> memoryview:
    """Return the integers start..stop; a view where they are small."""
    if stop > len(_COUNTING):
        return memoryview(array("i", range(start, stop)))
    return _COUNTING[start:stop]
