"""Import this before any kernel: without a CUDA device, Triton's interpreter runs them here."""

import os
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _interpret() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
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


if DEVICE == "cpu":
    _interpret()
