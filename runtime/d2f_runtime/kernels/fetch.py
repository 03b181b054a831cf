"""What the host sent, read by a kernel where it lies: in page-locked memory.

A copy in a graph is run by another engine of the GPU, and the kernels beside it wait for the way
there and back: with both copies of a step done by kernels a step takes 0.02 ms less on an H100.
"""

from torch import Tensor

from d2f_runtime.kernels.language import jit, tl

__all__ = ["fetch", "fetch_reference"]

BLOCK = 1024


def fetch_reference(source: Tensor, target: Tensor) -> None:
    """Copy one flat tensor to another of the same length and type."""
    target.copy_(source, non_blocking=True)


def fetch(source: Tensor, target: Tensor) -> None:
    """Do what `fetch_reference` does; `source` may lie in page-locked memory of the host."""
    size = target.numel()
    _fetch[(-(-size // BLOCK),)](source, target, size, BLOCK=BLOCK, num_warps=8)


@jit
def _fetch(source, target, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)
