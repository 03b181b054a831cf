"""What the tests of kernels share: random inputs, a relative error, and which GPU is needed."""

import pytest
import torch
from torch import Tensor

from triton_mode import DEVICE  # isort: skip  # before the kernels

__all__ = ["NEEDS_HOPPER", "error", "random"]

NEEDS_HOPPER = pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def random(*shape: int) -> Tensor:
    """Return fresh normal numbers in fp32."""
    return torch.randn(*shape, device=DEVICE)


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference over that of what is wanted; NaN if anything is NaN."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())
