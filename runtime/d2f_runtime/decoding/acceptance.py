"""Acceptance: which masks of a block one step fills, as the request has it.

Finds what a step proposes for a block, and lets a policy choose from the part of the block that is
open to it. Knows blocks one at a time, and nothing of the canvas.
"""

from collections.abc import Sequence

from d2f_runtime.decoding.blocks import Block, SubBlocks
from d2f_runtime.decoding.policy import AcceptancePolicy, policy_of
from d2f_runtime.decoding.schedule import shares
from d2f_runtime.decoding.window import Proposals
from d2f_stream.core.params import GenerationParams

__all__ = ["Acceptance"]


class Acceptance:
    """Chooses what a block accepts, step by step.

    Args:
        params: of the request: thresholds, ranks, shares and sub-blocks.
        policy: instead of the one that `params` name.
        shift_logits: whether row i-1 predicts position i.
    """

    def __init__(
        self, params: GenerationParams, *, policy: AcceptancePolicy | None, shift_logits: bool
    ) -> None:
        self._params = params
        self._policy = policy or policy_of(params)
        first_alone = shift_logits and params.sub_block_size > 0
        self._sub_blocks = SubBlocks(params.sub_block_size, first_alone)

    def shares_of(self, size: int, num_masks: int) -> tuple[int, ...]:
        """Return how many each step of a new block must accept; () where it may take any number.

        Args:
            size: positions of a whole block.
            num_masks: of this one's that hold a mask.
        """
        num_steps = self._params.steps_per_block
        return shares(self._params.schedule, num_steps, size, num_masks) if num_steps else ()

    def awaits_first(self, block: Block) -> bool:
        """Whether only the first position may accept, which sees nothing of the rest."""
        return self._sub_blocks.first_alone and block.is_untouched

    def offsets(
        self, block: Block, proposals: Proposals, start: int, *, fully_activated: bool
    ) -> Sequence[int]:
        """Return the offsets of a block's masks to fill, ascending.

        Args:
            block: with at least one mask.
            proposals: of the step.
            start: canvas position of the first proposal.
            fully_activated: whether the block must make progress.

        Raises:
            RuntimeError: an internal error: the policy accepted nothing where it must.
        """
        first, stop = block.start - start, block.stop - start
        confidence = _by_offset(proposals.confidence, first, stop)
        rank = confidence
        if proposals.rank is not None:
            rank = _by_offset(proposals.rank, first, stop)
        if self._params.rank == "position":
            rank = range(0, first - stop, -1)
        masked, policy = self._sub_blocks.open(block.masked), self._policy
        if len(proposals.tokens) < stop:  # drafts beyond the window were not asked for
            masked = [offset for offset in masked if first + offset < len(proposals.tokens)]
            if not masked:
                return ()
        if block.shares and fully_activated:
            policy = policy_of(self._params, least=block.next_share())
        offsets = policy.accept(masked, confidence, rank, fully_activated=fully_activated)
        if fully_activated and not offsets:
            raise RuntimeError("the policy accepted nothing in a fully activated block")
        return offsets


def _by_offset(values: Sequence[float], first: int, stop: int) -> Sequence[float]:
    """Return a block's part of a window's values; what lies before the window is 0."""
    return values[first:stop] if first >= 0 else [*[0.0] * -first, *values[:stop]]
