"""Devices: which there are for a backend, and the one error for a device that there is not.

A name is checked before anything is fetched or loaded. Libraries are imported only where a name
asks for more than a CPU.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import Final

from d2f_stream.core.errors import UnsupportedModel

__all__ = ["check_device", "devices_of"]

CUDA: Final = re.compile(r"cuda(:\d+)?")


def check_device(device: str, *, backend: str) -> None:
    """Refuse a device that is not here.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...
        backend: that is to use it; "auto" is any that is installed.

    Raises:
        UnsupportedModel: says what is lacking, and lists what there is.
    """
    if device in ("auto", "cpu"):
        return
    names = ("torch", "onnx") if backend == "auto" else (backend,)
    found = {name: devices_of(name) for name in names}
    if any(device in devices for devices in found.values()):
        return
    there_is = ", ".join(dict.fromkeys(["auto", *(d for each in found.values() for d in each)]))
    if CUDA.fullmatch(device) is None:
        why = "no device of d2f_stream, which runs on CPUs and on NVIDIA's GPUs by CUDA"
    elif "cuda" in there_is:
        why = "more than this machine has"
    else:
        why = "not to be had, since " + "; ".join(filter(None, map(_lack_of_cuda, names)))
    raise UnsupportedModel(f"device {device!r} is {why}; here there is: {there_is}")


def devices_of(backend: str) -> Sequence[str]:
    """Return the names of a backend's devices, "cpu" first."""
    count = 0
    if backend == "torch" and importlib.util.find_spec("torch") is not None:
        import torch

        count = torch.cuda.device_count()
    elif backend == "onnx" and importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            count = max(1, _num_gpus())
    return ["cpu", *(["cuda"] if count else []), *(f"cuda:{number}" for number in range(count))]


def _num_gpus() -> int:
    """Return how many GPUs there are: torch is asked, if it is here, as onnxruntime cannot say."""
    if importlib.util.find_spec("torch") is None:
        return 16  # unknown: whether there are so many shows when the graph is loaded
    import torch

    return torch.cuda.device_count()


def _lack_of_cuda(backend: str) -> str:
    if backend == "onnx" and importlib.util.find_spec("onnxruntime") is not None:
        return "this onnxruntime has no CUDA (pip install 'd2f-stream[edge-gpu]')"
    if backend == "torch" and importlib.util.find_spec("torch") is not None:
        import torch

        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) was built without CUDA"
        return "torch finds no GPU that it can use (nvidia-smi shows driver and GPUs)"
    if backend == "scripted":
        return "a scripted model runs on the CPU"
    return f"{'onnxruntime' if backend == 'onnx' else backend} is not installed"
