"""Time of a D2F step of the torch backend: on the device, in the backend, in the whole engine."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch

from d2f_runtime.backends.base import Slot, StepRow
from d2f_runtime.backends.buckets import bucket_for
from d2f_runtime.backends.choice import QUANTIZATIONS
from d2f_runtime.backends.fast_runner import FastRunner
from d2f_runtime.backends.torch_backend import QUANTIZED, TorchBackend
from d2f_runtime.decoding.window import Window
from d2f_stream.core.errors import InvalidParams
from lab.bench.step_engine import time_engine
from lab.bench.step_models import SHAPES, floor_bytes, random_model
from lab.records import spread

__all__ = ["StepSettings", "device_times", "fill_cache", "kernel_times", "slot_of", "time_steps"]

WIDTHS = (1, 16, 32, 64, 128, 160, 256)
BLOCK = 32
READ_RATE = 3.0e12  # bytes per second that an H100's memory gives, measured


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What to time.

    Attributes:
        shapes: of `SHAPES`.
        quantizations: of `QUANTIZATIONS`.
        device: "cuda" or "cpu".
        cached: tokens before the window.
        widths: of windows.
        rates: emulated acceptances per step.
        steps: of each engine measurement, at least.
        budget_s: seconds after which no further measurement begins.
        checks: compare kernels and steps with their references first.
        runner: of the backend.
    """

    shapes: Sequence[str] = ("llada-8b",)
    quantizations: Sequence[str] = ("bf16", "fp8")
    device: str = "cuda"
    cached: int = 640
    widths: Sequence[int] = WIDTHS
    rates: Sequence[float] = (2.9, 10.0)
    steps: int = 200
    budget_s: float = 300.0
    checks: bool = True
    runner: Literal["auto", "fast", "plain"] = "auto"

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("shape", self.shapes, tuple(SHAPES)),
            ("quantization", self.quantizations, QUANTIZATIONS),
        ):
            for name in given:
                if name not in known:
                    raise InvalidParams(kind, name, f"one of {', '.join(known)}")


def time_steps(
    settings: StepSettings, note: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Run everything that fits into the budget; `note` gets the results so far, again and again."""
    results: dict[str, Any] = {}
    ends = time.perf_counter() + settings.budget_s
    if settings.device.startswith("cuda"):
        results["device"] = {
            "name": torch.cuda.get_device_name(),
            "matrix_rate_tflops": round(_matrix_rate(), 1),
        }
    for shape in settings.shapes:
        for quantization in settings.quantizations:
            found: dict[str, Any] = {}
            results[f"{shape} {quantization}"] = found
            try:
                _time_model(settings, shape, quantization, found, ends, lambda: note(results))
            except Exception as failure:  # later models shall be timed all the same
                found["failure"] = repr(failure)[:500]
            note(results)
            if settings.device.startswith("cuda"):
                torch.cuda.empty_cache()
    return results


def _time_model(
    settings: StepSettings,
    shape: str,
    quantization: str,
    found: dict[str, Any],
    ends: float,
    note: Callable[[], None],
) -> None:
    config = SHAPES[shape]
    is_cuda = settings.device.startswith("cuda")
    dtype = torch.float32 if quantization == "fp32" else torch.bfloat16
    if settings.checks and is_cuda:
        from lab.bench.step_checks import check_kernels

        found["kernel_errors"] = {
            rows: check_kernels(
                config, num_rows=rows, cached=settings.cached, quantization=quantization
            )
            for rows in (128, 32)
        }
        note()
    began = time.perf_counter()
    model = random_model(config, device=settings.device, dtype=dtype, quantization=quantization)
    backend = TorchBackend(
        model,
        name=shape,
        device=settings.device,
        dtype=dtype,
        quantization=QUANTIZED.get(quantization),
        runner=settings.runner,
        consume=True,
    )
    del model
    found["load_s"] = round(time.perf_counter() - began, 2)
    found["runner"] = f"{backend.choice.name}: {backend.choice.reason}"
    found["floor_ms"] = round(
        floor_bytes(config, quantization=quantization, cached=settings.cached) / READ_RATE * 1e3, 3
    )
    if isinstance(backend._runner, FastRunner):
        found["weight_mb"] = round(backend._runner._model.weight_bytes / 1e6, 1)
    stages: list[tuple[str, Callable[[], Any]]] = []
    widths = [1] if config.native_block_size == 1 else settings.widths
    stages += [(f"window {width}", partial(_window, backend, width, settings)) for width in widths]
    rates = [1.0] if config.native_block_size == 1 else settings.rates
    timed = partial(time_engine, backend, cached=settings.cached, steps=settings.steps)
    stages += [(f"engine at {rate:g}", partial(timed, rate)) for rate in rates]
    if is_cuda:
        busiest = widths[-1] if len(widths) == 1 else 128 if 128 in widths else widths[0]
        stages.append(("kernels", lambda: _breakdown(backend, busiest, settings.cached)))
        stages.append(("prefill", lambda: _prefill(backend, 2048)))
    for name, stage in stages:
        if time.perf_counter() > ends:
            found[name] = "left out: the time was up"
            continue
        try:
            found[name] = stage()
        except Exception as failure:
            found[name] = repr(failure)[:500]
        note()
    runner = backend._runner
    if isinstance(runner, FastRunner):
        found["graph_mb"] = {
            f"{bucket.rows} rows": round(size / 1e6, 1)
            for bucket, size in runner.graph_bytes.items()
        }
    backend.close()


def _row(backend: TorchBackend, slot: Slot, width: int, cached: int) -> StepRow:
    """A window of masks after `cached` tokens; a lone last mask runs no row, so one token more."""
    info = backend.info
    shift = int(info.shift_logits and info.native_block_size == 1)
    tokens = (5,) * shift + (info.mask_id,) * width
    stop = cached + len(tokens)
    block = info.native_block_size if info.native_block_size == 1 else BLOCK
    stops = tuple(sorted({*range(cached + block, stop, block), stop}))
    return StepRow(slot, Window(cached, tokens, 0, stops))


@contextmanager
def slot_of(backend: TorchBackend, capacity: int) -> Iterator[Slot]:
    """Open a slot for a while."""
    slot = backend.open_slot(capacity)
    try:
        yield slot
    finally:
        backend.close_slot(slot)


def fill_cache(backend: TorchBackend, slot: Slot, number: int) -> None:
    """Cache so many tokens as a prompt."""
    tokens = tuple(10 + i % 100 for i in range(number))
    stops: tuple[int, ...] = (number,)
    if backend.info.prompt_attention == "causal":
        stops = tuple(range(1, number + 1))
    backend.step([StepRow(slot, Window(0, tokens, number, stops))])


def _window(backend: TorchBackend, width: int, settings: StepSettings) -> dict[str, Any]:
    """Time steps of one fixed window: whole backend calls, and the device alone."""
    cached = min(settings.cached, backend.info.max_len - width - 2)
    found: dict[str, Any] = {}
    runner = backend._runner
    bucket = bucket_for(width, 1)
    with slot_of(backend, cached + width + 1) as slot:
        fill_cache(backend, slot, cached)
        row = _row(backend, slot, width, cached)
        for _ in range(5):
            backend.step([row])
        walls = []
        for _ in range(settings.steps):
            began = time.perf_counter()
            backend.step([row])
            walls.append((time.perf_counter() - began) * 1e3)
        found["backend_ms"] = spread(walls)
        if isinstance(runner, FastRunner) and bucket is not None and settings.device != "cpu":
            found["bucket"] = bucket.rows
            found["device_ms"] = spread(device_times(lambda: runner.replay(bucket)))
    return found


def device_times(launch: Callable[[], object], number: int = 50) -> list[float]:
    """Return milliseconds on the device between events, launches queued behind one another."""
    events: list[torch.cuda.Event] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(number + 1)
    ]
    for _ in range(3):
        launch()
    for event in events[:-1]:
        event.record()
        launch()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def kernel_times(run: Callable[[], object], *, number: int = 5) -> dict[str, dict[str, float]]:
    """Return microseconds per run of each kernel, the longest first, and its launches.

    Launches wait inside for the kernel before, so they overlap.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(number):
            run()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
    return {
        event.key[:120]: {
            "total": round(event.device_time_total / number, 1),
            "launches": event.count // number,
            "each": round(event.device_time_total / max(1, event.count), 2),
        }
        for event in events[:24]
    }


def _breakdown(backend: TorchBackend, width: int, cached: int) -> dict[str, Any]:
    """Return microseconds per step of each kernel."""
    runner = backend._runner
    bucket = bucket_for(width, 1)
    if not isinstance(runner, FastRunner) or bucket is None:
        return {}
    with slot_of(backend, cached + width + 1) as slot:
        fill_cache(backend, slot, cached)
        backend.step([_row(backend, slot, width, cached)])
        return {"width": width, "us_per_step": kernel_times(lambda: runner.replay(bucket))}


def _prefill(backend: TorchBackend, number: int) -> dict[str, Any]:
    """Time a prompt and compare with the matrix rate."""
    number = min(number, backend.info.max_len)
    walls = []
    with slot_of(backend, number) as slot:
        for _ in range(6):
            began = time.perf_counter()
            fill_cache(backend, slot, number)
            walls.append((time.perf_counter() - began) * 1e3)
    config = SHAPES[backend.info.name]
    size, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    layer = 2 * size * config.head_dim * heads + 3 * size * config.ffn_size
    weights = config.num_layers * layer
    attention = 4 * config.num_layers * number * config.num_heads * config.head_dim  # per token
    work = number * (2 * weights + attention)
    median = spread(walls[1:])["median"]
    return {"tokens": number, "ms": spread(walls[1:]), "tflops": round(work / median / 1e9, 1)}


def _matrix_rate() -> float:
    """Return Tflop/s of a large bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    times = device_times(lambda: torch.mm(a, b), 20)
    return 2 * 8192**3 / spread(times)["median"] / 1e9
