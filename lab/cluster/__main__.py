"""The cluster's measurements: python -m lab.cluster COMMAND --output FILE."""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lab.cluster.costs import costs
from lab.cluster.kills import kills
from lab.cluster.latency import SETUPS, latency
from lab.cluster.scenarios import scenarios
from lab.records import command_of, write_record


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the command, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m lab.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    late = commands.add_parser("latency", help="what a block costs more than from one process")
    late.add_argument("--setup", action="append", choices=SETUPS, help="repeat; default all")
    late.add_argument("--model", default="", help="such as word-problems; default scripted")
    late.add_argument("--loads", type=int, nargs="+", default=(1, 16, 64))
    killing = commands.add_parser("kills", help="engines and servers killed at random")
    killing.add_argument("--wait", action="store_true", help="for both engines, between two")
    costing = commands.add_parser("costs", help="what each part spends of its processor")
    for command in (late, killing, costing):
        command.add_argument("--seconds", type=float, default=5.0, help="a load, or all kills")
    simulating = commands.add_parser("simulate", help="clusters larger than this machine")
    simulating.add_argument("--engines", type=int, nargs="+", default=(1, 10, 100))
    for command in (late, killing, costing, simulating):
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    if arguments.command == "simulate":
        results = scenarios(arguments.engines)
    else:
        results = asyncio.run(_measured(arguments))
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if arguments.output:
        given = sys.argv[1:] if argv is None else argv
        write_record(
            arguments.output,
            f"cluster {arguments.command}",
            results,
            command=command_of("lab.cluster", given),
        )


async def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, seconds = Path(name), arguments.seconds
        if arguments.command == "kills":
            return await kills(folder, seconds=seconds, waits=arguments.wait)
        if arguments.command == "costs":
            return await costs(folder, seconds=seconds)
        setups = arguments.setup or SETUPS
        return await latency(
            folder,
            setups=setups,
            loads=arguments.loads,
            seconds=seconds,
            model=arguments.model,
        )


if __name__ == "__main__":
    main()
