"""Width: how much of an answer one step denoises; the widths that a request's windows may have.

Pure arithmetic on parameters. The widest of them is the request's own. A narrower window of a
verified answer drafts fewer tokens, down to one, which is an autoregressive step; of another answer
it has fewer active blocks, or only a part of one, so that its text may be another one.
"""

from dataclasses import dataclass

from d2f_stream.core.params import GenerationParams

__all__ = ["MAX_DRAFTS", "OWN", "UNBOUNDED_BLOCKS", "Width", "widths_of"]

UNBOUNDED_BLOCKS = (1, 2, 3, 4)
"""Steps below a request that does not bound its blocks."""
MAX_DRAFTS = 64
"""Masks of a verified answer's step, whatever its request allows."""


@dataclass(frozen=True, slots=True)
class Width:
    """A bound of one step's window, besides those of its request; None leaves these alone.

    Attributes:
        max_active_blocks: unfilled blocks before no other one joins.
        part_size: tokens of a block that joins, an attention block by themselves; the rest of it
            joins later. Blocks stay what they are for who reads the answer.
        max_drafts: tokens that a verified answer's step drafts, the one that the model says next
            included; at least 1.
    """

    max_active_blocks: int | None = None
    part_size: int | None = None
    max_drafts: int | None = None


OWN = Width()
"""The width of the request's own windows."""


def widths_of(
    params: GenerationParams, block_size: int, *, least_part: int | None = None
) -> tuple[Width, ...]:
    """Return the widths that the windows of a request may have, narrowest first; the last is OWN.

    Args:
        params: of the request; whether it allows narrower ones is not asked.
        block_size: of its answer, tokens.
        least_part: tokens of a block that may join by themselves; None leaves blocks whole.
    """
    blocks = params.max_active_blocks
    if params.add_threshold == 1.0 and params.commit != "verify":
        blocks = 1  # the next block joins when the one before it is filled
    if params.attention == "full":
        return (OWN,)  # every window is the whole canvas
    if params.commit == "verify":
        most = MAX_DRAFTS if blocks is None else min(blocks * block_size, MAX_DRAFTS)
        counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
        return (*(Width(max_drafts=count) for count in counts), OWN)
    narrower = UNBOUNDED_BLOCKS if blocks is None else range(1, blocks)
    whole = [Width(max_active_blocks=count) for count in narrower]
    if least_part is None or least_part >= block_size or not _may_part(params):
        return (*whole, OWN)
    sizes = [block_size >> power for power in range(1, block_size.bit_length())]
    parts = [
        Width(max_active_blocks=1, part_size=size)
        for size in reversed(sizes)
        if size >= least_part and block_size % size == 0
    ]
    return (*parts, *whole, OWN)


def _may_part(params: GenerationParams) -> bool:
    """Whether what a request asks of blocks can be had of parts of them."""
    return (
        params.sub_block_size == 0 and not params.steps_per_block and params.edit_threshold is None
    )
