"""The making of the embedded model: python -m lab.embedded_model COMMAND.

It is made by these, in order: tokenizer, twin, teacher, student; then by d2f-stream export.
"""

import argparse
import json
import sys
from pathlib import Path

from d2f_stream.core.errors import D2FError
from lab.embedded_model import commands

FIXED_SEED = 1


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="python -m lab.embedded_model", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)

    tokenizer = subparsers.add_parser("tokenizer", help="train the tokenizer on generated problems")
    tokenizer.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    tokenizer.add_argument("--seed", type=int, default=FIXED_SEED)
    tokenizer.set_defaults(run=commands.run_tokenizer)

    listing = subparsers.add_parser("problems", help="write held-out problems as JSON lines")
    listing.add_argument("--output", type=Path, required=True)
    listing.add_argument("--number", type=int, default=64)
    listing.set_defaults(run=commands.run_problems)

    for name, start in (("twin", None), ("teacher", "twin"), ("student", "teacher")):
        command = subparsers.add_parser(name, help=f"train the {name}")
        _add_training_arguments(command, start)
        command.set_defaults(run=commands.run_train, stage=name)

    _add_evaluate(subparsers.add_parser("evaluate", help="score a folder on held-out problems"))
    seal = subparsers.add_parser("manifest", help="write the manifest of a checkpoint folder")
    _add_manifest(seal)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def _add_evaluate(score: argparse.ArgumentParser) -> None:
    score.add_argument("model", type=Path, help="a checkpoint or an exported artefact")
    score.add_argument("--tokenizer", type=Path, help="where the folder has none")
    score.add_argument("--problems", type=int, default=1000)
    score.add_argument("--backend", choices=["auto", "onnx", "torch"], default="auto")
    score.add_argument("--device", default="auto")
    score.add_argument("--quantization", default="auto")
    score.add_argument("--output", type=Path, help="append the figures to this JSON-lines file")
    score.add_argument("--label", help="instead of the folder's name")
    score.add_argument(
        "--setting",
        action="append",
        metavar="JSON",
        help="generation parameters on top of the model's own; repeat for several runs",
    )
    score.set_defaults(run=commands.run_evaluate)


def _add_manifest(seal: argparse.ArgumentParser) -> None:
    seal.add_argument("checkpoint", type=Path)
    seal.add_argument("--name", required=True, help="the model's, for people")
    seal.add_argument(
        "--defaults", type=json.loads, default={}, metavar="JSON", help="by kind of device"
    )
    seal.add_argument("--description", default="", help="what the model can do, for users")
    seal.add_argument("--training", default="", help="what made the checkpoint")
    seal.add_argument(
        "--figures", type=json.loads, default={}, metavar="JSON", help="what was measured"
    )
    seal.set_defaults(run=commands.run_manifest)


def _add_training_arguments(command: argparse.ArgumentParser, start: str | None) -> None:
    command.add_argument("--recipe", choices=["embedded", "tiny"], default="embedded")
    command.add_argument("--tokenizer", type=Path, required=True)
    command.add_argument("--output", type=Path, required=True, help="the run's folder; resumes")
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command.add_argument("--lr", type=float, help="instead of the recipe's")
    command.add_argument("--max-seconds", type=float, help="shorten the schedule to this time")
    command.add_argument("--seed", type=int, default=FIXED_SEED)
    command.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    command.add_argument("--workers", type=int, default=0, help="processes that write problems")
    command.add_argument("--compile", action="store_true", help="compile the layers (GPU)")
    command.add_argument("--start", help=f"checkpoint to start from ({start or 'default: fresh'})")
    if start == "teacher":
        command.add_argument("--teacher", help="the frozen teacher, default --start")


if __name__ == "__main__":
    try:
        main()
    except D2FError as error:
        sys.exit(f"error: {error}")
