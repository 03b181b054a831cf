"""The values that cross the seam between decoder and backend. Plain Python, no torch.

A step runs one `Window` per row, stores the K/V of its first `num_to_cache` positions and answers
with one `Proposals` per row. No mask tensor crosses: who sees whom follows from `start` and
`block_stops`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from d2f_stream.core.errors import ModelDamaged

__all__ = ["NO_TOKEN", "Branch", "Proposals", "Window", "check_proposals"]

NO_TOKEN = -1


class Branch(NamedTuple):  # as the others here: a third of a frozen dataclass's cost, each step
    """Masks that follow a part of a window's filled positions, as if nothing stood behind it.

    They see everything before `start` and each other, and are seen by nobody else. Each of them
    predicts the token behind its own position.

    Attributes:
        start: canvas position of the first mask; a filled position of the window, not its first.
        num_masks: how many.
    """

    start: int
    num_masks: int


class Window(NamedTuple):
    """The slice of the canvas from the first uncached position to its end: the input of one step.

    Of a last block that takes its first token by itself only that position is in it.

    Attributes:
        start: canvas position of the first row; everything before it is cached.
        tokens: [W] token ids, masks included.
        num_to_cache: how many leading positions the step stores the K/V of: they are final, or to
            be verified; the next window begins where they turn out not to be.
        block_stops: ascending canvas positions at which attention blocks end; the last is
            `start + W`. A position sees everything before the stop of its own block, so attention
            is full inside a block and causal across blocks.
        num_to_verify: how many of the positions to cache, the last of them, are predicted although
            they are filled.
        num_to_edit: how many of all positions, the last of them, are predicted, filled or not.
        branches: more masks; only models with shifted logits get them. Their proposals follow those
            of the window's positions.
    """

    start: int
    tokens: tuple[int, ...]
    num_to_cache: int
    block_stops: tuple[int, ...]
    num_to_verify: int = 0
    num_to_edit: int = 0
    branches: tuple[Branch, ...] = ()

    @property
    def num_branch_masks(self) -> int:
        """Masks of all branches."""
        return sum([branch.num_masks for branch in self.branches]) if self.branches else 0

    @property
    def stop(self) -> int:
        """One past the canvas position of the last row."""
        return self.start + len(self.tokens)

    def num_forwarded(
        self, mask_id: int, *, shift_logits: bool, drafts_in_place: bool = False
    ) -> int:
        """Return how many leading positions must run through the model.

        A last attention block that is one mask is seen by nobody else, and a model with shifted
        logits predicts it from the position before: a placeholder, so that an autoregressive step
        has one row.
        """
        stops = self.block_stops
        last_start = stops[-2] if len(stops) > 1 else self.start
        is_placeholder = shift_logits and stops[-1] - last_start == 1 and self.tokens[-1] == mask_id
        if drafts_in_place and last_start != self.start + self.num_to_cache:
            is_placeholder = False  # its own row predicts it
        return len(self.tokens) - int(is_placeholder)

    @property
    def num_entries(self) -> int:
        """What a step proposes for at most: the window's positions, and the branches' masks."""
        return len(self.tokens) + self.num_branch_masks

    def asked(self, mask_id: int) -> list[int]:
        """Return the entries to predict, ascending: to verify, to edit, masks, and branches."""
        if self.num_to_edit:
            return list(range(len(self.tokens) - self.num_to_edit, len(self.tokens)))
        asked = [at for at, token in enumerate(self.tokens) if token == mask_id]
        if self.num_to_verify:
            asked = [*range(self.num_to_cache - self.num_to_verify, self.num_to_cache), *asked]
        if self.branches:
            asked += range(len(self.tokens), self.num_entries)
        return asked

    def branch_positions(self) -> list[int]:
        """Return the canvas position of each mask of the branches."""
        return [
            position
            for branch in self.branches
            for position in range(branch.start, branch.start + branch.num_masks)
        ]

    def visible_until(self) -> list[int]:
        """[W] for each row, one past the last canvas position that it sees."""
        visible: list[int] = []
        position = self.start
        for stop in self.block_stops:
            visible.extend([stop] * (stop - position))
            position = stop
        return visible


class Proposals(NamedTuple):
    """One token and one confidence for each entry of a window, defined where it asks.

    Attributes:
        tokens: [E] proposed ids; NO_TOKEN at positions that are not asked. Never the mask id.
        confidence: [E] probability of the proposed token, in [0, 1]; 0.0 where undefined.
        rank: [E] the score that picks a forced proposal (higher is better), where the request asked
            for margin or neg_entropy; None means the confidence ranks.
    """

    tokens: Sequence[int]
    confidence: Sequence[float]
    rank: Sequence[float] | None = None


def check_proposals(window: Window, proposals: Proposals, *, mask_id: int, rank: str) -> None:
    """Refuse proposals that do not answer the window; a mistake of the backend.

    Raises:
        RuntimeError: a length differs, the rank that was asked for is missing, or the mask id is
            proposed.
        ModelDamaged: a confidence is no number, as the model's logits were none.
    """
    width = window.num_entries
    for values in (proposals.tokens, proposals.confidence, proposals.rank):
        if values is not None and len(values) != width:
            raise RuntimeError(f"{len(values)} proposed values for a window of {width}")
    if not math.isfinite(sum(proposals.confidence)):
        sure = [math.isfinite(confidence) for confidence in proposals.confidence]
        raise ModelDamaged(
            f"the model's logits at canvas position {window.start + sure.index(False)} are NaN or "
            "infinite: its weights are damaged, or overflow in the type that they are computed in; "
            "fetch them again, or load them as bf16 or fp32"
        )
    if proposals.rank is None and rank not in ("confidence", "position"):
        raise RuntimeError(f"proposals without rank, but the request ranks by {rank}")
    if mask_id in proposals.tokens:
        at = window.start + list(proposals.tokens).index(mask_id)
        raise RuntimeError(f"proposal at canvas position {at} names the mask id {mask_id}")
