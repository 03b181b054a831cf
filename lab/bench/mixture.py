"""A mixture of experts on a GPU: its products alone, and whole steps by the number of rows.

Floors come first: the bytes of the weights that a step must read, over the rate of the memory. Of
the experts it must read those that a row chose: with `n` rows, `c` choices and `e` experts a share
of 1 - (1 - c / e) ** n of them if rows choose at random, and how many it was is measured.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

import torch

from d2f_runtime.kernels import experts as kernels
from d2f_runtime.kernels.activation import quantise_rows
from d2f_runtime.kernels.expert_weights import ExpertWeights, pack_fp8, pack_nf4
from d2f_runtime.kernels.experts import ExpertTiling, expert_tiling
from d2f_runtime.kernels.routing import Routes, route, route_reference
from d2f_runtime.models.mixture_config import MixtureConfig
from d2f_runtime.quantization.nf4 import quantise_nf4
from lab.bench.mixture_steps import floors, time_mixture
from lab.bench.step import device_times
from lab.bench.step_models import SHAPES
from lab.records import spread

__all__ = ["MixtureSettings", "time_mixtures"]

BITS: Final = {"bf16": 16, "fp8": 8, "nf4": 4}
CANDIDATES: Final = {  # outputs, features, stages and warps of a tile
    ("bf16", True): [(64, 64, 4, 4), (64, 128, 3, 4), (64, 64, 6, 4), (128, 64, 3, 8)],
    ("bf16", False): [(64, 128, 4, 4), (64, 64, 6, 4), (128, 128, 3, 8), (64, 256, 2, 4)],
    ("fp8", True): [(64, 64, 5, 4), (64, 64, 8, 4), (128, 64, 5, 8)],
    ("fp8", False): [(64, 64, 5, 4), (64, 64, 8, 4), (128, 64, 5, 8)],
    ("nf4", True): [(64, 128, 4, 4), (64, 128, 6, 4), (128, 128, 4, 8)],
    ("nf4", False): [(64, 128, 4, 4), (64, 128, 3, 4), (128, 128, 3, 8)],
}


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """What to time.

    Attributes:
        shape: of `SHAPES`.
        quantizations: of the experts, in this order.
        device: "cuda", or "cpu" to rehearse.
        cached: tokens before the window.
        widths: of windows, in this order.
        budget_s: seconds after which no further measurement begins.
        rate: bytes per second that the memory gives at most; of an H200 as it is sold.
    """

    shape: str = "llada2-mini"
    quantizations: tuple[str, ...] = ("bf16", "nf4", "fp8")
    device: str = "cuda"
    cached: int = 640
    widths: tuple[int, ...] = (32, 1, 128, 8, 64, 256)
    budget_s: float = 200.0
    rate: float = 4.8e12


def time_mixtures(
    settings: MixtureSettings, note: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run everything that fits into the budget; `note` gets the results so far, again and again."""
    results: dict[str, Any] = {"floors": floors(settings), "seconds": {}}
    began = time.perf_counter()

    def run(name: str, part: Callable[[], Any]) -> None:
        """Run a part by itself: its failure is its result."""
        if (spent := time.perf_counter() - began) > settings.budget_s:
            results[name] = "left out: the time was up"
            return
        try:
            results[name] = part()
        except Exception as failure:
            results[name] = repr(failure)[:2000]
        took = round(time.perf_counter() - began - spent, 1)
        results["seconds"][name] = took
        sys.stderr.write(f"{name}: {took} s\n{json.dumps(results[name])}\n")
        note(results)

    note(results)
    if settings.device == "cuda":
        results["device"] = torch.cuda.get_device_name()
        run("copied_gb_s", _copy_rate)
    for quantization in settings.quantizations:
        run(f"errors {quantization}", partial(_errors, settings, quantization))
    run("routes", partial(_routes, settings))
    chosen: dict[tuple[int, bool], ExpertTiling] = {}
    for quantization in settings.quantizations:
        run(f"tilings {quantization}", partial(_tilings, settings, quantization, chosen))
    with _tiled(partial(_chosen_tiling, chosen)):
        for quantization in settings.quantizations:
            found: dict[str, Any] = {}
            results[f"steps {quantization}"] = found

            def steps(quantization: str = quantization, found: dict[str, Any] = found) -> Any:
                left = settings.budget_s - (time.perf_counter() - began)
                time_mixture(settings, quantization, found, left, partial(note, results))
                return found

            run(f"steps {quantization}", steps)
    return results


@contextmanager
def _tiled(choose: Callable[..., ExpertTiling]) -> Iterator[None]:
    """Let the products be cut in another way."""
    kernels.expert_tiling = choose
    try:
        yield
    finally:
        kernels.expert_tiling = expert_tiling


def _chosen_tiling(
    chosen: dict[tuple[int, bool], ExpertTiling], num_rows: int, *, bits: int, gated: bool
) -> ExpertTiling:
    """Return the tiling that was fastest, with as many rows as ever."""
    usual = expert_tiling(num_rows, bits=bits, gated=gated)
    return replace(chosen.get((bits, gated), usual), rows=usual.rows)


def _copy_rate() -> float:
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), 20)
    return round(2 * source.numel() / spread(times)["median"] / 1e6, 1)


def _config(settings: MixtureSettings) -> tuple[MixtureConfig, int, int]:
    """Return the experts, how many all rows go through, and the hidden size."""
    config = SHAPES[settings.shape]
    assert config.mixture is not None
    mixture = config.mixture
    return mixture, mixture.shared_size // mixture.ffn_size, config.hidden_size


def _random_experts(
    settings: MixtureSettings, quantization: str, number: int
) -> tuple[ExpertWeights, ExpertWeights]:
    mixture, _, size = _config(settings)
    inner = mixture.ffn_size
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32

    def one(outputs: int, features: int) -> Any:
        weight = torch.randn(outputs, features, device=settings.device) / features**0.5
        if quantization == "nf4":
            stored = quantise_nf4(weight)
            return pack_nf4(stored.codes_by_row(), stored.scales_by_row())
        if quantization == "fp8":
            rows = quantise_rows(weight)
            assert rows.scale is not None
            return pack_fp8(rows.values, rows.scale)
        return weight.to(dtype), None

    gate_up = ExpertWeights.stacked((one(2 * inner, size) for _ in range(number)), number)
    return gate_up, ExpertWeights.stacked((one(size, inner) for _ in range(number)), number)


def _random_rows(settings: MixtureSettings, num_rows: int) -> tuple[torch.Tensor, Routes]:
    mixture, always, size = _config(settings)
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    x = torch.randn(num_rows, size, device=settings.device).to(dtype)
    weight = torch.randn(mixture.num_experts, size, device=settings.device) / size**0.5
    return x, route(x, weight, None, rule=mixture, num_always=always)


def _errors(settings: MixtureSettings, quantization: str) -> dict[str, Any]:
    """Return the error of products over the norm of what is right, and the largest one."""
    mixture, always, _ = _config(settings)
    weights = _random_experts(settings, quantization, mixture.num_experts + always)
    found: dict[str, Any] = {}
    for num_rows in (20, 256) if settings.device == "cuda" else (1, 20):
        x, routes = _random_rows(settings, num_rows)
        out = kernels.through_experts(x, routes, *weights).double()
        wanted = kernels.through_experts_reference(x.double(), routes, *weights)
        found[f"{num_rows} rows"] = {
            "relative": float((out - wanted).norm() / wanted.norm()),
            "largest": float((out - wanted).abs().max()),
            "of": float(wanted.abs().max()),
        }
    return found


def _routes(settings: MixtureSettings) -> dict[str, Any]:
    """Return which share of rows choose as the reference does, and the time that it takes."""
    mixture, always, size = _config(settings)
    found: dict[str, Any] = {}
    for num_rows in (1, 32, 256) if settings.device == "cuda" else (1, 20):
        x, _ = _random_rows(settings, num_rows)
        weight = torch.randn(mixture.num_experts, size, device=settings.device) / size**0.5
        bias = torch.randn(mixture.num_experts, device=settings.device) * 0.1
        given: dict[str, Any] = {"rule": mixture, "num_always": always}
        routes = route(x, weight, bias, **given)
        wanted = route_reference(x, weight, bias, **given)
        same = (routes.chosen == wanted.chosen).all(dim=1)
        found[f"{num_rows} rows"] = {
            "same": float(same.float().mean()),
            "weights": float((routes.weights - wanted.weights)[same].abs().max()),
            "experts": int((routes.counts > 0).sum()),
            "counts_right": bool((routes.counts.sum() == routes.chosen.numel()).item()),
            "ms": spread(_times(settings, partial(route, x, weight, bias, **given))),
        }
    return found


def _tilings(
    settings: MixtureSettings, quantization: str, chosen: dict[tuple[int, bool], ExpertTiling]
) -> dict[str, Any]:
    """Time candidates at 32 rows, and keep the fastest of each product in `chosen`."""
    mixture, always, size = _config(settings)
    number = mixture.num_experts + always
    gate_up, down = _random_experts(settings, quantization, number)
    x, routes = _random_rows(settings, 32)
    touched = int((routes.counts > 0).sum())
    wide = torch.randn(routes.chosen.numel(), mixture.ffn_size, device=x.device).to(x.dtype)
    parts = x.new_empty((routes.chosen.shape[1], 32, size))
    found: dict[str, Any] = {"experts": touched}
    products = {True: (x, wide, gate_up, mixture.ffn_size), False: (wide, parts, down, size)}
    for gated, (source, out, weights, outputs) in products.items():
        name = "gate and up" if gated else "down"
        floor = weights.num_bytes / number * touched / settings.rate * 1e3
        found[f"{name}, floor_ms"] = round(floor, 4)
        best = float("inf")
        for cut in CANDIDATES[quantization, gated]:
            outputs_of, features, stages, warps = cut
            tiling = ExpertTiling(16, outputs_of, features, stages, warps)
            label = f"{name}, {outputs_of} x {features}, {stages} stages, {warps} warps"
            launch = partial(kernels._launch, source, out, routes, weights, outputs, gated=gated)
            try:
                with _tiled(lambda *_, tiling=tiling, **__: tiling):
                    times = spread(_times(settings, launch), 4)
            except Exception as failure:
                found[label] = repr(failure)[:300]
                continue
            found[label] = times
            if times["median"] < best:
                best = times["median"]
                chosen[BITS[quantization], gated] = tiling
                found[f"{name}, best"] = asdict(tiling) | {"over_floor": round(best / floor, 2)}
    return found


def _times(settings: MixtureSettings, launch: Callable[[], object]) -> list[float]:
    """Return milliseconds of a launch: on the device, or here."""
    if settings.device == "cuda":
        return device_times(launch, 30)
    began = time.perf_counter()
    launch()
    return [(time.perf_counter() - began) * 1e3]
