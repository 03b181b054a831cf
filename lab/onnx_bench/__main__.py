"""Benchmarks of exported models: python -m lab.onnx_bench small|large --output FILE."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.records import command_of, write_record


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, run the benchmark, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m lab.onnx_bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("small", help="the embedded model on a CPU, by quantization")
    small.add_argument("--checkpoint", type=Path, required=True, help="of the student")
    small.add_argument("--twin", type=Path, help="artefact of the autoregressive twin")
    small.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt`")
    small.add_argument("--number", type=int, default=32, help="how many prompts")
    small.add_argument("--repeats", type=int, default=3, help="of the whole answers")
    small.add_argument("--turns", type=int, default=5, help="of the single steps")
    small.add_argument("--step-repeats", type=int, default=50, help="of a step in a turn")
    small.add_argument("--starts", type=int, default=5, help="of a new process")
    small.set_defaults(run=_small)
    large = commands.add_parser("large", help="a large shape with random weights, next to torch")
    large.add_argument("--shape", default="llada-8b", help="llada-8b, dream-7b or tiny")
    large.add_argument("--quantize", action="append", help="fp16, int4-fp16, fp32, int4; repeat")
    large.add_argument("--torch", action="append", help="bf16, fp8, nf4, fp32; repeat")
    large.add_argument("--device", default="cuda")
    large.add_argument("--cached", type=int, default=640, help="tokens before the window")
    large.add_argument("--width", type=int, action="append", help="of a window; repeat")
    large.add_argument("--steps", type=int, default=60)
    large.add_argument("--seconds", type=float, default=500, help="begin nothing new after that")
    large.add_argument("--folder", type=Path, help="for the artefacts; default: a temporary one")
    large.set_defaults(run=_large)
    for command in (small, large):
        command.add_argument("--output", type=Path, help="record the result here")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)

    def note(results: dict[str, Any]) -> None:
        if arguments.output is not None:
            _record(arguments.output, arguments.command, results, given)

    results = arguments.run(arguments, note)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    note(results)


def _small(arguments: argparse.Namespace, note: Any) -> dict[str, Any]:
    from lab.onnx_bench.small import compare_quantizations

    return compare_quantizations(
        arguments.checkpoint,
        arguments.twin,
        arguments.prompts,
        number=arguments.number,
        repeats=arguments.repeats,
        turns=arguments.turns,
        step_repeats=arguments.step_repeats,
        starts=arguments.starts,
    )


def _large(arguments: argparse.Namespace, note: Any) -> dict[str, Any]:
    from lab.onnx_bench.large import LargeSettings, time_large

    lists = {"quantize": "quantizations", "torch": "torch", "width": "widths"}
    given = {new: getattr(arguments, old) for old, new in lists.items() if getattr(arguments, old)}
    settings = LargeSettings(
        **given,
        shape=arguments.shape,
        device=arguments.device,
        cached=arguments.cached,
        steps=arguments.steps,
        budget_s=arguments.seconds,
        folder=arguments.folder,
    )
    return time_large(settings, note)


def _record(path: Path, name: str, results: dict[str, Any], given: Sequence[str]) -> None:
    write_record(path, f"onnx-{name}", results, command=command_of("lab.onnx_bench", given))


if __name__ == "__main__":
    main()
