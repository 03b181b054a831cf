"""What kernels are written in: Triton where it is installed, else names that let the files import.

The references beside the kernels need no Triton, so a machine without it imports the same files.
Kernels run on CUDA tensors, or on CPU tensors under Triton's interpreter (for tests).
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
    HAS_TRITON = True
    TRITON_VERSION: str = triton.__version__
except ImportError:
    HAS_TRITON = False
    TRITON_VERSION = ""
    tl = SimpleNamespace(constexpr=object)
    gdc_launch_dependents = gdc_wait = TensorDescriptor = None

    class Unlaunchable:
        """Stands in for a kernel: it exists but cannot be launched."""

        def __init__(self, kernel: Callable[..., Any]) -> None:
            self.name = kernel.__name__

        def __getitem__(self, grid: object) -> NoReturn:
            raise RuntimeError(f"the kernel {self.name} needs triton, which is not installed")

    jit = Unlaunchable

__all__ = [
    "HAS_TRITON",
    "MULTIPROCESSORS",
    "TRITON_VERSION",
    "TensorDescriptor",
    "gdc_launch_dependents",
    "gdc_wait",
    "is_hopper",
    "jit",
    "overlaps",
    "power_of_2",
    "tl",
]

MULTIPROCESSORS = 132  # of an H100, which tilings are chosen for


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is of the architecture that the Gluon kernels are written for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may overlap the end of the one before it (programmatic dependent launch).

    Hopper and later. Every kernel of ours then first lets its successor be launched and waits for
    its predecessor before it touches memory, so that only launch latency overlaps.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
