"""Import this before any kernel: it says where kernels can run, and mends Triton's interpreter.

On a machine without a CUDA device they run in the interpreter, which must be switched on by
TRITON_INTERPRET=1 in the environment: a process that has imported kernels without it cannot.
"""

import dataclasses
import inspect
import os
from functools import cache
from typing import Any

import numpy as np
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
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask: Any) -> Any:
        # a comparison of tensors and one of scalars make int64 together, which 3.9 refuses
        return interpreter.TensorHandle(np.asarray(mask.data).astype(bool), interpreter.tl.int1)

    def masked_load(at: Any, mask: Any, *rest: Any, **given: Any) -> Any:
        return load(at, as_bool(mask), *rest, **given)

    def masked_store(at: Any, value: Any, mask: Any, *rest: Any, **given: Any) -> Any:
        return store(at, value, as_bool(mask), *rest, **given)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def _hasten() -> None:
    """Leave out what the interpreter does again and again and makes no use of."""
    try:
        from triton.language.core import is_builtin
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    # Each sum of integers is computed again in 64 bits; without `debug` nobody looks at that.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):  # at each call of a function in a kernel
            member = getattr(package, name)
            if is_builtin(member):  # not patched yet
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtins


if DEVICE == "cpu" and CAN_RUN:
    _mend()
    _hasten()
