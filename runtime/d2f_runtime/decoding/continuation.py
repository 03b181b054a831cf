"""What an answer that another decoder began looks like: whole blocks, as far as they go. Pure."""

from collections.abc import Collection, Sequence

from d2f_runtime.decoding.blocks import Committed
from d2f_runtime.decoding.partition import Partition
from d2f_stream.core.errors import InvalidRequest

__all__ = ["check_committed"]


def check_committed(
    committed: Sequence[Committed],
    partition: Partition,
    *,
    mask_id: int,
    eos_ids: Collection[int],
) -> None:
    """Refuse blocks that a decoder of the same request would not have committed.

    Args:
        committed: from the answer's first on.
        partition: of the request.
        mask_id: id of the mask token.
        eos_ids: every id that ends the answer.

    Raises:
        InvalidRequest: a block begins or ends where none of the request's does, holds a mask, or
            follows the end of the answer.
    """
    position, has_ended = partition.num_prompt, False
    for number, block in enumerate(committed):
        at = position - partition.num_prompt
        if has_ended:
            raise InvalidRequest(
                f"committed block {number} follows the end of the answer at position {at}"
            )
        index, _, stop = partition.block_at(position)
        last = min(stop, partition.limit) - partition.num_prompt
        has_ended = bool(block.tokens) and block.tokens[-1] in eos_ids
        is_whole = block.stop == last or (has_ended and at < block.stop < last)
        if (block.index, block.start) != (index, at) or not is_whole:
            raise InvalidRequest(
                f"committed block {number} has index {block.index} and positions "
                f"{block.start}:{block.stop}, but this request's has index {index} and positions "
                f"{at}:{last}; continue an answer with the parameters that it began with"
            )
        if len(block.tokens) != block.stop - block.start:
            raise InvalidRequest(
                f"committed block {number} has {len(block.tokens)} tokens for "
                f"{block.stop - block.start} positions"
            )
        if any(token in eos_ids for token in block.tokens[:-1]):
            raise InvalidRequest(f"committed block {number} goes on behind the end of the answer")
        if mask_id in block.tokens:
            raise InvalidRequest(f"committed block {number} holds the mask id {mask_id}")
        position = partition.num_prompt + block.stop
        has_ended = has_ended or position == partition.limit
