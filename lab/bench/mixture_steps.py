"""Whole steps of a mixture of experts with random weights, in the fast step.

Windows hold tokens, all different, and one mask, and tokens are embedded far apart: rows that are
alike would choose the same few experts, which those of a trained model do not. The head runs over
all rows of the shape anyhow.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.buckets import Bucket, bucket_for
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import QUANTIZED, TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.kernels.routing import Routes
from lab.bench.step import device_times, fill_cache, kernel_times, slot_of
from lab.bench.step_models import SHAPES, random_model
from lab.records import spread

if TYPE_CHECKING:
    from lab.bench.mixture import MixtureSettings

__all__ = ["floors", "time_mixture"]

BYTES: Final = {"bf16": 2.0, "fp8": 1.0, "nf4": 4.25 / 8}
POOL: Final = 4096  # tokens of K/V
APART: Final = 5000.0  # by which embeddings are multiplied, above all that layers add


def floors(settings: "MixtureSettings") -> dict[str, Any]:
    """Return what steps must read, GB and ms, by quantization and rows that choose at random."""
    mixture = SHAPES[settings.shape].mixture
    assert mixture is not None
    found: dict[str, Any] = {"bytes_per_s": settings.rate}
    for quantization in settings.quantizations:
        for width in sorted(settings.widths):
            left_out = (1 - mixture.num_chosen / mixture.num_experts) ** width
            touched = mixture.num_experts * (1 - left_out)
            size = _floor_bytes(settings, quantization, touched)
            found[f"{quantization}, {width} rows"] = {
                "experts": round(touched, 1),
                "gb": round(size / 1e9, 3),
                "ms": round(size / settings.rate * 1e3, 3),
            }
    return found


def _floor_bytes(settings: "MixtureSettings", quantization: str, touched: float) -> float:
    """Return the fewest bytes that a step reads if so many experts of a layer are chosen."""
    config = SHAPES[settings.shape]
    mixture = config.mixture
    assert mixture is not None
    size, per_weight = config.hidden_size, BYTES[quantization]
    num_dense = sum(mixture.is_dense(layer) for layer in range(config.num_layers))
    num_mixed = config.num_layers - num_dense
    attention = 2 * size * config.head_dim * (config.num_heads + config.num_kv_heads)
    weights = config.num_layers * attention + num_dense * 3 * size * config.ffn_size
    weights += int(num_mixed * 3 * size * (touched * mixture.ffn_size + mixture.shared_size))
    routers = num_mixed * size * mixture.num_experts * 4
    head = config.vocab_size * size * (1 if quantization == "fp8" else 2)
    cache = settings.cached * config.kv_bytes_per_token // 2
    return weights * per_weight + routers + head + cache


def time_mixture(
    settings: "MixtureSettings",
    quantization: str,
    found: dict[str, Any],
    budget_s: float,
    note: Callable[[], None],
) -> None:
    """Load a model, time its windows one by one, and count the experts that they read."""
    began = time.perf_counter()
    is_cuda = settings.device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = random_model(
        SHAPES[settings.shape], device=settings.device, dtype=dtype, quantization=quantization
    )
    with torch.no_grad():
        model.embed_tokens.weight.mul_(APART)
    found["drawn_s"] = round(time.perf_counter() - began, 1)
    backend = TorchBackend(
        model,
        name=settings.shape,
        device=settings.device,
        dtype=dtype,
        quantization=QUANTIZED.get(quantization),
        max_tokens=POOL if is_cuda else None,
        runner="fast",
        consume=True,
    )
    del model
    found["load_s"] = round(time.perf_counter() - began, 1)
    runner = backend._runner
    assert isinstance(runner, FastRunner)
    found["weights_gb"] = round(runner._model.weight_bytes / 1e9, 2)
    if is_cuda:
        torch.cuda.empty_cache()
        found["load_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
    note()
    try:
        for width in settings.widths:
            if time.perf_counter() - began > budget_s:
                found[f"{width} rows"] = "left out: the time was up"
                continue
            try:
                found[f"{width} rows"] = _window(settings, backend, runner, quantization, width)
            except Exception as failure:
                found[f"{width} rows"] = repr(failure)[:1000]
            note()
        if is_cuda:
            found["steps_peak_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
            found["graph_mb"] = {
                f"{bucket.rows} rows": round(size / 1e6, 1)
                for bucket, size in runner.graph_bytes.items()
            }
            found["us_by_kernel, 32 rows"] = kernel_times(lambda: runner.replay(Bucket(1, 32)))
    finally:
        backend.close()
        if is_cuda:
            torch.cuda.empty_cache()


def _window(
    settings: "MixtureSettings",
    backend: TorchBackend,
    runner: FastRunner,
    quantization: str,
    width: int,
) -> dict[str, Any]:
    cached = min(settings.cached, backend.info.max_len - width - 2) // 32 * 32
    found: dict[str, Any] = {}
    bucket = bucket_for(width, 1)
    assert bucket is not None
    with slot_of(backend, cached + width + 1) as slot:
        fill_cache(backend, slot, cached)
        row = _row(backend, slot, width, cached)
        began = time.perf_counter()
        backend.step([row])
        found["first_s"] = round(time.perf_counter() - began, 2)
        walls = []
        for _ in range(60 if settings.device == "cuda" else 2):
            began = time.perf_counter()
            backend.step([row])
            walls.append((time.perf_counter() - began) * 1e3)
        found["backend_ms"] = spread(walls)
        ms = found["backend_ms"]["median"]
        if settings.device == "cuda":
            found["captured"] = runner._shapes[bucket].greedy_graph is not None
            found["device_ms"] = spread(device_times(lambda: runner.replay(bucket), 40))
            ms = found["device_ms"]["median"]
        touched = _count(runner, lambda: backend.step([row]))
        found["experts"] = round(sum(touched) / len(touched), 1)
        floor = _floor_bytes(settings, quantization, found["experts"]) / settings.rate * 1e3
        found["floor_ms"] = round(floor, 3)
        found["over_floor"] = round(ms / floor, 3)
    return found


def _row(backend: TorchBackend, slot: Slot, width: int, cached: int) -> StepRow:
    vocabulary = SHAPES[backend.info.name].num_tokens or SHAPES[backend.info.name].vocab_size
    tokens = tuple(10 + (i * 977) % (vocabulary - 20) for i in range(width - 1))
    stop = cached + width
    stops = tuple(sorted({*range(cached + 32, stop, 32), stop}))
    return StepRow(slot, Window(cached, (*tokens, backend.info.mask_id), 0, stops))


def _count(runner: FastRunner, step: Callable[[], object]) -> list[int]:
    """Return how many experts each layer of a step reads, besides those that it always does."""
    model, counts = runner._model, []
    usual, shapes, captures = model.ops, runner._shapes, runner._use_graphs

    def route(*args: Any, **given: Any) -> Routes:
        routes = usual.route(*args, **given)
        counts.append((routes.counts > 0).sum() - given["num_always"])
        return routes

    model.ops, runner._shapes, runner._use_graphs = replace(usual, route=route), {}, False
    try:
        step()
    finally:
        model.ops, runner._shapes, runner._use_graphs = usual, shapes, captures
    return [int(count) for count in counts]
