"""Editing of tokens that are set already, while their block is open: LLaDA2.1's T2T.

A block is left, and final, once a step without masks changed nothing, or after a number of steps
without masks. As the publisher's JointThreshold loop has it (ZHZisZZ/dllm, ca17675,
pipelines/llada21).
"""

from collections.abc import Sequence

from d2f_runtime.decoding.blocks import Block
from d2f_stream.core.errors import InvalidParams
from d2f_stream.core.params import GenerationParams

__all__ = ["check_editable", "edits_of", "is_left"]


def check_editable(params: GenerationParams, *, shift_logits: bool) -> None:
    """Refuse what editing does not go together with.

    Args:
        params: of the request, whose `edit_threshold` is set.
        shift_logits: of the model.

    Raises:
        InvalidParams: for the first that stands against it.
    """
    against = {
        "max_active_blocks is 1": params.max_active_blocks != 1,
        "attention is 'blocks'": params.attention != "blocks",
        "sub_block_size is 0": params.sub_block_size != 0,
        "the model predicts each position from its own row": shift_logits,
    }
    for needed, is_lacking in against.items():
        if is_lacking:
            raise InvalidParams("edit_threshold", params.edit_threshold, f"None unless {needed}")


def edits_of(
    block: Block,
    present: Sequence[int],
    proposed: Sequence[int],
    confidence: Sequence[float],
    *,
    num_fixed: int,
    threshold: float,
) -> list[int]:
    """Return the offsets whose token is to be replaced: set, not of the prompt, and doubted enough.

    Args:
        block: as the proposals saw it.
        present: [block size] the tokens that they saw.
        proposed: [block size] tokens.
        confidence: [block size] of these.
        num_fixed: leading positions that are the prompt's.
        threshold: a proposal above this (strictly) replaces.
    """
    masked = set(block.masked)
    return [
        offset
        for offset in range(num_fixed, len(present))
        if offset not in masked
        and confidence[offset] > threshold
        and proposed[offset] != present[offset]
    ]


def is_left(block: Block, *, had_masks: bool, was_edited: bool, max_steps: int) -> bool:
    """End a step of a block; return whether nothing of it may change any more."""
    if not had_masks and not was_edited:
        return True
    if block.masked:
        return False
    block.num_edit_steps += 1
    return block.num_edit_steps > max_steps
