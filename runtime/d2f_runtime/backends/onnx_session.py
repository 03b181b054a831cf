"""Opens an onnxruntime session for a step graph: version, device, threads, names.

Knows nothing of windows or slots.
"""

import os
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort

from d2f_runtime.manifest import Manifest
from d2f_stream.errors import ModelDamaged, UnsupportedModel

__all__ = ["open_session"]

MAX_OPSET: Final = 23
BYTES_PER_THREAD: Final = 4 << 20  # fewer weights than this are read faster by one thread less

CUDA: Final = "CUDAExecutionProvider"
CPU: Final = "CPUExecutionProvider"


def open_session(graph: Path, manifest: Manifest, device: str) -> tuple[ort.InferenceSession, str]:
    """Return a session and the device it runs on.

    Args:
        graph: the ONNX file.
        manifest: of its folder.
        device: "auto" is CUDA where onnxruntime has it and the weights are not int8, which only
            its CPU kernels run; "cpu", "cuda" or "cuda:N".

    Raises:
        ModelDamaged: the graph is missing, cannot be read, or is not the manifest's.
        UnsupportedModel: onnxruntime is too old, or has no such device.
    """
    _check_version(manifest)
    stored = "fp32" if manifest.onnx is None else manifest.onnx.quantization
    device, providers = _choose_device(device, stored)
    if not graph.is_file():
        raise ModelDamaged(f"{graph.parent} has a manifest but no {graph.name}; export it again")
    options = ort.SessionOptions()
    options.intra_op_num_threads = _num_threads(graph)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # NOTE: spinning stays on; stopping it after each run costs 1 ms to wake the threads.
    try:
        session = ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as exc:  # onnxruntime's errors have no common base but this
        raise ModelDamaged(f"{graph} cannot be loaded: {exc}") from exc
    _check_names(graph, session, manifest)
    return session, device


def _check_version(manifest: Manifest) -> None:
    if manifest.onnx is None:
        return
    needed, found = manifest.onnx.min_onnxruntime, ort.__version__
    if _version(found) < _version(needed):
        raise UnsupportedModel(
            f"model {manifest.name} needs onnxruntime {needed} or newer, but {found} is installed"
        )
    if manifest.onnx.opset > MAX_OPSET:
        raise UnsupportedModel(
            f"model {manifest.name} uses opset {manifest.onnx.opset}, but this build knows "
            f"{MAX_OPSET}; update d2f-stream"
        )


def _version(text: str) -> tuple[int, ...]:
    """Compare releases by their numbers: 1.9 < 1.23; a suffix such as rc1 is left out."""
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _choose_device(device: str, stored: str) -> tuple[str, list[Any]]:
    """Return the device and onnxruntime's providers for it."""
    has_cuda = CUDA in ort.get_available_providers()
    if device == "auto":
        device = "cuda" if has_cuda and stored != "int8" else "cpu"
    if device == "cpu":
        return device, [CPU]
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise UnsupportedModel(f"device is {device!r} but must be auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise UnsupportedModel(
            f"device is {device!r} but this onnxruntime has no CUDA; install d2f-stream[edge-gpu]"
        )
    return f"cuda:{index or 0}", [(CUDA, {"device_id": int(index or 0)}), CPU]


def _num_threads(graph: Path) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, graph.stat().st_size // BYTES_PER_THREAD))


def _check_names(graph: Path, session: ort.InferenceSession, manifest: Manifest) -> None:
    expected = {"tokens", "start", "visible_until", "head_rows"}
    expected |= {"in_full", "temperature", "uniforms"}
    if manifest.shift_logits:
        expected.add("last_hidden")
    expected |= {f"past.{i}.{x}" for i in range(manifest.transformer.num_layers) for x in "kv"}
    found = {value.name for value in session.get_inputs()}
    if different := sorted(expected ^ found):
        raise ModelDamaged(f"{graph} and its manifest differ in the input {different[0]!r}")
