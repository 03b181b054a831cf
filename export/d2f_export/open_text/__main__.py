"""Trains a pair on documentation text and compares D2F with autoregression on it.

Everything lands in one folder; run again, it goes on. What is read are docstrings, comments and
README files of the packages installed here; of their text nothing leaves the folder's corpus/.
"""

import argparse
import os
from pathlib import Path

# NOTE: only light imports here: the reading processes import this module again.
from d2f_export.open_text import sources


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and run what is missing."""
    parser = argparse.ArgumentParser(prog="python -m d2f_export.open_text", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--seconds", type=float, default=540, help="for everything, default 540")
    parser.add_argument("--recipe", choices=["pair", "tiny"], default="pair")
    parser.add_argument(
        "--root",
        type=Path,
        action="append",
        help="read this folder; default: the standard library and all installed packages",
    )
    parser.add_argument("--also", type=Path, action="append", help="read this folder too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--readers", type=int, default=min(48, os.cpu_count() or 1))
    parser.add_argument("--scorers", type=int, help="processes, default 6 on a GPU, else none")
    parser.add_argument("--no-compile", action="store_true", help="leave the layers as they are")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    for folder in (*(arguments.root or ()), *(arguments.also or ())):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder; --root and --also name folders to read")
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from d2f_export.open_text.experiment import Experiment

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    is_cuda = device.startswith("cuda")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    Experiment(
        arguments.output,
        arguments.seconds,
        recipe=arguments.recipe,
        roots=[*(arguments.root or sources.installed_roots()), *(arguments.also or ())],
        device=device,
        compile_layers=is_cuda and not arguments.no_compile,
        num_readers=arguments.readers,
        num_scorers=(6 if is_cuda else 0) if arguments.scorers is None else arguments.scorers,
        seed=arguments.seed,
        say=lambda text: console.print(text, markup=False),
    ).run()


if __name__ == "__main__":
    main()
