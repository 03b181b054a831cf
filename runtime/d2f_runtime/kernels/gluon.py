"""What the kernels for Hopper are written in: Gluon, Triton's lower level, where it is installed.

Elsewhere the files import all the same; they define their kernels where `HAS_GLUON`.
"""

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # all threads of a program wait for each other; Triton 3.7 gave it another name
    thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = None
    TensorDescriptor = thread_barrier = None

__all__ = [
    "HAS_GLUON",
    "TensorDescriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "thread_barrier",
    "tma",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
