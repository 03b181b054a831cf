"""A large shape with random weights: onnxruntime next to torch.

The time of a step depends on shapes, not on what the weights are, so the stored tensors are filled
with a repeated piece of noise, quantized ones with noise as well.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from d2f_export.onnx.artefact import Description, describe, file_info
from d2f_export.onnx.graph import StepGraph, step_graph
from d2f_export.onnx.graph_builder import OPSET, Array, Stored, Weights
from d2f_export.onnx.quantize import Quantization
from d2f_export.onnx.weights import write_graphs
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.backends.onnx_session import GRAPH_FILE, GRAPH_INTERFACE, nodes_by_provider
from d2f_runtime.decoding.window import Window
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.models.manifest import FILE_NAME, FileInfo, OnnxInfo, encode_manifest
from lab.bench.step import StepSettings, time_steps
from lab.bench.step_models import SHAPES
from lab.records import spread

__all__ = ["LargeSettings", "time_large", "write_random"]

BLOCK: Final = 32
NOISE: Final = 1 << 24  # elements
WARM_UP: Final = 5


@dataclass(frozen=True, slots=True)
class LargeSettings:
    """What to time.

    Attributes:
        shape: of `step_models.SHAPES`.
        quantizations: of the artefacts.
        torch: quantizations of the torch backend.
        device: "cuda" or "cpu".
        cached: tokens before the window.
        widths: of windows.
        steps: of each measurement.
        budget_s: seconds after which no further measurement begins.
        folder: for the artefacts; None is a temporary one.
    """

    shape: str = "llada-8b"
    quantizations: Sequence[Quantization] = ("fp16", "int4-fp16")
    torch: Sequence[str] = ("bf16",)
    device: str = "cuda"
    cached: int = 640
    widths: Sequence[int] = (32, 128)
    steps: int = 60
    budget_s: float = 500.0
    folder: Path | None = None


def time_large(
    settings: LargeSettings, note: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run everything that fits into the budget; `note` gets the results so far, again and again."""
    ends = time.perf_counter() + settings.budget_s
    stages: dict[str, Callable[[], Any]] = {}
    for quantization in settings.quantizations:
        stages[f"onnx {quantization}"] = partial(_time_onnx, settings, quantization)
    for name in settings.torch:
        stages[f"torch {name}"] = partial(_time_torch, settings, name, ends)
    results: dict[str, Any] = {}
    for name, stage in stages.items():
        if time.perf_counter() > ends:
            results[name] = "left out: the time was up"
            continue
        try:
            results[name] = stage()
        except Exception as failure:  # the others shall be timed all the same
            results[name] = {"failure": repr(failure)[:1000]}
        gc.collect()
        note(results)
    return results


def write_random(config: TransformerConfig, quantization: Quantization, folder: Path) -> None:
    """Write an artefact with random weights, their hashes left out: they are not checked here."""
    graph = step_graph(config, quantization)
    weights = [Weights((), w.stored, partial(_noise, w.stored)) for w in graph.weights]
    data = folder / f"{GRAPH_FILE}.data"
    write_graphs({folder / GRAPH_FILE: StepGraph(graph.model, weights)}, lambda _: [], data=data)
    files = {GRAPH_FILE: file_info(folder / GRAPH_FILE)}
    files[data.name] = FileInfo(sha256="", bytes=data.stat().st_size)
    info = OnnxInfo(
        opset=OPSET, min_onnxruntime="1.31", interface=GRAPH_INTERFACE, quantization=quantization
    )
    manifest = describe(config, Description(name="random"), files=files, onnx=info)
    (folder / FILE_NAME).write_bytes(encode_manifest(manifest))


def _noise(stored: Sequence[Stored]) -> list[Array]:
    return [np.resize(_piece(_kind(t), t.dtype), t.shape) for t in stored]


def _kind(tensor: Stored) -> str:
    if tensor.name.endswith(".scale"):
        return "scale"
    return "norm" if "norm" in tensor.name else "matrix"


@cache
def _piece(kind: str, dtype: str) -> Array:
    rng = np.random.default_rng(0)
    if dtype in ("uint8", "int8"):
        return rng.integers(0, 256, NOISE, dtype=np.uint8).view(dtype)
    if kind == "scale":
        return np.full(NOISE, 0.005, dtype)
    noise = rng.standard_normal(NOISE, dtype=np.float32) * 0.02
    return (noise + (kind == "norm")).astype(dtype)


def _time_onnx(settings: LargeSettings, quantization: Quantization) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_random(SHAPES[settings.shape], quantization, folder)
        found["write_s"] = round(time.perf_counter() - began, 2)
        found["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        found |= _time_loaded(settings, folder)
    return found


def _time_loaded(settings: LargeSettings, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    backend = load(folder, device=settings.device)
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 2)}
    found["nodes"] = nodes_by_provider(backend.sessions[0].session)
    for width in settings.widths:
        found[f"window {width}"] = _window(backend, width, settings)
    backend.close()
    return found


def _window(backend: OnnxBackend, width: int, settings: LargeSettings) -> dict[str, Any]:
    """Time whole backend steps of one window after a prompt."""
    cached = min(settings.cached, backend.info.max_len - width - 2)
    began = time.perf_counter()
    slot = backend.open_slot(cached + width)
    opened = time.perf_counter()
    tokens = tuple(10 + i % 100 for i in range(cached))
    backend.step([StepRow(slot, Window(0, tokens, cached, (cached,)))])
    prefilled = time.perf_counter()
    stop = cached + width
    stops = tuple(sorted({*range(cached + BLOCK, stop, BLOCK), stop}))
    row = StepRow(slot, Window(cached, (backend.info.mask_id,) * width, 0, stops))
    walls = []
    for _ in range(settings.steps + WARM_UP):
        start = time.perf_counter()
        backend.step([row])
        walls.append((time.perf_counter() - start) * 1e3)
    backend.close_slot(slot)
    return {
        "backend_ms": spread(walls[WARM_UP:]),
        "first_step_ms": round(walls[0], 2),
        "open_slot_ms": round((opened - began) * 1e3, 2),
        "first_prefill_ms": round((prefilled - opened) * 1e3, 2),
    }


def _time_torch(settings: LargeSettings, quantization: str, ends: float) -> dict[str, Any]:
    steps = StepSettings(
        shapes=(settings.shape,),
        quantizations=(quantization,),
        device=settings.device,
        cached=settings.cached,
        widths=settings.widths,
        rates=(),
        steps=settings.steps,
        budget_s=max(0.0, ends - time.perf_counter()),
        checks=False,
    )
    return time_steps(steps)
