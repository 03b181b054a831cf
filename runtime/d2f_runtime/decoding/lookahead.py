"""Lookahead: several fillings of the canvas tried in one step; the most promising one is kept.

LoPA (arXiv 2512.16229, section 3): beside the canvas as it is (the anchor), each branch also fills
one of the masked positions that were proposed with the highest confidence. All branches run in the
same step, and the one whose remaining masks are proposed with the highest mean confidence becomes
the canvas: it promises the most acceptances. Needs no training; costs one row per branch.

Pure; knows windows and proposals, not the decoder. The published runs use full attention, here the
attention is the model's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Protocol

from d2f_runtime.decoding.window import Proposals, Window

__all__ = ["BranchPolicy", "Candidate", "Lookahead"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that a branch fills in beyond what was accepted, at a canvas position."""

    position: int
    token: int
    confidence: float


class BranchPolicy(Protocol):
    """Chooses what branches try, and which of them wins. Implementations are pure."""

    def branches(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return what to try in the next step, a branch for each: a subset, possibly empty."""
        ...

    def choose(
        self, windows: Sequence[Window], proposals: Sequence[Proposals], mask_id: int
    ) -> int:
        """Return the index of the branch that wins; the anchor is 0."""
        ...


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Tries the `num_branches` most confident candidates; the highest mean confidence wins.

    At equal confidence the anchor wins, then the more confident candidate.
    """

    num_branches: int

    def branches(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Return the most confident candidates, at equal confidence the leftmost first."""
        return nlargest(self.num_branches, candidates, key=lambda c: (c.confidence, -c.position))

    def choose(
        self, windows: Sequence[Window], proposals: Sequence[Proposals], mask_id: int
    ) -> int:
        """Return the branch whose masks have the highest mean confidence."""
        means = [
            _mean_confidence(window, row, mask_id)
            for window, row in zip(windows, proposals, strict=True)
        ]
        return means.index(max(means))


def _mean_confidence(window: Window, row: Proposals, mask_id: int) -> float:
    confidence = [
        c for c, token in zip(row.confidence, window.tokens, strict=True) if token == mask_id
    ]
    return sum(confidence) / len(confidence)
