"""Command line of the benchmarks: python -m d2f_runtime.bench COMMAND --output FILE."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from d2f_runtime.bench.record import write_record


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the benchmark, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m d2f_runtime.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    stream = commands.add_parser("stream", help="tokens/s of whole answers, side by side")
    stream.add_argument(
        "--contender",
        action="append",
        required=True,
        metavar="LABEL=FOLDER[=JSON]",
        help="a model folder (empty: embedded) and generation parameters; repeat",
    )
    stream.add_argument("--prompts", type=Path, required=True, help="JSON lines with `prompt`")
    stream.add_argument("--number", type=int, default=32, help="how many prompts")
    stream.add_argument("--repeats", type=int, default=3)
    stream.add_argument("--backend", default="auto")
    stream.set_defaults(run=_stream)

    overhead = commands.add_parser("overhead", help="a step's cost beyond the model")
    overhead.set_defaults(run=_overhead)

    steps = commands.add_parser("steps", help="time of a backend step by the shape of its window")
    steps.add_argument("folders", type=Path, nargs="+", help="model folders")
    steps.add_argument("--backend", default="auto")
    steps.add_argument("--device", default="auto")
    steps.add_argument("--repeats", type=int, default=50)
    steps.add_argument("--turns", type=int, default=5)
    steps.set_defaults(run=_steps)

    footprint = commands.add_parser("footprint", help="sizes, memory and start of the edge extra")
    footprint.add_argument("--prompt", default="Tom has 3 apples. He buys 4 more. How many now?")
    footprint.set_defaults(run=_footprint)

    for command in (stream, overhead, steps, footprint):
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    results = arguments.run(arguments)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if arguments.output:
        given = sys.argv[1:] if argv is None else argv
        write_record(arguments.output, arguments.command, results, arguments=given)


def _stream(arguments: argparse.Namespace) -> dict[str, Any]:
    from d2f_runtime.bench.stream import Contender, compare, read_prompts

    contenders = []
    for text in arguments.contender:
        label, folder, setting = (*text.split("=", 2), "", "")[:3]
        overrides = json.loads(setting or "{}")
        contenders.append(Contender(label, Path(folder) if folder else None, overrides))
    prompts = read_prompts(arguments.prompts, arguments.number)
    return asyncio.run(
        compare(contenders, prompts, repeats=arguments.repeats, backend=arguments.backend)
    )


def _overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    from d2f_runtime.bench.overhead import overhead

    return asyncio.run(overhead())


def _steps(arguments: argparse.Namespace) -> dict[str, Any]:
    from d2f_runtime.bench.steps import compare_steps

    return dict(
        compare_steps(
            arguments.folders,
            backend=arguments.backend,
            device=arguments.device,
            repeats=arguments.repeats,
            turns=arguments.turns,
        )
    )


def _footprint(arguments: argparse.Namespace) -> dict[str, Any]:
    from d2f_runtime.bench.footprint import footprint

    return footprint(arguments.prompt)


if __name__ == "__main__":
    main()
