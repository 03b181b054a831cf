"""How many proposals each step of a block must accept, where a request says in how many steps.

Two published schedules. "even" shares the block's size out, the remainder first (LLaDA, SDAR and
LLaDA2's get_num_transfer_tokens); "linear" rounds what is left over the steps that are left, half
to even, and takes no step for nothing (dllm's LinearAlphaScheduler, Stable-DiffCoder).
"""

from d2f_stream.core.params import Schedule

__all__ = ["shares"]


def shares(schedule: Schedule, num_steps: int, size: int, num_masks: int) -> tuple[int, ...]:
    """Return how many proposals each step of a block accepts at least.

    Args:
        schedule: which of the two.
        num_steps: in which the block is to be filled, at least 1.
        size: positions of a whole block.
        num_masks: of them that hold a mask at first: fewer where the prompt ends in the block.
    """
    if schedule == "even":
        least, rest = divmod(size, num_steps)
        return tuple(least + (step < rest) for step in range(min(num_steps, size)))
    found: list[int] = []
    for left in range(num_steps, 0, -1):
        share = round(num_masks / left)
        num_masks -= share
        if share:
            found.append(share)
    return tuple(found)
