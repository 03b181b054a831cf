"""Steps of many rows and sessions: captured and uncaptured, beside their floor; their kernels.

    python -m lab.bench.wide_steps --quantization bf16 --quantization fp8 --output FILE

Random weights of a published shape. A step's floor is what its arithmetic takes at the matrix rate
that the GPU is sold with, or what reading weights and K/V takes, whichever is more. On the device a
wide step is timed without its head, which is no part of the graph.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch

from d2f_runtime.backends import fast_runner
from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.buckets import Bucket, bucket_for
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_runtime.kernels import attention, streamed_attention
from d2f_runtime.models.config import TransformerConfig
from lab.bench.library_products import library_rates
from lab.bench.step import device_times, fill_cache, kernel_times, slot_of
from lab.bench.step_models import SHAPES, floor_bytes
from lab.bench.stream_shapes import shape_backend
from lab.records import command_of, spread, write_record

__all__ = ["CASES", "floor_ms", "time_wide_steps"]

CASES: Final = (
    *((660, sessions) for sessions in (16, 32, 8, 64)),
    *((385, 8), (385, 32), (1320, 32), (2048, 64), (64, 8), (128, 8), (256, 8)),
)
"""(rows in all, sessions), most wanted first."""
CACHED: Final = 640
BLOCK: Final = 32
RATES: Final = {"fp8": 1979e12}  # of the matrix units, operations a second; else BF16
BF16: Final = 989e12
READ: Final = 4.8e12  # bytes a second
BUSIEST: Final = (660, 16)

ATTENTIONS: Final = {
    "with the copy engine": ((streamed_attention, "MAX_ROWS", 2048),),
    "2 stages": ((attention, "STAGES", 2),),
    "8 warps": ((attention, "WARPS", 8),),
    "blocks of 128 keys": ((attention, "BLOCK", 128),),
    "128 queries": ((attention, "TILE", 128), (attention, "WARPS", 8)),
}
"""Ways to cut it: constants of its modules."""

Note = Callable[[], None]


def floor_ms(
    config: TransformerConfig, quantization: str, rows: int, sessions: int
) -> dict[str, float]:
    """Return milliseconds that a step's arithmetic and its reads take at least."""
    width = config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layer = config.hidden_size * width + 3 * config.hidden_size * config.ffn_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    seen = CACHED + rows / sessions
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    arithmetic = 2 * weights / RATES.get(quantization, BF16) + attention / BF16
    read = floor_bytes(config, quantization=quantization, cached=CACHED * sessions)
    found = {"arithmetic": rows * arithmetic * 1e3, "read": read / READ * 1e3}
    return {name: round(value, 4) for name, value in found.items()}


def time_wide_steps(
    shape: str, quantization: str, *, seconds: float, found: dict[str, Any], note: Note
) -> None:
    """Fill `found`, the most wanted first; call `note` after each figure.

    Args:
        shape: of `SHAPES`.
        quantization: of the weights.
        seconds: after which no further measurement begins.
        found: gets the figures.
        note: called whenever there is a new one.
    """
    began = time.perf_counter()
    config = SHAPES[shape]
    most = max(sessions for _, sessions in CASES)
    room = CACHED + max(-(-rows // sessions) for rows, sessions in CASES) + 2
    backend = shape_backend(shape, quantization, max_len=most * room)
    found["load_s"] = round(time.perf_counter() - began, 2)
    runner = backend._runner
    assert isinstance(runner, FastRunner)
    with ExitStack() as held:
        held.callback(backend.close)
        slots = [held.enter_context(slot_of(backend, room)) for _ in range(most)]
        for slot in slots:
            fill_cache(backend, slot, CACHED)
        found["filled_s"] = round(time.perf_counter() - began, 2)
        cases: dict[str, Any] = found.setdefault("cases", {})
        stages: list[tuple[dict[str, Any], str, Callable[[], Any]]] = [
            (
                cases,
                f"{rows} rows, {sessions} sessions",
                partial(_case, backend, runner, slots, rows, sessions, config, quantization),
            )
            for rows, sessions in CASES
        ]
        further: list[tuple[dict[str, Any], str, Callable[[], Any]]] = [
            (found, "kernels", partial(_kernels, backend, slots)),
            (found, "attentions", partial(_attentions, backend, runner, slots)),
            (found, "products", partial(library_rates, config, quantization)),
        ]
        for group, name, stage in [*stages[:2], *further, *stages[2:]]:
            if time.perf_counter() - began > seconds:
                group[name] = "left out: the time was up"
                continue
            try:
                group[name] = stage()
            except Exception as failure:  # what follows shall be timed all the same
                group[name] = repr(failure)[:500]
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {quantization} {name}: {group[name]}\n")
            sys.stderr.flush()
            note()
        found["graph_mb"] = {
            f"{bucket.rows} rows, {bucket.sessions} sessions": round(size / 1e6, 1)
            for bucket, size in runner.graph_bytes.items()
        }
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)


def _rows(backend: TorchBackend, slots: Sequence[Slot], rows: int, sessions: int) -> list[StepRow]:
    """Return windows of masks, as even as they can be."""
    made: list[StepRow] = []
    for number, slot in enumerate(slots[:sessions]):
        width = rows // sessions + (number < rows % sessions)
        stop = CACHED + width
        stops = tuple(sorted({*range(CACHED + BLOCK, stop, BLOCK), stop}))
        made.append(StepRow(slot, Window(CACHED, (backend.info.mask_id,) * width, 0, stops)))
    return made


def _walls(backend: TorchBackend, rows: Sequence[StepRow], number: int) -> dict[str, float]:
    for _ in range(3):
        backend.step(rows)
    walls: list[float] = []
    for _ in range(number):
        began = time.perf_counter()
        backend.step(rows)
        walls.append((time.perf_counter() - began) * 1e3)
    return spread(walls)


def _case(
    backend: TorchBackend,
    runner: FastRunner,
    slots: Sequence[Slot],
    rows: int,
    sessions: int,
    config: TransformerConfig,
    quantization: str,
) -> dict[str, Any]:
    floors = floor_ms(config, quantization, rows, sessions)
    floor = max(floors.values())
    bucket = bucket_for(rows, sessions)
    made = _rows(backend, slots, rows, sessions)
    began = time.perf_counter()
    backend.step(made)
    found: dict[str, Any] = {
        "floor_ms": floors,
        "first_s": round(time.perf_counter() - began, 2),
        "captured": None if bucket is None else [bucket.rows, bucket.sessions],
        "step_ms": _walls(backend, made, 20),
    }
    found["over_floor"] = round(found["step_ms"]["median"] / floor, 2)
    if bucket is not None:
        found["device_ms"] = spread(device_times(lambda: runner.replay(bucket), 15))
    if rows >= 385:
        with _beside_python():
            found["step_ms_beside_python"] = _walls(backend, made, 10)
        with mock.patch.object(fast_runner, "bucket_for", return_value=None):
            found["uncaptured_ms"] = _walls(backend, made, 10)
            with _beside_python():
                found["uncaptured_ms_beside_python"] = _walls(backend, made, 6)
    return found


@contextmanager
def _beside_python() -> Iterator[None]:
    """Let another thread run Python half of the time, as an event loop with many readers does."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            stop = time.perf_counter() + 1e-3
            while time.perf_counter() < stop:
                pass
            time.sleep(1e-3)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _kernels(backend: TorchBackend, slots: Sequence[Slot]) -> dict[str, dict[str, float]]:
    """Return the kernels of a step, head included."""
    rows = _rows(backend, slots, *BUSIEST)
    backend.step(rows)
    return kernel_times(lambda: backend.step(rows), number=3)


def _attentions(backend: TorchBackend, runner: FastRunner, slots: Sequence[Slot]) -> dict[str, Any]:
    """Time a step with attention cut otherwise, milliseconds on the device."""
    rows, bucket = _rows(backend, slots, *BUSIEST), bucket_for(*BUSIEST)
    assert bucket is not None
    found: dict[str, Any] = {"as it is": _replays(runner, bucket)}
    kept = runner._shapes[bucket]
    for name, changes in ATTENTIONS.items():
        del runner._shapes[bucket]
        with ExitStack() as changed:
            for module, constant, value in changes:
                changed.enter_context(mock.patch.object(module, constant, value))
            try:
                backend.step(rows)
                found[name] = _replays(runner, bucket)
            except Exception as failure:  # others may work
                found[name] = repr(failure)[:300]
        runner._shapes[bucket] = kept
    found["as it is, again"] = _replays(runner, bucket)
    return found


def _replays(runner: FastRunner, bucket: Bucket) -> dict[str, float]:
    return spread(device_times(lambda: runner.replay(bucket), 25))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, run, print and record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.wide_steps", description=__doc__)
    parser.add_argument("--shape", default="llada-8b", choices=SHAPES)
    parser.add_argument("--quantization", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=140.0, help="of all models together")
    parser.add_argument("--prediction", default="", help="written down before the run")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    command = command_of("lab.bench.wide_steps", sys.argv[1:] if argv is None else argv)
    results: dict[str, Any] = {
        "prediction": arguments.prediction,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }

    def note() -> None:
        write_record(arguments.output, "wide-steps", results, command=command)

    began = time.perf_counter()
    names = arguments.quantization or ["bf16", "fp8"]
    for number, quantization in enumerate(names):
        left = arguments.seconds - (time.perf_counter() - began)
        found: dict[str, Any] = {}
        results[f"{arguments.shape} {quantization}"] = found
        share = left / (len(names) - number)
        time_wide_steps(arguments.shape, quantization, seconds=share, found=found, note=note)
        note()
        torch.cuda.empty_cache()
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
