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
from lab.scheduling.engine_loads import run_engine
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

    engine = commands.add_parser("engine", help="the embedded model under load, here")
    engine.add_argument("--loads", type=int, nargs="+", default=LOADS)
    engine.add_argument("--turns", type=int, default=3)
    engine.add_argument("--max-new-tokens", type=int, default=192)
    engine.add_argument("--model")
    engine.add_argument("--adapter")
    engine.set_defaults(run=_engine)

    for command in (simulated, curve, engine):
        command.add_argument("--prediction", default="", help="written down before the run")
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    results = arguments.run(arguments)
    results = {"prediction": arguments.prediction, **results}
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    if arguments.output:
        given = sys.argv[1:] if argv is None else argv
        name = f"scheduling-{arguments.command}"
        write_record(arguments.output, name, results, command=command_of("lab.scheduling", given))


def _simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, workload in arguments.case:
        curve = CURVES[name] if name in CURVES else StepCurve.read(Path(name))
        rows = compare(WORKLOADS[workload], curve, loads=arguments.loads)
        results[f"{name}, {workload}"] = {"curve": curve.to_dict(), "loads": rows}
    return results


def _curve(arguments: argparse.Namespace) -> dict[str, Any]:
    timed = asyncio.run(
        measure_curve(
            arguments.model,
            adapter=arguments.adapter,
            shapes=[(rows, sessions) for rows, sessions in arguments.shape],
            block_size=arguments.block_size,
            turns=arguments.turns,
        )
    )
    return {"steps": [[step.rows, step.sessions, round(step.ms, 3)] for step in timed]}


def _engine(arguments: argparse.Namespace) -> dict[str, Any]:
    return asyncio.run(
        run_engine(
            arguments.model,
            adapter=arguments.adapter,
            loads=arguments.loads,
            turns=arguments.turns,
            max_new_tokens=arguments.max_new_tokens,
        )
    )


if __name__ == "__main__":
    main()
