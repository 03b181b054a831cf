"""Editing: how tokens that are set may change while their block is open: LLaDA2.1's T2T.

A block is left, and final, once a step without masks changed nothing, or after a number of steps
without masks. As the publisher's JointThreshold loop has it (ZHZisZZ/dllm, ca17675,
pipelines/llada21).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from d2f_runtime.decoding.blocks import Block
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["Editing"]


@dataclass(frozen=True, slots=True)
class Editing:
    """The rules of one request that edits.

    Attributes:
        threshold: a proposal whose confidence is above it (strictly) replaces what is set.
        max_steps: how many steps of a block may begin without masks.
    """

    threshold: float
    max_steps: int

    @classmethod
    def of(cls, params: GenerationParams, *, shift_logits: bool) -> "Editing | None":
        """Return the rules of a request; None where it edits nothing.

        Args:
            params: of the request.
            shift_logits: of the model.

        Raises:
            InvalidParams: for the first that editing does not go together with.
        """
        if params.edit_threshold is None:
            return None
        against = {
            "max_active_blocks is 1": params.max_active_blocks != 1,
            "attention is 'blocks'": params.attention != "blocks",
            "sub_block_size is 0": params.sub_block_size != 0,
            "the model predicts each position from its own row": shift_logits,
        }
        for needed, is_lacking in against.items():
            if is_lacking:
                allowed = f"None unless {needed}"
                raise InvalidParams("edit_threshold", params.edit_threshold, allowed)
        return cls(params.edit_threshold, params.max_edit_steps)

    def offsets(
        self,
        block: Block,
        present: Sequence[int],
        proposed: Sequence[int],
        confidence: Sequence[float],
        *,
        num_fixed: int,
    ) -> list[int]:
        """Return the offsets to replace: set, not of the prompt, and doubted enough.

        Args:
            block: as the proposals saw it.
            present: [block size] the tokens that they saw.
            proposed: [block size] tokens.
            confidence: [block size] of these.
            num_fixed: leading positions that are the prompt's.
        """
        masked = set(block.masked)
        return [
            offset
            for offset in range(num_fixed, len(present))
            if offset not in masked
            and confidence[offset] > self.threshold
            and proposed[offset] != present[offset]
        ]

    def end_step(self, block: Block, *, had_masks: bool, was_edited: bool) -> None:
        """End a step of a block, which is left if nothing of it may change any more."""
        if not had_masks and not was_edited:
            block.is_left = True
        elif not block.masked:
            block.num_edit_steps += 1
            block.is_left = block.num_edit_steps > self.max_steps
