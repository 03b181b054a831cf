"""K/V of all slots of a torch backend: one tensor per layer and kind, a span of it for each slot.

Knows places and tensors, nothing of windows or models.

Shapes: L layers, T pool places (tokens), B rows of a step, P longest cache, KV key/value heads, hd
head size, D hidden size.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from d2f_runtime.backends.base import Slot
from d2f_runtime.backends.rows import Ints
from d2f_runtime.backends.spans import Spans
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.transformer import KeyValue
from d2f_stream.core.errors import OutOfCapacity

__all__ = ["MAX_SLOTS", "KVPool", "PooledPast", "Span", "free_bytes", "pool_tokens", "ranges"]

MAX_SLOTS = 1024
DEFAULT_BYTES: Final = 1 << 30
MAX_SHARE: Final = 0.5  # of the memory that is free once the weights are loaded
CROWD_SHARE: Final = 1 / 8  # of it, for the sessions that share a step


@dataclass(slots=True)
class Span:
    """Where a slot's K/V lie in the pool, and how many tokens of them are stored."""

    index: int  # row of last_hidden
    offset: int
    capacity: int
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class PooledPast:
    """The cached K/V of a step's rows; gathered layer by layer, when the model asks for them."""

    store: Tensor  # [2 L, T, KV, hd]
    places: Tensor | slice  # [B, P] int64; a slice where one row is a view

    def __getitem__(self, layer: int, /) -> KeyValue:
        keys, values = self.store[2 * layer], self.store[2 * layer + 1]
        if isinstance(self.places, slice):
            return keys[None, self.places], values[None, self.places]
        return keys[self.places], values[self.places]


class KVPool:
    """Storage for `max_tokens` tokens over all slots; also each slot's last cached final state.

    The last row of `last_hidden` is nobody's.

    Attributes:
        scratch: the first of the places behind those of the slots, which hold nothing longer than
            a step.
    """

    def __init__(
        self,
        config: TransformerConfig,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_scratch: int = 0,
    ) -> None:
        self.scratch = max_tokens
        places = max_tokens + num_scratch
        shape = (2 * config.num_layers, places, config.num_kv_heads, config.head_dim)
        # NOTE: zeros, not empty: masked columns are multiplied by weight 0, which NaN survives.
        self.store = _zeros(shape, device, dtype)
        last_shape = (MAX_SLOTS + 1, config.hidden_size)
        self.last_hidden = torch.zeros(last_shape, device=device, dtype=dtype)
        self._spans = Spans(max_tokens)
        self._free_indices = list(range(MAX_SLOTS))
        self._slots: dict[Slot, Span] = {}
        self._next_slot = 0

    def __getitem__(self, slot: Slot) -> Span:
        return self._slots[slot]

    def open(self, capacity: int) -> Slot:
        """Reserve a span.

        Raises:
            OutOfCapacity: no free span is long enough, or all slots are open.
        """
        offset = self._spans.reserve(capacity) if self._free_indices else None
        if offset is None:
            raise OutOfCapacity(
                f"no room for the K/V of {capacity} tokens: {self._spans.num_free} of "
                f"{self._spans.size} are free and {len(self._slots)} of {MAX_SLOTS} slots open"
            )
        span = Span(self._free_indices.pop(), offset, capacity)
        self.last_hidden[span.index] = 0
        slot = Slot(self._next_slot)
        self._next_slot += 1
        self._slots[slot] = span
        return slot

    def copy(self, source: Slot, target: Slot, num_tokens: int) -> None:
        """Store the first tokens of a slot in another one, too."""
        old, new = self._slots[source], self._slots[target]
        assert num_tokens <= min(old.num_cached, new.capacity), "more than is stored, or fits"
        stored = self.store[:, old.offset : old.offset + num_tokens]
        self.store[:, new.offset : new.offset + num_tokens] = stored  # spans do not overlap
        new.num_cached = num_tokens

    @torch.inference_mode()
    def blank(self, spans: Sequence[Span]) -> None:
        """Write zeros over all of some spans, which held what is no number; see the note above."""
        for span in spans:
            self.store[:, span.offset : span.offset + span.capacity] = 0
            self.last_hidden[span.index] = 0

    def close(self, slot: Slot) -> None:
        """Free a slot's span. Idempotent."""
        if span := self._slots.pop(slot, None):
            self._spans.free(span.offset, span.capacity)
            self._free_indices.append(span.index)

    def clear(self) -> None:
        """Free the tensors. Idempotent."""
        self.store = self.last_hidden = torch.empty(0)

    def places(self, offsets: Tensor, longest: int) -> Tensor:
        """Return [B, P] the places of each row's first `longest` tokens, from offsets [B]."""
        places = offsets[:, None] + torch.arange(longest, device=offsets.device)
        # beyond a short row's cache lie other slots' places: masked, but they must exist
        return places.clamp(max=self.store.shape[1] - 1)


def pool_tokens(
    max_positions: int, bytes_per_token: int, free: int | None, *, crowd: int = 0
) -> int:
    """Return how many tokens a pool has room for.

    Those of 1 GiB; where one request of the model's full length needs more than that, so many, but
    of the free memory no more than half; where a crowd does, so many, but no more than an eighth.

    Args:
        max_positions: of the model.
        bytes_per_token: of K/V.
        free: bytes of memory, see `free_bytes`; None is unknown, and bounds nothing.
        crowd: tokens of the sessions that are to share a step.
    """
    if free is not None:
        crowd = min(crowd, int(free * CROWD_SHARE) // bytes_per_token)
    at_least = max(crowd, DEFAULT_BYTES // bytes_per_token)
    affordable = max_positions if free is None else int(free * MAX_SHARE) // bytes_per_token
    return max(at_least, min(max_positions, affordable))


def free_bytes(device: torch.device) -> int | None:
    """Return what is free of a device's memory; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError):  # Linux has it
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on a CPU pages that nobody has written yet take no time and no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    # torch.zeros writes every byte; numpy leaves it to the system, but has no bfloat16
    blank = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(blank).view(dtype).view(shape)


def ranges(parts: Sequence[tuple[int, int]]) -> Ints:
    """Concatenate the integers first..first + num of every (first, num)."""
    if not parts:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(first, first + num, dtype=np.int64) for first, num in parts])
