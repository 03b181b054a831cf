"""The benchmarks: python -m lab.bench COMMAND --output FILE."""

import argparse
import asyncio
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.bench import mixture_command
from lab.records import command_of, write_record

if TYPE_CHECKING:
    from lab.bench.sweep_tasks import SweepTask


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the benchmark, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m lab.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    stream = commands.add_parser("stream", help="tokens/s of whole answers, side by side")
    _add_stream(stream)
    overhead = commands.add_parser("overhead", help="a step's cost beyond the model")
    overhead.set_defaults(run=_overhead)

    steps = commands.add_parser("steps", help="time of a backend step by the shape of its window")
    _add_steps(steps)
    step = commands.add_parser("step", help="time of a step of large models, random weights")
    _add_step(step)
    mixture = commands.add_parser("mixture", help="time of a step with experts, random weights")
    mixture_command.add_arguments(mixture)
    mixture.set_defaults(run=lambda given: mixture_command.run(given, partial(_note, given)))
    _add_sweep(commands.add_parser("sweep", help="score against tokens per step over settings"))

    footprint = commands.add_parser("footprint", help="sizes, memory and start of the edge extra")
    footprint.add_argument("--prompt", default="Tom has 3 apples. He buys 4 more. How many now?")
    footprint.set_defaults(run=_footprint)

    serving = commands.add_parser("serving", help="many streams, latency, disconnects, memory")
    attacks = commands.add_parser("attacks", help="what others notice of a client that asks much")
    for command in (serving, attacks):
        command.add_argument("--part", action="append", help="only this part; repeat")
        command.set_defaults(run=_parts)

    shared = commands.add_parser("shared-log", help="what a log costs that servers share")
    shared.add_argument("--log", required=True, metavar="URL", help="of a store that is there")
    shared.set_defaults(run=_shared_log)

    timed = (stream, overhead, steps, step, mixture, footprint, serving, attacks, shared)
    for command in timed:
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    if arguments.run is _sweep:
        _sweep(arguments, sys.argv[1:] if argv is None else argv)  # its output is its own
        return
    results = arguments.run(arguments)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if arguments.output:
        given = sys.argv[1:] if argv is None else argv
        write_record(
            arguments.output, arguments.command, results, command=command_of("lab.bench", given)
        )


def _add_stream(stream: argparse.ArgumentParser) -> None:
    stream.add_argument(
        "--contender",
        action="append",
        metavar="LABEL=FOLDER[=JSON]",
        help="a model folder (empty: embedded) and generation parameters; repeat",
    )
    stream.add_argument("--prompts", type=Path, help="JSON lines with `prompt`")
    stream.add_argument("--number", type=int, default=32, help="how many prompts")
    stream.add_argument("--repeats", type=int, default=3)
    stream.add_argument("--backend", default="auto")
    stream.add_argument("--device", default="auto")
    shapes = stream.add_argument_group("random weights of a shape, instead of contenders")
    shapes.add_argument("--shape", action="append", help="llada-8b, dream-7b, llama-3-8b or tiny")
    shapes.add_argument("--quantization", action="append", help="bf16, fp8, nf4, ...; repeat")
    shapes.add_argument("--rate", type=float, action="append", help="emulated acceptances per step")
    shapes.add_argument("--cached", type=int, default=640, help="tokens before the mean window")
    shapes.add_argument("--steps", type=int, default=600, help="in whole answers, at least")
    stream.set_defaults(run=_stream, refuse=stream.error)


def _add_steps(steps: argparse.ArgumentParser) -> None:
    steps.add_argument("folders", type=Path, nargs="+", help="model folders")
    steps.add_argument("--backend", default="auto")
    steps.add_argument("--device", default="auto")
    steps.add_argument("--repeats", type=int, default=50)
    steps.add_argument("--turns", type=int, default=5)
    steps.set_defaults(run=_steps)


def _add_step(step: argparse.ArgumentParser) -> None:
    step.add_argument("--shape", action="append", help="llada-8b, dream-7b, llama-3-8b, 70b, ...")
    step.add_argument("--quantization", action="append", help="bf16, fp8, nf4, int8 or fp32")
    step.add_argument("--device", default="cuda")
    step.add_argument("--cached", type=int, default=640, help="tokens before the window")
    step.add_argument("--width", type=int, action="append", help="of a window")
    step.add_argument("--rate", type=float, action="append", help="emulated acceptances per step")
    step.add_argument("--steps", type=int, default=200)
    step.add_argument("--seconds", type=float, default=300, help="begin nothing new after that")
    step.add_argument("--no-checks", action="store_true")
    step.add_argument("--runner", choices=["auto", "fast", "plain"], default="auto")
    step.set_defaults(run=_step)


def _stream(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.shape:
        if arguments.contender or arguments.prompts:
            arguments.refuse("--shape makes its own models and prompts; leave out --contender")
        return _stream_shapes(arguments)
    if not arguments.contender or not arguments.prompts:
        arguments.refuse("give --contender and --prompts, or --shape")
    from lab.bench.stream import Contender, compare, read_prompts

    contenders = []
    for text in arguments.contender:
        label, folder, setting = (*text.split("=", 2), "", "")[:3]
        overrides = json.loads(setting or "{}")
        contenders.append(Contender(label, Path(folder) if folder else None, overrides))
    prompts = read_prompts(arguments.prompts, arguments.number)
    return asyncio.run(
        compare(
            contenders,
            prompts,
            repeats=arguments.repeats,
            backend=arguments.backend,
            device=arguments.device,
        )
    )


def _stream_shapes(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.stream_shapes import ShapeSettings, compare_shapes

    lists = {"shape": "shapes", "quantization": "quantizations", "rate": "rates"}
    given = {new: getattr(arguments, old) for old, new in lists.items() if getattr(arguments, old)}
    if arguments.device != "auto":
        given["device"] = arguments.device
    settings = ShapeSettings(**given, cached=arguments.cached, steps=arguments.steps)
    return compare_shapes(settings, partial(_note, arguments))


def _note(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Record what there is, in case that the rest never comes."""
    if arguments.output:
        write_record(
            arguments.output,
            arguments.command,
            results,
            command=command_of("lab.bench", sys.argv[1:]),
        )


def _overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.overhead import overhead

    return overhead()


def _steps(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.steps import compare_steps

    return dict(
        compare_steps(
            arguments.folders,
            backend=arguments.backend,
            device=arguments.device,
            repeats=arguments.repeats,
            turns=arguments.turns,
        )
    )


def _step(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.step import StepSettings, time_steps

    lists = {"shape": "shapes", "quantization": "quantizations", "width": "widths", "rate": "rates"}
    given = {new: getattr(arguments, old) for old, new in lists.items() if getattr(arguments, old)}
    settings = StepSettings(
        **given,
        device=arguments.device,
        cached=arguments.cached,
        steps=arguments.steps,
        budget_s=arguments.seconds,
        checks=not arguments.no_checks,
        runner=arguments.runner,
    )
    return time_steps(settings, partial(_note, arguments))


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("--model", help="a folder or the address of a server; default: embedded")
    sweep.add_argument("--adapter", help="a LoRA to merge into the weights")
    sweep.add_argument("--label", help="instead of the model's name")
    sweep.add_argument(
        "--task",
        required=True,
        help="JSON lines (.jsonl) with prompt and ending, or the name of a task of lm-eval",
    )
    sweep.add_argument("--include-path", type=Path, help="folder of further lm-eval tasks")
    sweep.add_argument("--number", type=int, default=300, help="how many problems")
    sweep.add_argument(
        "--system",
        action="append",
        help="d2f, no-pipeline, fixed-count, vanilla or ar; repeat",
    )
    sweep.add_argument("--block-size", type=int, nargs="+")
    sweep.add_argument("--confidence", type=float, nargs="+", help="thresholds")
    sweep.add_argument("--add", type=float, nargs="+", help="thresholds")
    sweep.add_argument("--activate", type=float, nargs="+", help="thresholds")
    sweep.add_argument("--per-step", type=int, nargs="+", help="tokens of vanilla decoding")
    sweep.add_argument("--crossed", action="store_true", help="all combinations of thresholds")
    sweep.add_argument("--concurrency", type=int, default=8, help="answers at a time")
    sweep.add_argument("--timed", action="store_true", help="tokens/s too, one answer at a time")
    sweep.add_argument("--backend", default="auto")
    sweep.add_argument("--device", default="auto")
    sweep.add_argument("--output", type=Path, required=True, help="CSV; rows in it are kept")
    sweep.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace, given: list[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from d2f_runtime.evaluation.samples import opened
    from lab.bench.sweep import sweep
    from lab.bench.sweep_grid import Grid, settings_of

    names = ("block_size", "confidence", "add", "activate", "per_step")
    values = {name: tuple(getattr(arguments, name)) for name in names if getattr(arguments, name)}
    grid = Grid(**values, crossed=arguments.crossed)
    settings = settings_of(grid, arguments.system or ("d2f", "no-pipeline", "vanilla"))
    chosen = {name: getattr(arguments, name) for name in ("adapter", "backend", "device")}

    async def run(bar: Progress) -> int:
        row = bar.add_task("loading", total=None)
        async with opened(arguments.model, concurrency=arguments.concurrency, **chosen) as engine:
            return await sweep(
                engine,
                _sweep_task(arguments, chosen),
                arguments.output,
                settings,
                label=arguments.label,
                command=given,
                say=partial(bar.console.print, highlight=False, markup=False, soft_wrap=True),
                on_progress=lambda name, done, total: bar.update(
                    row, description=name, completed=done, total=total
                ),
            )

    with Progress(console=Console(stderr=True), transient=True) as bar:
        ran = asyncio.run(run(bar))
    sys.stdout.write(f"{ran} rows added to {arguments.output}\n")


def _sweep_task(arguments: argparse.Namespace, chosen: dict[str, Any]) -> "SweepTask":
    from lab.bench.sweep_tasks import HarnessTask, ProblemTask

    if arguments.task.endswith(".jsonl"):
        return ProblemTask.read(
            Path(arguments.task),
            arguments.number,
            concurrency=arguments.concurrency,
            timed=arguments.timed,
        )
    return HarnessTask(
        arguments.task,
        arguments.number,
        arguments.include_path,
        {"model": arguments.model, "batch_size": arguments.concurrency, **chosen},
    )


def _footprint(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.footprint import footprint

    return footprint(arguments.prompt)


def _parts(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench import serving, serving_attacks

    if arguments.command == "attacks":
        return asyncio.run(serving_attacks.attacks(arguments.part or list(serving_attacks.PARTS)))
    return asyncio.run(serving.serving(arguments.part or list(serving.PARTS)))


def _shared_log(arguments: argparse.Namespace) -> dict[str, Any]:
    from lab.bench.shared_log import shared_log

    return asyncio.run(shared_log(arguments.log))


if __name__ == "__main__":
    main()
