"""Portable attention against onnxruntime's GroupQueryAttention, in the same few layers.

The portable graph joins the cache and the window's K/V in every layer; the other one writes the
window's into a buffer that is input and output at once. Both run with everything bound, so that
what is timed is the graph.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from d2f_export.graph_builder import Array, Stored, Weights
from d2f_export.graph_layers import Lowering
from d2f_export.onnx_graph import StepGraph, step_graph
from d2f_export.quantize import FLOATS, Quantization
from d2f_export.weights import write_graphs
from d2f_runtime.backends.onnx_session import choose_device
from d2f_runtime.bench.record import spread
from d2f_runtime.models.config import TransformerConfig

__all__ = ["compare_lowerings"]

BLOCK: Final = 32
WARM_UP: Final = 5


def compare_lowerings(
    config: TransformerConfig,
    quantization: Quantization,
    device: str,
    *,
    cached: int,
    widths: Sequence[int],
    steps: int,
    fill: Callable[[Sequence[Stored]], Sequence[Array]],
) -> dict[str, Any]:
    """Return milliseconds of a run for each lowering, and how far their logits are apart.

    Args:
        config: of the model; without shifted logits.
        quantization: of the weights.
        device: "cpu" or "cuda".
        cached: tokens before the window.
        widths: of windows.
        steps: of each measurement.
        fill: makes the weights; the same for both.
    """
    lowerings: tuple[Lowering, ...] = ("portable", "gqa")
    logits: dict[str, list[Array]] = {}
    found: dict[str, Any] = {}
    for lowering in lowerings:
        graph = step_graph(config, quantization, lowering=lowering)
        weights = [Weights((), w.stored, partial(fill, w.stored)) for w in graph.weights]
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "step.onnx"
            data = path.with_suffix(".data")
            write_graphs({path: StepGraph(graph.model, weights)}, lambda _: [], data=data)
            place, providers = choose_device(device, quantization)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            session = ort.InferenceSession(str(path), options, providers=providers)
        run = _Run(session, config, FLOATS.get(quantization, "float32"), place, lowering)
        for width in widths:
            ms, found_logits = run.time(cached, width, steps)
            found.setdefault(f"window {width}", {})[lowering] = ms
            logits.setdefault(lowering, []).append(found_logits)
    for width, one, other in zip(widths, *logits.values(), strict=True):
        entry = found[f"window {width}"]
        entry["largest_difference_of_logits"] = float(np.abs(one - other).max())
        entry["largest_logit"] = float(np.abs(one[one > -1e8]).max())
        entry["speedup"] = round(entry["portable"]["median"] / entry["gqa"]["median"], 3)
    return found


class _Run:
    """One session with a cache of its own."""

    def __init__(
        self,
        session: ort.InferenceSession,
        config: TransformerConfig,
        dtype: str,
        place: tuple[str, int],
        lowering: Lowering,
    ) -> None:
        self.session, self.config, self.dtype = session, config, np.dtype(dtype)
        self.place, self.lowering = place, lowering
        self.names = [f"{i}.{x}" for i in range(config.num_layers) for x in "kv"]

    def time(self, cached: int, width: int, steps: int) -> tuple[dict[str, float], Array]:
        """Cache a prompt, then time a window of masks behind it; with its logits."""
        rows, shape = cached + width, self._shape(cached + width)
        caches = {
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype), *self.place)
            for name in self.names
        }
        prompt = [10 + i % 100 for i in range(cached)]
        io = self._bound(caches, rows, 0, prompt, [cached] * cached)
        self.session.run_with_iobinding(io)
        stops = [min(cached + (i // BLOCK + 1) * BLOCK, rows) for i in range(width)]
        io = self._bound(caches, rows, cached, [self.config.mask_id] * width, stops)
        walls = []
        for _ in range(steps + WARM_UP):
            began = time.perf_counter()
            self.session.run_with_iobinding(io)
            walls.append((time.perf_counter() - began) * 1e3)
        io.bind_output("logits", "cpu")
        self.session.run_with_iobinding(io)
        logits: Array = io.get_outputs()[-1].numpy()
        return spread(walls[WARM_UP:]), logits

    def _shape(self, rows: int) -> tuple[int, ...]:
        config = self.config
        if self.lowering == "gqa":
            return (1, config.num_kv_heads, rows, config.head_dim)
        return (1, rows, config.num_kv_heads * config.head_dim)

    def _bound(
        self,
        caches: dict[str, ort.OrtValue],
        rows: int,
        start: int,
        tokens: list[int],
        visible_until: list[int],
    ) -> Any:
        io, width = self.session.io_binding(), len(tokens)
        host: dict[str, Array] = {
            "tokens": np.array([tokens]),
            "start": np.array([start]),
            "visible_until": np.array([visible_until]),
            "head_rows": np.arange(width)[None],
            "in_full": np.array(False),
            "temperature": np.zeros(1, np.float32),
            "uniforms": np.zeros((1, width), np.float32),
        }
        if self.lowering == "gqa":
            host["total"] = np.array(start + width, np.int32)
        for name, array in host.items():
            io.bind_cpu_input(name, array)
        io.bind_output("proposals", "cpu")
        row = self.config.num_kv_heads * self.config.head_dim
        for name, cache in caches.items():
            if self.lowering == "gqa":
                io.bind_ortvalue_input(f"past.{name}", cache)
                io.bind_ortvalue_output(f"new.{name}", cache)
                continue
            base = cache.data_ptr()
            place = base + start * row * self.dtype.itemsize
            kind = (*self.place, self.dtype)
            io.bind_input(f"past.{name}", *kind, (1, start, row), base)
            io.bind_output(f"new.{name}", *kind, (1, width, row), place)
        return io
