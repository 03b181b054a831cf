"""FillLaws: what windows of one width bring, guessed from what those of another one did.

All widths of a request have a speed in common, in which its difficulty and the model's skill are.
How tokens follow from it was fitted to the simulated requests of lab/scheduling, which bring as
many tokens a step as models did that were measured. Pure.
"""

import math
from typing import Final, NamedTuple, Protocol

__all__ = ["BlocksLaw", "DraftsLaw", "FillLaw"]

LAST_STEPS: Final = 1.1
"""Steps that the end of a block takes besides."""
BESIDE: Final = 1.25
"""Times the speed amid a block, which very many blocks at once would fill at."""


class FillLaw(Protocol):
    """How what windows of a width bring follows from the speed."""

    @property
    def usual(self) -> float:
        """The speed where nothing is known."""
        ...

    @property
    def rows(self) -> float:
        """Rows of a step."""
        ...

    def tokens(self, speed: float) -> float:
        """Return the tokens of a step."""
        ...

    def speed(self, tokens: float) -> float:
        """Return the speed at which a step brings so many."""
        ...


class DraftsLaw(NamedTuple):
    """Verified answers: the speed is what twice as many drafts bring besides.

    Attributes:
        drafts: of a step; one is what the model says next: its row is never run, and it is never
            wrong.
    """

    drafts: int

    @property
    def usual(self) -> float:
        """The speed where nothing is known."""
        return 0.4

    @property
    def rows(self) -> float:
        """Rows of a step."""
        return 1.0 if self.drafts == 1 else 1.5 * self.drafts

    def tokens(self, speed: float) -> float:
        """Return the tokens of a step."""
        return 1.0 + speed * math.log2(self.drafts)

    def speed(self, tokens: float) -> float:
        """Return the speed at which a step brings so many."""
        if self.drafts == 1:
            return self.usual
        return max(0.0, tokens - 1.0) / math.log2(self.drafts)


class BlocksLaw(NamedTuple):
    """Filled answers: the speed is that amid a long block, tokens a step.

    The last tokens of a block, or of a part of one, take about a step of their own. With two blocks
    the next one fills meanwhile; a third and a fourth one add little.

    Attributes:
        blocks: active at once.
        size: of a block, or of the part of one that joins by itself.
    """

    blocks: int
    size: int

    @property
    def usual(self) -> float:
        """The speed where nothing is known."""
        return 2.2

    @property
    def rows(self) -> float:
        """Rows of a step."""
        if self.size == 1:
            return 1.0
        return self.size * (1.4 if self.blocks == 1 else self.blocks + 0.5)

    def tokens(self, speed: float) -> float:
        """Return the tokens of a step."""
        if self.size == 1:
            return 1.0
        if self.blocks == 1:
            return self.size / (self.size / speed + LAST_STEPS)
        return speed * (BESIDE - 0.4 / self.blocks)

    def speed(self, tokens: float) -> float:
        """Return the speed at which a step brings so many."""
        if self.size == 1:
            return self.usual
        if self.blocks == 1:
            return self.size / max(1.0, self.size / tokens - LAST_STEPS)
        return tokens / (BESIDE - 0.4 / self.blocks)
