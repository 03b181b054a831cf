"""Whole answers through an engine at published shapes, side by side: D2F and autoregressive.

Random weights, so no download; the acceptances of a trained model are emulated (`step_engine`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from d2f_runtime.backends.torch_backend import DTYPES, QUANTIZED, TorchBackend
from d2f_stream.core.errors import InvalidParams
from lab.bench.step_engine import time_engine
from lab.bench.step_models import SHAPES, random_model

__all__ = ["ShapeSettings", "compare_shapes", "shape_backend"]

AR_RATE: Final = 1.0


@dataclass(frozen=True, slots=True)
class ShapeSettings:
    """What to compare.

    Attributes:
        shapes: of `SHAPES`; autoregressive ones accept one token a step.
        quantizations: of the layers: a dtype's name, "fp8", "nf4" or "int8".
        rates: emulated acceptances per step of the others.
        device: "cuda" or "cpu".
        cached: tokens before the window of the mean step.
        steps: of each measurement, at least; whole answers all the same.
    """

    shapes: Sequence[str] = ("llada-8b", "llama-3-8b")
    quantizations: Sequence[str] = ("bf16", "fp8")
    rates: Sequence[float] = (2.9, 10.0)
    device: str = "cuda"
    cached: int = 640
    steps: int = 600

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if shape not in SHAPES:
                raise InvalidParams("shape", shape, f"one of {', '.join(SHAPES)}")
        for name in self.quantizations:
            if name not in (known := (*DTYPES, *QUANTIZED)):
                raise InvalidParams("quantization", name, f"one of {', '.join(known)}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InvalidParams("device", self.device, "cpu here: torch sees no GPU")


def compare_shapes(
    settings: ShapeSettings, note: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run every shape in every quantisation, one model at a time; `note` gets what there is."""
    results: dict[str, Any] = {}
    if settings.device.startswith("cuda"):
        results["device"] = {"name": torch.cuda.get_device_name()}
    for shape in settings.shapes:
        for quantization in settings.quantizations:
            try:
                _answer(settings, shape, quantization, results)
            except Exception as failure:  # later models shall be timed all the same
                results[f"{shape} {quantization}"] = {"failure": repr(failure)[:500]}
            note(results)
    return results


def _answer(
    settings: ShapeSettings, shape: str, quantization: str, results: dict[str, Any]
) -> None:
    config = SHAPES[shape]
    began = time.perf_counter()
    backend = shape_backend(shape, quantization, settings.device)
    load_s = round(time.perf_counter() - began, 2)
    try:
        began = time.perf_counter()
        backend.warm_up()
        warm_up_s = round(time.perf_counter() - began, 2)
        rates = [AR_RATE] if config.native_block_size == 1 else settings.rates
        for rate in rates:
            found = time_engine(backend, rate, cached=settings.cached, steps=settings.steps)
            mode = "autoregressive" if config.native_block_size == 1 else f"{rate:g} tokens a step"
            origin = {"runner": backend.choice.name, "load_s": load_s, "warm_up_s": warm_up_s}
            results[f"{shape} {quantization}, {mode}"] = {**found, **origin}
    finally:
        backend.close()
        if settings.device.startswith("cuda"):
            torch.cuda.empty_cache()


def shape_backend(
    shape: str, quantization: str, device: str = "cuda", *, max_len: int | None = None
) -> TorchBackend:
    """Return a backend over random weights of a published shape; `max_len` instead of its own."""
    config = SHAPES[shape]
    config = config if max_len is None else replace(config, max_len=max_len)
    dtype = DTYPES.get(quantization, torch.bfloat16)
    return TorchBackend(
        random_model(config, device=device, dtype=dtype, quantization=quantization),
        name=shape,
        device=device,
        dtype=dtype,
        quantization=QUANTIZED.get(quantization),
        consume=True,
    )
