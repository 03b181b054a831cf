r"""Measures products with a draft adapter's factors on a GPU: in one launch, and apart, by rows.

    python -m lab.bench.drafted_products --shape smollm2-135m --seconds 90 --output record.json

A CUDA graph holds the product of each of 24 layers, so that weights come from memory as in a step;
half of the rows are drafts, of a single row none. Predicted: launches are what counts below 64
rows, so that one launch takes about the time of the weight's product alone.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from triton.errors import TritonError

from d2f_runtime.kernels.drafted import Cut, TiledFactors, drafted_product
from lab.records import command_of, write_record

__all__ = ["main"]

LAYERS: Final = 24
ROUNDS: Final = 7
RANK: Final = 64


@dataclass(frozen=True, slots=True)
class _Product:
    name: str
    num_outputs: int
    num_features: int
    blocks: tuple[int, ...]  # outputs that share a rank's range; () is all with twice the rank
    may_split: bool


def _products(hidden: int, heads: int, kv: int, inner: int) -> tuple[_Product, ...]:
    return (
        _Product("qkv", heads + 2 * kv, hidden, (heads, kv, kv), False),
        _Product("out", hidden, heads, (hidden,), True),
        _Product("gate_up", 2 * inner, hidden, (), False),
        _Product("down", hidden, inner, (hidden,), True),
    )


SHAPES: Final = {
    "smollm2-135m": _products(576, 576, 192, 1536),
    "qwen2.5-0.5b": _products(896, 896, 128, 4864),
    "tiny": _products(64, 64, 32, 128),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the arguments say; the record is written anew after each product."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.drafted_products")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 32, 64, 128, 256])
    parser.add_argument("--outputs", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--warps", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--splits", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--stages", nargs="+", type=int, default=[4])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing begins later")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    began = time.monotonic()
    command = command_of("lab.bench.drafted_products", list(argv or ()))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "products": []}
    for rows, product in itertools.product(args.rows, SHAPES[args.shape]):
        if time.monotonic() - began > args.seconds:
            results["left_out"] = [*results.get("left_out", []), [product.name, rows]]
            continue
        found = _measured(product, rows, args)
        results["products"].append(found)
        print(json.dumps(found), flush=True)
        write_record(args.output, "drafted-products", results, command=command)


def _measured(product: _Product, num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(num_rows, product.num_features, **like)  # type: ignore[call-overload]
    flags = (torch.arange(num_rows, device="cuda") % 2).int()
    shares = flags[:, None].to(torch.bfloat16)
    layers = [_layer(product) for _ in range(LAYERS)]

    def apart(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        out = torch.nn.functional.linear(x, weight)
        return out.addmm_((x @ down.T).mul_(shares), up.T)

    found: dict[str, Any] = {"product": product.name, "rows": num_rows, "us": {}}
    found["us"]["weight alone"] = _microseconds(
        [partial(torch.nn.functional.linear, x, weight) for weight, _, _ in layers]
    )
    found["us"]["apart"] = _microseconds([partial(apart, *layer) for layer in layers])
    wanted = apart(*layers[0]).float()
    for outputs in args.outputs:
        tiled = [TiledFactors.of(down, up, outputs) for _, down, up in layers]
        if tiled[0] is None:
            continue
        for warps, splits, stages in itertools.product(args.warps, args.splits, args.stages):
            steps = product.num_features // 64
            if splits > (steps // 2 if product.may_split else 1):
                continue
            cut = Cut(splits=splits, warps=warps, stages=stages)
            calls = [
                partial(drafted_product, x, weight, factors, flags, cut=cut)
                for (weight, _, _), factors in zip(layers, tiled, strict=True)
                if factors is not None
            ]
            name = f"{outputs} outputs, {warps} warps, {splits} splits, {stages} stages"
            try:
                parts = calls[0]().float().sum(dim=0)
                error = ((parts - wanted).abs().max() / wanted.abs().max()).item()
                found["us"][name] = _microseconds(calls) if error < 0.03 else f"wrong: {error:.3f}"
            except TritonError as error:  # a tiling that does not fit must not end the others
                found["us"][name] = f"{type(error).__name__}: {str(error)[:80]}"
    return found


def _layer(product: _Product) -> tuple[Tensor, Tensor, Tensor]:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    size = product.num_features
    weight = torch.randn(product.num_outputs, size, **like) / size**0.5  # type: ignore[call-overload]
    num_ranks = RANK * (len(product.blocks) or 2)
    down = torch.randn(num_ranks, size, **like) / size**0.5  # type: ignore[call-overload]
    up = torch.zeros(product.num_outputs, num_ranks, **like)  # type: ignore[call-overload]
    if not product.blocks:
        up.normal_(std=0.1)
    first = 0
    for index, outputs in enumerate(product.blocks):
        up[first : first + outputs, index * RANK : (index + 1) * RANK].normal_(std=0.1)
        first += outputs
    return weight, down, up


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return the time of one call, all in one graph; the median of rounds."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = _event(), _event()
    times: list[float] = []
    for _ in range(ROUNDS):
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (5 * len(calls)))
    return round(statistics.median(times), 2)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
