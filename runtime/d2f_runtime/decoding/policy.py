"""Acceptance policies: which masked positions of one block take their proposed token in this step.

Pure functions of small host values. A policy sees one block at a time and knows nothing of windows,
caches or other blocks; when blocks join and become fully activated is the decoder's business. The
threshold rule is section 4 of the D2F paper (arXiv 2508.09192).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Protocol

from d2f_stream.core.params import GenerationParams

__all__ = ["AcceptancePolicy", "FixedCountPolicy", "ThresholdPolicy", "policy_of"]


class AcceptancePolicy(Protocol):
    """Chooses the positions of one block to accept. Implementations are pure."""

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        """Return the offsets to accept, ascending: a subset of `masked`.

        Args:
            masked: [M] offsets in the block that hold a mask, ascending; never empty.
            confidence: [block size] by offset, defined at `masked`.
            rank: [block size] by offset, higher is better; the confidence unless the request asked
                for another rank.
            fully_activated: the block must make progress, so the result must not be empty.
        """
        ...


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """Accept all proposals above a confidence; a fully activated block at least its best ones.

    The test is strict and always on the confidence; the rank only picks the forced proposals, the
    leftmost of equals. Where too few pass, the forced ones stand instead of them.

    Attributes:
        confidence_threshold: to be passed.
        least: how many a fully activated block must accept, as far as it has masks.
    """

    confidence_threshold: float
    least: int = 1

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        """Return what passes the threshold, or the best proposal where one is forced."""
        threshold = self.confidence_threshold
        passing = [offset for offset in masked if confidence[offset] > threshold]
        if not fully_activated or len(passing) >= min(self.least, len(masked)):
            return passing
        return _best(self.least, masked, rank)


@dataclass(frozen=True, slots=True)
class FixedCountPolicy:
    """Accept the `num_per_step` best proposals, whatever their confidence: the vanilla schedule.

    Same as low-confidence remasking with equal steps. Meant for one active block at a time; it does
    not tell semi-activated from fully activated blocks.
    """

    num_per_step: int

    def accept(
        self,
        masked: Sequence[int],
        confidence: Sequence[float],
        rank: Sequence[float],
        *,
        fully_activated: bool,
    ) -> Sequence[int]:
        """Return the best offsets by rank, at equal rank the leftmost first."""
        return _best(self.num_per_step, masked, rank)


def policy_of(params: GenerationParams, *, least: int = 1) -> AcceptancePolicy:
    """Return the rule that a request asks for.

    Args:
        params: of the request.
        least: what `steps_per_block` makes of a step; its share of the block.
    """
    if params.num_per_step:
        return FixedCountPolicy(params.num_per_step)
    return ThresholdPolicy(params.confidence_threshold, least)


def _best(number: int, masked: Sequence[int], rank: Sequence[float]) -> Sequence[int]:
    """Return the offsets of highest rank, ascending; of equals the leftmost."""
    if number == 1:
        return [max(masked, key=rank.__getitem__)]
    return sorted(nsmallest(number, masked, key=lambda offset: (-rank[offset], offset)))
