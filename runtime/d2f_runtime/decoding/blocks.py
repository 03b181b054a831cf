"""The blocks of one answer: the decoder's working state of a block, and what it tells of blocks.

Positions of `Block` are canvas positions; those of the values count from the answer's first.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Accepted", "Block", "BlockView", "Committed", "Edited", "SubBlocks"]


class Accepted(NamedTuple):  # several are made in each step: a third of a frozen dataclass's cost
    """A mask was replaced by a proposed token. `position` counts from the answer's first."""

    position: int
    token: int


class Edited(NamedTuple):
    """A token was replaced by a proposed one. `position` counts from the answer's first."""

    position: int
    token: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A block became final.

    Attributes:
        index: number of the block in the answer, from 0; without gaps.
        start: first position of the block in the answer; the previous block's `stop`.
        stop: one past its last position, or past the first EOS where that ends the answer.
        tokens: [stop - start] ids, an EOS included.
    """

    index: int
    start: int
    stop: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block that is not committed yet: answer positions and tokens, masks included."""

    index: int
    start: int
    stop: int
    tokens: tuple[int, ...]


@dataclass(slots=True)
class Block:
    """A block on the canvas that is not retired: which of its positions hold a mask.

    Attributes:
        index: number of the block in the answer, from 0.
        start: canvas position of its first token.
        stop: one past its last.
        masked: offsets from `start` that hold a mask, ascending.
        shares: how many each step must accept while the block is fully activated; () where the
            request does not say in how many steps.
        num_steps: how many steps were taken so.
        num_edit_steps: how many were begun without masks, where tokens may be edited.
        is_left: whether nothing of it may change any more, where tokens may be edited.
    """

    index: int
    start: int
    stop: int
    masked: list[int]
    shares: tuple[int, ...] = ()
    num_steps: int = 0
    num_edit_steps: int = 0
    is_left: bool = False

    @property
    def progress(self) -> float:
        """Share of the block that is filled, in [0, 1]."""
        size = self.stop - self.start
        return (size - len(self.masked)) / size

    @property
    def is_untouched(self) -> bool:
        """Whether all of it is masks."""
        return len(self.masked) == self.stop - self.start

    def next_share(self) -> int:
        """Begin a step; return how many it must accept."""
        self.num_steps += 1
        return self.shares[self.num_steps - 1] if self.num_steps <= len(self.shares) else 1

    def unmask(self, offsets: Sequence[int]) -> None:
        """Take the offsets off `masked`; all must be on it."""
        accepted = set(offsets)
        left = [offset for offset in self.masked if offset not in accepted]
        if len(left) != len(self.masked) - len(offsets):
            raise RuntimeError(f"offsets {list(offsets)} of block {self.index} are not all masked")
        self.masked = left


@dataclass(frozen=True, slots=True)
class SubBlocks:
    """The parts of every block, filled from left to right: Fast-dLLM v2's small blocks.

    As `generate` of its checkpoints does it (Efficient-Large-Model/Fast_dLLM_v2_7B, modeling.py).

    Attributes:
        size: positions of a part, counted from the block's start; 0 makes the block one part.
        first_alone: the first position is a part by itself; the position before it predicts it, so
            that the rest of the block need not be there yet.
    """

    size: int
    first_alone: bool

    def open(self, masked: Sequence[int]) -> Sequence[int]:
        """Return those of the offsets, ascending and at least one, that are of the first part."""
        if not self.size:
            return masked
        first = masked[0]
        stop = 1 if self.first_alone and first == 0 else first - first % self.size + self.size
        return masked[: bisect_left(masked, stop)]
