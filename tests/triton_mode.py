"""Import this before any kernel: it says where kernels can run, and mends Triton's interpreter.

On a machine without a CUDA device they run in the interpreter, which must be switched on by
TRITON_INTERPRET=1 in the environment: a process that has imported kernels without it cannot.
"""

import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_RUN = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def _mend() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 takes int() of arrays of one element, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if DEVICE == "cpu" and CAN_RUN:
    _mend()
