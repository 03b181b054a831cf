"""DraftPlan: behind which of its filled positions a step drafts. Pure arithmetic on probabilities.

A step costs its weights, read once, and its rows. In units of a row let the former be S, the
`spare_rows` of the device: thousands on a GPU for a small model, about ten on a CPU. A row of masks
that nobody needs costs 1; drafts that are there when they are needed save the step that would make
them, which brings one token all the same, so about half of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["DraftPlan"]


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Where masks pay.

    Attributes:
        num_masks: of one draft.
        spare_rows: rows that cost as much as a step has cost before them.
        max_branches: of a step.
    """

    num_masks: int
    spare_rows: int
    max_branches: int = 0

    def behind(self, confidence: Sequence[float], max_masks: int) -> tuple[int, tuple[int, ...]]:
        """Return the masks behind all of the drafts, and the places before which branches begin.

        A place is the number of drafts that turn out right: the next one is wrong, and what follows
        the token that replaces it is drafted in its branch.

        Args:
            confidence: of the drafts that the step verifies; without any, it drafts.
            max_masks: of the step.
        """
        size = self.num_masks
        if not confidence:
            return min(size, max_masks), ()
        reached, odds = 1.0, []
        for sure in confidence:
            odds.append(reached * (1.0 - sure))
            reached *= sure
        odds.append(reached)
        least = 2 * size / (self.spare_rows + size)
        places = [place for place, chance in enumerate(odds) if chance > least]
        places.sort(key=lambda place: -odds[place])
        places = places[: max_masks // size]
        num_drafts = len(confidence)
        branches = [place for place in places if place < num_drafts][: self.max_branches]
        return size if num_drafts in places else 0, tuple(sorted(branches))

    def is_worth(self, confidence: Sequence[float], threshold: float) -> bool:
        """Return whether the last of some drafts is to be verified.

        It brings a token as often as it and all before it are right, and costs a row.

        Args:
            confidence: of the drafts up to it.
            threshold: of the request; what is drafted with less confidence is not kept.
        """
        return confidence[-1] > threshold and prod(confidence) * self.spare_rows > 1.0
