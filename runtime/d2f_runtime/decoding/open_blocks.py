"""OpenBlocks: the blocks of an answer that are not retired, and when another one joins them.

Knows where blocks lie and which of their positions are masks; nothing of tokens, caches or EOS.
"""

from collections.abc import Iterator

from d2f_runtime.decoding.acceptance import Acceptance
from d2f_runtime.decoding.blocks import Block
from d2f_runtime.decoding.partition import Partition
from d2f_stream.core.params import GenerationParams

__all__ = ["OpenBlocks"]


class OpenBlocks:
    """From the first unfilled block to the end of the canvas.

    Args:
        params: of the request: when a block joins, and how many may be unfilled at once.
        partition: where blocks lie.
        acceptance: how many positions each step of a block must accept.
    """

    def __init__(
        self, params: GenerationParams, partition: Partition, acceptance: Acceptance
    ) -> None:
        self._params, self._partition, self._acceptance = params, partition, acceptance
        self._blocks: list[Block] = []
        self._part_stops: list[int] = []  # of parts of blocks that joined by themselves, uncached

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    @property
    def first(self) -> Block:
        """The first of them; there must be one."""
        return self._blocks[0]

    @property
    def last(self) -> Block:
        """The last of them; there must be one."""
        return self._blocks[-1]

    @property
    def first_mask(self) -> int | None:
        """Canvas position of the first mask; None without any."""
        masks = (block.start + block.masked[0] for block in self._blocks if block.masked)
        return next(masks, None)

    def lets_join(self, max_active_blocks: int | None) -> bool:
        """Whether another block may join.

        Args:
            max_active_blocks: bounds the unfilled ones as the request's own does; None does not.
        """
        if not self._blocks:
            return True  # whatever the bound: every window must hold a mask
        if self.last.progress < self._params.add_threshold:
            return False
        num_unfilled = sum(1 for block in self._blocks if block.masked)
        bounds = (self._params.max_active_blocks, max_active_blocks)
        return all(bound is None or num_unfilled < bound for bound in bounds)

    def join(self, length: int, part_size: int | None) -> int:
        """Add the block that begins where the canvas ends; return where it stops.

        Args:
            length: of the canvas, tokens.
            part_size: how much of the block joins, at most; None takes all of it.
        """
        index, start, stop = self._partition.block_at(length)  # on a grid it may hold prompt too
        if length > self._partition.num_prompt:
            start = length  # amid a block where a part of it has joined
        if part_size is not None and stop > length + part_size:
            stop = length + part_size
            self._part_stops.append(stop)
        masked = list(range(length - start, stop - start))
        due = self._acceptance.shares_of(self._partition.block_size, len(masked))
        self._blocks.append(Block(index, start, stop, masked, due))
        return stop

    def retire(self) -> Block:
        """Take the first one away."""
        return self._blocks.pop(0)

    def drop_after(self, block: Block) -> None:
        """Take away all that come after one of them."""
        del self._blocks[self._blocks.index(block) + 1 :]

    def note_cached(self, num_cached: int) -> None:
        """Forget the edges of parts that are cached, from the canvas's beginning on."""
        self._part_stops = [stop for stop in self._part_stops if stop > num_cached]

    def stops(self, start: int, stop: int, *, causal_until: int) -> tuple[int, ...]:
        """Return the attention block stops of a window; see Partition, as for its arguments."""
        edges = self._partition.stops(start, stop, causal_until=causal_until)
        if not self._part_stops:
            return edges
        return tuple(sorted({*edges, *(part for part in self._part_stops if part < stop)}))
