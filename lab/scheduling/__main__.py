"""The scheduler's measurements: python -m lab.scheduling COMMAND --output FILE."""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from lab.records import command_of, write_record
from lab.scheduling.comparison import LOADS, WORKLOADS, compare
from lab.scheduling.curves import CURVES, StepCurve
from lab.scheduling.engine_loads import EngineLoads
from lab.scheduling.long_prompts import LongPrompts
from lab.scheduling.measuring import measure_curve


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the command, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m lab.scheduling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    simulated = commands.add_parser("simulate", help="what pays against what is fixed, by a curve")
    simulated.add_argument("--case", nargs=2, action="append", metavar=("CURVE", "WORKLOAD"))
    simulated.add_argument("--loads", type=int, nargs="+", default=LOADS)
    simulated.set_defaults(run=_simulate)

    curve = commands.add_parser("curve", help="what steps take here")
    curve.add_argument("--model")
    curve.add_argument("--adapter")
    curve.add_argument("--shape", nargs=2, type=int, action="append", metavar=("ROWS", "SESSIONS"))
    curve.add_argument("--block-size", type=int, default=16)
    curve.add_argument("--turns", type=int, default=20)
    curve.set_defaults(run=_curve)

    engine = commands.add_parser("engine", help="a model under load, here")
    engine.add_argument("--model")
    engine.add_argument("--adapter")
    engine.add_argument("--quantization", default="auto")
    engine.add_argument("--loads", type=int, nargs="+", default=LOADS)
    engine.add_argument("--settings", nargs="+", default=())
    engine.add_argument("--turns", type=int, default=3)
    engine.add_argument("--requests", type=int, default=8)
    engine.add_argument("--max-new-tokens", type=int, default=192)
    engine.add_argument("--max-rows", type=int, help="sessions that share a step")
    engine.add_argument("--seconds", type=float, help="after which no turn begins")
    engine.set_defaults(run=_engine)

    prompts = commands.add_parser("prompts", help="what others notice of a long prompt, here")
    prompts.add_argument("--model")
    prompts.add_argument("--adapter")
    prompts.add_argument("--quantization", default="auto")
    prompts.add_argument("--shape", help="random weights of a published shape, on a GPU")
    prompts.add_argument("--sessions", type=int, default=8)
    prompts.add_argument("--prompt-tokens", type=int, default=8000)
    prompts.add_argument("--turns", type=int, default=3)
    prompts.set_defaults(run=_prompts)

    for command in (simulated, curve, engine, prompts):
        command.add_argument("--prediction", default="", help="written down before the run")
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    arguments.given = sys.argv[1:] if argv is None else argv
    results = arguments.run(arguments)
    sys.stdout.write(json.dumps({"prediction": arguments.prediction, **results}, indent=1) + "\n")
    _record(arguments, results)


def _simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, workload in arguments.case:
        curve = CURVES[name] if name in CURVES else StepCurve.read(Path(name))
        rows = compare(WORKLOADS[workload], curve, loads=arguments.loads)
        results[f"{name}, {workload}"] = {"curve": curve.to_dict(), "loads": rows}
    return results


def _curve(arguments: argparse.Namespace) -> dict[str, Any]:
    timed, one_by_one = asyncio.run(
        measure_curve(
            arguments.model,
            adapter=arguments.adapter,
            shapes=[(rows, sessions) for rows, sessions in arguments.shape],
            block_size=arguments.block_size,
            turns=arguments.turns,
        )
    )
    steps = [[step.rows, step.sessions, round(step.ms, 3)] for step in timed]
    return {"one_by_one": one_by_one, "steps": steps}


def _engine(arguments: argparse.Namespace) -> dict[str, Any]:
    loads = EngineLoads(
        model=arguments.model,
        adapter=arguments.adapter,
        quantization=arguments.quantization,
        loads=arguments.loads,
        settings=arguments.settings,
        turns=arguments.turns,
        requests=arguments.requests,
        max_new_tokens=arguments.max_new_tokens,
        max_rows=arguments.max_rows,
        seconds=arguments.seconds,
    )
    return asyncio.run(loads.run(lambda found: _record(arguments, found)))


def _prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    bench = LongPrompts(
        model=arguments.model,
        adapter=arguments.adapter,
        quantization=arguments.quantization,
        shape=arguments.shape,
        sessions=arguments.sessions,
        prompt_tokens=arguments.prompt_tokens,
        turns=arguments.turns,
    )
    return asyncio.run(bench.run(lambda found: _record(arguments, found)))


def _record(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    if arguments.output is None:
        return
    name = f"scheduling-{arguments.command}"
    command = command_of("lab.scheduling", arguments.given)
    write_record(
        arguments.output, name, {"prediction": arguments.prediction, **results}, command=command
    )


if __name__ == "__main__":
    main()
