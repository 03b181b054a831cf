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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.kv_pool import MAX_SLOTS, Span
from d2f_runtime.backends.rows import shifted_positions
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
        num_branch_masks: masks of all branches.
        num_runs: runs of rows that see one run of keys each, or its beginning and their own.
        shift: whether a state predicts the position after its own.
        in_place: whether those of drafts predict their own all the same.
        mask_id: of the masks of branches.
    """

    placements: Sequence[Placement]
    num_rows: int
    num_masks: int
    num_branch_masks: int
    num_runs: int
    shift: bool
    in_place: bool
    mask_id: int

    @property
    def masks(self) -> list[list[int]]:
        """For each window the positions with a mask."""
        return [placement.masks for placement in self.placements]

    @property
    def geometry(self) -> tuple[object, ...]:
        """All that a step's integers depend on besides tokens and masks."""
        return tuple(
            [(placement[2:], _shape_of(placement.row.window)) for placement in self.placements]
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
        tokens: list[int] = []
        heads: list[int] = []
        for row, masks, first, num_rows, slot_index, _, _ in self.placements:
            window = row.window
            tokens += window.tokens[:num_rows]
            num_branch_masks = window.num_branch_masks
            own = masks[: len(masks) - num_branch_masks] if num_branch_masks else masks
            if self.in_place:
                own = shifted_positions(own, window.num_to_cache)
            before = len(heads)
            if shift := first - self.shift:
                heads += [shift + position for position in own]
            else:
                heads += own
            if self.shift and own and own[0] == 0:
                heads[before] = -1 - slot_index  # predicted by the slot's last cached state
            if num_branch_masks:
                begin = first + num_rows
                heads += range(begin, begin + num_branch_masks)
                tokens += [self.mask_id] * num_branch_masks
        size = layout.rows
        _write(flat, 0, size, tokens)
        _write(flat, 4 * size, size, heads)
        if not same_geometry:
            self._fill_geometry(flat, layout, per_tile)

    def _fill_geometry(self, flat: memoryview, layout: Layout, per_tile: int) -> None:
        """Write what depends on the geometry alone."""
        size = layout.rows
        positions, places, drafts = (flat[i * size : (i + 1) * size] for i in (1, 2, 5))
        visible: list[int] = []
        tiles: list[int] = []
        last: dict[int, int] = {}
        for row, _, first, num_rows, slot_index, offset, place in self.placements:
            window = row.window
            start, stop, end = window.start, window.start + num_rows, first + num_rows
            positions[first:end] = _counting(start, stop)
            places[first:end] = _counting(offset + start, offset + stop)
            clean = first + min(window.num_to_cache, num_rows)
            drafts[first:clean] = _many(0, clean - first)
            drafts[clean:end] = _many(1, end - clean)
            before = start
            for edge in window.block_stops:
                if edge - before == 1:
                    visible.append(edge)
                else:
                    visible += [edge] * (edge - before)
                before = edge
            del visible[end:]  # a placeholder has no row
            for at in range(first, end, per_tile):
                tiles += (at, min(per_tile, end - at), offset, NO_BORDER, 0)
            if window.branches:
                at = end
                for start, count in window.branches:
                    stop = start + count
                    visible += [stop] * count
                    elsewhere = place + at - end - start
                    for begin in range(at, at + count, per_tile):
                        num = min(per_tile, at + count - begin)
                        tiles += (begin, num, offset, start, elsewhere)
                    at += count
                positions[end:at] = array("i", window.branch_positions())
                places[end:at] = _counting(place, place + at - end)
                drafts[end:at] = _many(1, at - end)
            if window.num_to_cache:
                last[slot_index] = first + window.num_to_cache - 1
        used, rest = self.num_rows, size - self.num_rows
        positions[used:] = drafts[used:] = _many(0, rest)
        places[used:] = _many(-1, rest)
        _write(flat, 3 * size, size, visible)
        unused = layout.sessions - len(last)
        ends = [*last.values(), *[0] * unused, *last, *[NOBODY] * unused]
        tiles += [0] * (layout.tiles * TILE_FIELDS - len(tiles))
        flat[6 * size :] = array("i", tiles + ends)


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
    first = num_masks = num_branch_masks = num_runs = 0
    mask_id, shift, in_place = info.mask_id, info.shift_logits, info.drafts_in_place
    for row, span in zip(rows, spans, strict=True):
        window = row.window
        num_rows = window.num_forwarded(mask_id, shift_logits=shift, drafts_in_place=in_place)
        masks = window.asked(mask_id)
        place = scratch + num_branch_masks
        placements.append(Placement(row, masks, first, num_rows, span.index, span.offset, place))
        own = window.num_branch_masks
        first += num_rows + own
        num_masks += len(masks)
        num_branch_masks += own
        num_runs += 1 + len(window.branches)
    return StepPlan(
        placements, first, num_masks, num_branch_masks, num_runs, shift, in_place, mask_id
    )


MAX_COUNTED: Final = 1 << 14  # integers in a row that are at hand


def _numbers(values: Iterable[int]) -> memoryview:
    return memoryview(array("i", values))


_COUNTING = _numbers(range(MAX_COUNTED))
_MANY = {value: _numbers([value] * MAX_COUNTED) for value in (0, 1, -1)}


def _many(value: int, count: int) -> memoryview:
    return _MANY[value][:count] if count <= MAX_COUNTED else _numbers([value] * count)


def _counting(start: int, stop: int) -> memoryview:
    """Return the integers start..stop; a view where they are small."""
    return _COUNTING[start:stop] if stop <= MAX_COUNTED else _numbers(range(start, stop))


def _write(flat: memoryview, at: int, size: int, values: list[int]) -> None:
    """Write a field of `size` integers, the last of them zeros."""
    used = at + len(values)
    flat[at:used] = array("i", values)
    flat[used : at + size] = _many(0, at + size - used)
