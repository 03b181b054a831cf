"""How many proposals each step of a block must accept, where a request says in how many steps.

Three published schedules. "even" shares the block's size out, the remainder first (SDAR's and
LLaDA2's get_num_transfer_tokens); "masks" shares out the masks that the prompt left of it, else
alike (Stable-DiffCoder, LLaDA). "linear" takes of the masks that are left what the schedule of
Tiny-A2D says (ZHZisZZ/dllm, LinearAlphaScheduler): their number over the steps that are left,
rounded half to even, and no step for nothing. There single precision decides what lies at a half,
so it does here.
"""

import struct

from d2f_stream.core.params import Schedule

__all__ = ["shares"]


def shares(schedule: Schedule, num_steps: int, size: int, num_masks: int) -> tuple[int, ...]:
    """Return how many proposals each step of a block accepts at least.

    Args:
        schedule: which of the three.
        num_steps: in which the block is to be filled, at least 1.
        size: positions of a whole block.
        num_masks: of them that hold a mask at first: fewer where the prompt ends in the block.
    """
    if schedule == "linear":
        return _linear(num_steps, num_masks)
    number = size if schedule == "even" else num_masks
    least, rest = divmod(number, num_steps)
    return tuple(least + (step < rest) for step in range(min(num_steps, number)))


def _linear(num_steps: int, num_masks: int) -> tuple[int, ...]:
    found: list[int] = []
    for left in range(num_steps, 0, -1):
        before, after = (_masked_at(step / num_steps) for step in (left, left - 1))
        share = min(round(num_masks * (1 - _single(after / before))), num_masks)
        num_masks -= share
        if share:
            found.append(share)
    return tuple(found)


def _masked_at(time: float) -> float:
    """Return the share of masks at a time, by way of that of tokens, as the scheduler does."""
    return _single(1 - _single(1 - _single(time)))


def _single(number: float) -> float:
    """Round to single precision; of one operation on such numbers, as if done in it."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", number))
    return float(rounded)
