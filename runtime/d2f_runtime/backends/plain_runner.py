"""PlainRunner: runs the rows of a step with torch alone, in padded forwards, on any device.

A step is one forward as a rule; rows of very different lengths, such as a piece of a prompt beside
windows of answers, go in several, so that little is padded. A forward makes one host-to-device copy
of what numpy packed (two when something is sampled) and one device-to-host copy of the answers. The
reference for the fast step.

Shapes: B rows, W longest window, P longest cache, N masks over all rows, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.backends.answers import answer_states, sampling_of
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.kv_pool import KVPool, PooledPast, Span, ranges
from d2f_runtime.backends.rows import Floats, Ints, Masks, num_forwarded, shifted_positions
from d2f_runtime.models.facts import ModelInfo
from d2f_runtime.models.masks import MaskRows, block_causal_mask, branched_mask
from d2f_runtime.models.transformer import Transformer

__all__ = ["PlainRunner", "groups"]

MAX_MASK_ELEMENTS = 1 << 26  # attention needs a few bytes for each; a longer prompt goes in pieces


@dataclass(frozen=True, slots=True)
class _Batch:
    """A step's rows as arrays; what crosses to the device is packed by `integers`."""

    tokens: Ints  # [B, W], padded with 0
    visible: Ints  # [B, W]
    start: Ints  # [B]
    offset: Ints  # [B] first pool place of each row's slot
    slot_index: Ints  # [B]
    masks: list[list[int]]  # for each row its window positions with a mask, N in all
    head_rows: Ints  # [N] rows of [last_hidden; hidden] (shifted) or hidden, flattened
    store_from: Ints  # [M] rows of flattened hidden to cache
    store_to: Ints  # [M] pool places
    last_from: Ints  # [S] flattened row of each storing slot's last cached position
    last_to: Ints  # [S]
    draft_rows: Ints  # [R] rows of flattened hidden that are not to be cached
    positions: Ints  # [B, W] on the canvas
    branch: Ints  # [B, W] number of the row's branch in its window, 0 outside

    def integers(self) -> list[Ints]:
        return [
            self.tokens, self.visible, self.start, self.offset, self.slot_index,
            self.head_rows, self.store_from, self.store_to, self.last_from, self.last_to,
            self.draft_rows, self.positions, self.branch,
        ]  # fmt: skip


def groups(lengths: Sequence[int], *, spare_rows: int) -> list[list[int]]:
    """Return which rows to run together, as numbers of the lengths.

    Those of similar lengths, so that the rows that run, padding included, and the forwards, each of
    which costs as much as `spare_rows` rows, are as few as can be.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cheapest: list[tuple[int, int]] = [(0, 0)]  # of the first n: what they cost, the last's begin
    for stop in range(1, len(order) + 1):
        width = lengths[order[stop - 1]]
        costs = (
            (cheapest[begin][0] + width * (stop - begin) + spare_rows, begin)
            for begin in range(stop)
        )
        cheapest.append(min(costs))
    found: list[list[int]] = []
    stop = len(order)
    while stop:
        begin = cheapest[stop][1]
        found.append(sorted(order[begin:stop]))
        stop = begin
    return found[::-1]


class PlainRunner:
    """Implements Runner with the plain `Transformer`.

    Args:
        model: on its device.
        pool: of the K/V, on the same device.
        info: of the model.
    """

    def __init__(self, model: Transformer, pool: KVPool, info: ModelInfo) -> None:
        self._model = model
        self._pool = pool
        self._info = info
        self._config = model.config
        self._device = pool.store.device
        self._drafts = model.draft is not None

    def warm_up(self) -> None:
        """Do nothing: torch compiles and captures nothing."""

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow], spans: Sequence[Span]) -> tuple[Masks, Floats]:
        """Run the rows and store their K/V; see Runner."""
        lengths = [num_forwarded(row.window, self._info) for row in rows]
        together = groups(lengths, spare_rows=self._info.spare_rows)
        if len(together) == 1:
            batch = _pack(rows, spans, self._info)
            return batch.masks, self._run(batch, *sampling_of(rows, batch.masks))
        masks: dict[int, Sequence[int]] = {}
        found: dict[int, Floats] = {}
        for group in together:
            own = [rows[index] for index in group]
            batch = _pack(own, [spans[index] for index in group], self._info)
            answers = self._run(batch, *sampling_of(own, batch.masks))
            ends = np.cumsum([len(each) for each in batch.masks])
            parts = np.split(answers, ends[:-1], axis=1)
            masks |= dict(zip(group, batch.masks, strict=True))
            found |= dict(zip(group, parts, strict=True))
        numbers = range(len(rows))
        return [masks[n] for n in numbers], np.concatenate([found[n] for n in numbers], axis=1)

    def _run(self, batch: _Batch, sampling: Floats | None, nucleus: bool) -> Floats:
        """Return [4, N] token, confidence, margin, neg_entropy; store K/V and last states."""
        parts = self._to_device(batch.integers())
        tokens, visible, start, offset, slot_index = parts[:5]
        head_rows, store_from, store_to, last_from, last_to, draft_rows = parts[5:11]
        positions, branch = parts[11:]
        last_hidden = self._pool.last_hidden[slot_index]
        if batch.tokens.shape[1]:
            past, num_cached = self._past(batch, offset)
            if batch.branch.any():
                mask: Tensor | MaskRows = branched_mask(
                    start, visible, num_cached, positions=positions, branch=branch
                )
            else:
                mask = self._mask(start, visible, num_cached)
            hidden, new = self._model(
                tokens, positions, mask, past, draft_rows=draft_rows if self._drafts else None
            )
            hidden = hidden.flatten(0, 1)  # [B W, D]
            if len(batch.store_from):
                fresh = torch.stack([x.flatten(0, 1) for pair in new for x in pair])
                self._pool.store[:, store_to] = fresh[:, store_from]
                self._pool.last_hidden[last_to] = hidden[last_from]
        else:
            hidden = last_hidden[:0]
        if not len(batch.head_rows):
            return np.zeros((4, 0), dtype=np.float32)
        states = torch.cat([last_hidden, hidden]) if self._config.shift_logits else hidden
        answers = answer_states(
            states[head_rows], self._model.logits, self._config, sampling=sampling, nucleus=nucleus
        )
        out: Floats = answers.cpu().numpy()
        return out

    def _mask(self, start: Tensor, visible: Tensor, num_cached: int) -> Tensor | MaskRows:
        num_rows, window = visible.shape
        per_query = num_rows * (num_cached + window)
        if window * per_query <= MAX_MASK_ELEMENTS:
            return block_causal_mask(start, visible, num_cached)
        return MaskRows(start, visible, num_cached, max(1, MAX_MASK_ELEMENTS // per_query))

    def _past(self, batch: _Batch, offset: Tensor) -> tuple[PooledPast, int]:
        longest = int(batch.start.max())
        if len(batch.start) == 1:
            first = int(batch.offset[0])
            return PooledPast(self._pool.store, slice(first, first + longest)), longest
        return PooledPast(self._pool.store, self._pool.places(offset, longest)), longest

    def _to_device(self, arrays: list[Ints]) -> list[Tensor]:
        packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
        flat = torch.split(packed.to(self._device), [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(flat, arrays, strict=True)]


def _pack(rows: Sequence[StepRow], spans: Sequence[Span], info: ModelInfo) -> _Batch:
    """Lay the rows out as padded arrays."""
    lengths = [num_forwarded(row.window, info) for row in rows]
    shape = (
        len(rows),
        max(
            length + row.window.num_branch_masks for row, length in zip(rows, lengths, strict=True)
        ),
    )
    tokens = np.zeros(shape, dtype=np.int64)
    start = np.array([row.window.start for row in rows], dtype=np.int64)
    # Padded rows see the whole window, so that no softmax is empty; nobody sees them.
    visible = np.repeat((start + shape[1])[:, None], shape[1], axis=1)
    positions = start[:, None] + np.arange(shape[1])
    branch = np.zeros(shape, dtype=np.int64)
    masks: list[list[int]] = []
    columns: list[int] = []  # of the entries that are asked; the row before predicts where shifted
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        window = row.window
        tokens[index, :length] = window.tokens[:length]
        visible[index, :length] = window.visible_until()[:length]
        masks.append(window.asked(info.mask_id))
        asked: Sequence[int] = masks[-1]
        if info.drafts_in_place:
            asked = shifted_positions(asked, window.num_to_cache)
        behind = length + 1 - len(window.tokens) if window.branches else 0
        columns += [at if at < len(window.tokens) else at + behind for at in asked]
        first = length
        for number, each in enumerate(window.branches, 1):
            own = slice(first, first + each.num_masks)
            tokens[index, own], branch[index, own] = info.mask_id, number
            positions[index, own] = each.start + np.arange(each.num_masks)
            visible[index, own] = each.start
            first = own.stop
    mask_rows = np.repeat(np.arange(len(rows)), [len(each) for each in masks])
    mask_columns = np.array(columns, dtype=np.int64)
    head_rows = mask_rows * shape[1] + mask_columns
    if info.shift_logits:  # position 0 is predicted by the slot's last cached state
        head_rows = np.where(mask_columns == 0, mask_rows, len(rows) + head_rows - 1)
    drafted = [
        (index * shape[1] + num, length + row.window.num_branch_masks - num)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True))
        if (num := row.window.num_to_cache) < length + row.window.num_branch_masks
    ]
    stored = list(_stored(rows, spans, shape[1]))
    return _Batch(
        tokens=tokens,
        visible=visible,
        start=start,
        offset=np.array([span.offset for span in spans], dtype=np.int64),
        slot_index=np.array([span.index for span in spans], dtype=np.int64),
        masks=masks,
        head_rows=head_rows,
        store_from=ranges([(first, num) for first, _, num, _ in stored]),
        store_to=ranges([(place, num) for _, place, num, _ in stored]),
        last_from=np.array([first + num - 1 for first, _, num, _ in stored], dtype=np.int64),
        last_to=np.array([index for _, _, _, index in stored], dtype=np.int64),
        draft_rows=ranges(drafted),
        positions=positions,
        branch=branch,
    )


def _stored(
    rows: Sequence[StepRow], spans: Sequence[Span], width: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first flattened row, pool place, length, slot index) for each row that stores."""
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if row.window.num_to_cache:
            place = span.offset + row.window.start
            yield index * width, place, row.window.num_to_cache, span.index
