"""A large shape with random weights: onnxruntime next to torch, and two lowerings of attention.

The time of a step depends on shapes, not on what the weights are, so the stored tensors are filled
with a repeated piece of noise, quantized ones with noise as well.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from d2f_export.artefact import Description, describe, file_info
from d2f_export.graph_builder import OPSET, Array, Stored, Weights
from d2f_export.onnx_bench.lowering import compare_lowerings
from d2f_export.onnx_graph import StepGraph, step_graph
from d2f_export.quantize import Quantization
from d2f_export.weights import write_graphs
from d2f_runtime.backends.base import StepRow
from d2f_runtime.backends.onnx_backend import OnnxBackend, load
from d2f_runtime.backends.onnx_session import GRAPH_FILE, GRAPH_INTERFACE, nodes_by_provider
from d2f_runtime.bench.record import spread
from d2f_runtime.bench.step import StepSettings, time_steps
from d2f_runtime.bench.step_models import SHAPES
from d2f_runtime.manifest import FILE_NAME, FileInfo, OnnxInfo
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.window import Window

__all__ = ["LargeSettings", "time_large", "write_random"]

BLOCK: Final = 32
NOISE: Final = 1 << 24  # elements
WARM_UP: Final = 5
FUSED: Final = "ORT_FPA_INTB_GEMM"  # lets MatMulNBits multiply more than 16 rows in 4 bits


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
        layers: two depths at which the lowerings are compared, so that a layer is their difference.
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
    layers: tuple[int, int] = (2, 6)
    budget_s: float = 500.0
    folder: Path | None = None


def time_large(
    settings: LargeSettings, note: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run everything that fits into the budget; `note` gets the results so far, again and again."""
    ends = time.perf_counter() + settings.budget_s
    stages: dict[str, Callable[[], Any]] = {"lowerings": partial(_lowerings, settings)}
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
    (folder / FILE_NAME).write_bytes(msgspec.json.encode(manifest))


def _noise(stored: Sequence[Stored]) -> list[Array]:
    rng = np.random.default_rng(0)
    arrays: list[Array] = []
    for tensor in stored:
        size = int(np.prod(tensor.shape))
        if tensor.dtype in ("uint8", "int8"):
            piece = rng.integers(0, 256, min(size, NOISE), dtype=np.uint8).view(tensor.dtype)
        elif tensor.name.endswith(".scale"):
            piece = np.full(min(size, NOISE), 0.005, tensor.dtype)
        else:
            is_norm = "norm" in tensor.name
            noise = rng.standard_normal(min(size, NOISE), dtype=np.float32)
            piece = (noise * 0.02 + is_norm).astype(tensor.dtype)
        arrays.append(np.resize(piece, size).reshape(tensor.shape))
    return arrays


def _time_onnx(settings: LargeSettings, quantization: Quantization) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write_random(SHAPES[settings.shape], quantization, folder)
        found["write_s"] = round(time.perf_counter() - began, 2)
        found["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
        found |= _time_loaded(settings, folder)
        if quantization == "int4-fp16" and settings.device != "cpu":
            os.environ[FUSED] = "1"  # read when a session is made
            try:
                found[FUSED] = _time_loaded(settings, folder)
            except Exception as failure:
                found[FUSED] = {"failure": repr(failure)[:1000]}
            finally:
                del os.environ[FUSED]
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


def _lowerings(settings: LargeSettings) -> dict[str, Any]:
    config = SHAPES[settings.shape]
    dtype: Quantization = "fp32" if settings.device == "cpu" else "fp16"
    return {
        f"{depth} layers": compare_lowerings(
            replace(config, num_layers=depth),
            dtype,
            settings.device,
            cached=min(settings.cached, config.max_len // 2),
            widths=settings.widths,
            steps=settings.steps,
            fill=_noise,
        )
        for depth in settings.layers
    }
