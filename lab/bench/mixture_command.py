"""The arguments of `lab.bench mixture`, without torch."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(mixture: argparse.ArgumentParser) -> None:
    """Add what the benchmark takes."""
    mixture.add_argument("--shape", default="llada2-mini", help="or tiny-mixture")
    mixture.add_argument("--quantization", action="append", help="bf16, nf4 or fp8; repeat")
    mixture.add_argument("--device", default="cuda", help="cpu rehearses, with TRITON_INTERPRET=1")
    mixture.add_argument("--cached", type=int, default=640, help="tokens before the window")
    mixture.add_argument("--width", type=int, action="append", help="of a window; repeat")
    mixture.add_argument("--seconds", type=float, default=200, help="begin nothing new after that")


def run(arguments: argparse.Namespace, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run it; `note` gets the results so far."""
    from lab.bench.mixture import MixtureSettings, time_mixtures

    settings = MixtureSettings(
        shape=arguments.shape,
        device=arguments.device,
        cached=arguments.cached,
        budget_s=arguments.seconds,
    )
    if arguments.quantization:
        settings = replace(settings, quantizations=tuple(arguments.quantization))
    if arguments.width:
        settings = replace(settings, widths=tuple(arguments.width))
    return time_mixtures(settings, note)
