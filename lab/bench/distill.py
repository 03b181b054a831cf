"""Times distillation steps at a published shape with random weights, made on the device itself.

    python -m lab.bench.distill --shape llada-8b --length 512 --output record.json

Prints the memory plan of each case beside the measured peak, and tokens per second, which count
every position of a sequence once: prompt, answer and padding.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from d2f_export.distill.feed import Batch
from d2f_export.distill.log import show_plan
from d2f_export.distill.memory import GIB, check_fits, num_parameters, plan_memory
from d2f_export.distill.run import distiller_of
from d2f_export.distill.settings import DistillSettings
from d2f_export.distill.trainer import Trainer, available_bytes, open_accelerator, resolve
from d2f_runtime.models.config import TransformerConfig
from d2f_runtime.provenance import environment
from lab.bench.step_models import SHAPES, random_model
from lab.records import command_of

__all__ = ["main"]

WARM_UP = 2
PROMPT_SHARE = 0.25

Attention = Literal["flex", "dense"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases of the command line and write their record."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench.distill", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llada-8b")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--attention", choices=("auto", "flex", "dense"), nargs="+", default=["auto"]
    )
    parser.add_argument("--checkpointing", choices=("on", "off"), nargs="+", default=["on"])
    parser.add_argument("--steps", type=int, default=8, help="timed ones of each case")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no case after these")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    started, console = time.monotonic(), Console()
    bench = _Bench(args, console)
    results: list[dict[str, Any]] = []
    cases = itertools.product(args.micro_batch, args.attention, args.checkpointing)
    for micro_batch, attention, checkpointing in cases:
        if results and time.monotonic() - started > args.seconds:
            console.print(f"left out: {micro_batch=} {attention=} {checkpointing=}")
            continue
        results.append(bench.case(micro_batch, attention, is_recomputing=checkpointing == "on"))
        console.print(json.dumps(results[-1]), soft_wrap=True, highlight=False)
    if args.output is not None:
        given = list(argv) if argv is not None else []
        origin = environment(command_of("lab.bench.distill", given))
        origin |= {"device": bench.device_name}
        record = {"benchmark": "distill", **origin, "results": results}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class _Bench:
    """One model, whose distillation is timed in several cases."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self._config: TransformerConfig = SHAPES[args.shape]
        self._args = args
        self._console = console
        settings = self._settings(1, "auto", is_recomputing=True)
        accelerator = open_accelerator(settings, cpu=args.cpu)
        self._device: torch.device = accelerator.device
        self._is_cuda = self._device.type == "cuda"
        self._compute = resolve(settings, self._device.type)
        is_flex = self._compute.attention == "flex"
        plan = plan_memory(self._config, settings, is_bf16=self._compute.is_bf16, is_flex=is_flex)
        check_fits(plan, available_bytes(self._device), settings)
        student = random_model(self._config, device=str(self._device), dtype=self._compute.dtype)
        distiller = distiller_of(settings, student, None, compute=self._compute)
        self._trainer = Trainer(settings, distiller, accelerator=accelerator)

    @property
    def device_name(self) -> str:
        """What it runs on."""
        return torch.cuda.get_device_name(self._device) if self._is_cuda else "cpu"

    def case(self, micro_batch: int, attention: str, *, is_recomputing: bool) -> dict[str, Any]:
        """Time some steps and return the figures."""
        settings = self._settings(micro_batch, attention, is_recomputing=is_recomputing)
        kind = self._compute.attention if attention == "auto" else attention
        plan = plan_memory(
            self._config, settings, is_bf16=self._compute.is_bf16, is_flex=kind == "flex"
        )
        show_plan(self._console, plan, available_bytes(self._device))
        distiller = self._trainer.accelerator.unwrap_model(self._trainer.distiller)
        distiller.attention, distiller.checkpointing = kind, is_recomputing
        batches = self._batches(micro_batch)
        if self._is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        begun = time.monotonic()
        seconds, losses = [], []
        for number in range(WARM_UP + self._args.steps):
            before = time.monotonic()
            losses.append(self._trainer.step(number, batches).item())  # waits for the device
            seconds.append(time.monotonic() - before)
        timed = statistics.median(seconds[WARM_UP:])
        tokens = micro_batch * self._args.length
        return {
            "shape": self._args.shape,
            "parameters": num_parameters(self._config),
            "length": self._args.length,
            "micro_batch": micro_batch,
            "attention": kind,
            "checkpointing": is_recomputing,
            "dtype": str(self._compute.dtype).removeprefix("torch."),
            "planned_gib": round(plan.total / GIB, 2),
            "peak_allocated_gib": self._peak(torch.cuda.max_memory_allocated),
            "peak_reserved_gib": self._peak(torch.cuda.max_memory_reserved),
            "step_ms": round(1000 * timed, 1),
            "step_ms_all": [round(1000 * value, 1) for value in seconds],
            "tokens_per_s": round(tokens / timed, 1),
            "losses": [round(loss, 4) for loss in losses],
            "case_s": round(time.monotonic() - begun, 1),
        }

    def _peak(self, read: Any) -> float | None:
        return round(read(self._device) / GIB, 2) if self._is_cuda else None

    def _settings(
        self, micro_batch: int, attention: Any, *, is_recomputing: bool
    ) -> DistillSettings:
        return DistillSettings(
            model=self._args.shape,
            data=("random",),
            length=self._args.length,
            micro_batch=micro_batch,
            accumulation=1,
            attention=attention,
            checkpointing=is_recomputing,
        )

    def _batches(self, micro_batch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        shape = (micro_batch, self._args.length)
        prompt_len = int(PROMPT_SHARE * self._args.length)
        while True:
            tokens = torch.randint(4, self._config.num_tokens, shape, generator=generator)
            tokens[tokens == self._config.mask_id] = 4
            yield Batch(tokens, torch.full((micro_batch,), prompt_len))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
