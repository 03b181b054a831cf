"""The cluster's measurements: python -m lab.cluster COMMAND --output FILE."""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from lab.cluster.kills import kills
from lab.cluster.latency import SETUPS, latency
from lab.records import command_of, write_record


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, run the command, print and record its results."""
    parser = argparse.ArgumentParser(prog="python -m lab.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    late = commands.add_parser("latency", help="what a block costs more than from one process")
    late.add_argument("--setup", action="append", choices=SETUPS, help="repeat; default all")
    late.add_argument("--loads", type=int, nargs="+", default=(1, 16, 64))
    killing = commands.add_parser("kills", help="engines and servers killed at random")
    killing.add_argument("--wait", action="store_true", help="for both engines, between two")
    for command in (late, killing):
        command.add_argument("--seconds", type=float, default=5.0, help="a load, or all kills")
        command.add_argument("--output", type=Path, help="record the result here")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "kills":
            work = kills(Path(folder), seconds=arguments.seconds, waits=arguments.wait)
        else:
            work = latency(
                Path(folder),
                setups=arguments.setup or SETUPS,
                loads=arguments.loads,
                seconds=arguments.seconds,
            )
        results = asyncio.run(work)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if arguments.output:
        given = sys.argv[1:] if argv is None else argv
        write_record(
            arguments.output,
            f"cluster {arguments.command}",
            results,
            command=command_of("lab.cluster", given),
        )


if __name__ == "__main__":
    main()
