"""Command line of the ablations: python -m lab.ablations COMMAND."""

import argparse
from pathlib import Path

from lab.ablations import command, thresholds


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="python -m lab.ablations", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    ablate = subparsers.add_parser("ablate", help="compare noise and losses, over many students")
    command.add_arguments(ablate)
    trade = subparsers.add_parser("thresholds", help="compare settings of the decoder on a model")
    thresholds.add_arguments(trade)

    plot = subparsers.add_parser("plot", help="draw the figures of records")
    plot.add_argument(
        "records",
        type=Path,
        nargs="+",
        help="of evaluate, ablate or thresholds, or tables (.csv) of the sweep benchmark",
    )
    plot.add_argument("--output", type=Path, required=True)
    plot.set_defaults(run=run_plot)

    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def run_plot(arguments: argparse.Namespace) -> None:
    """Draw the figure of the records, of whichever kind they are."""
    from lab.ablations.figure import is_ablation, plot_ablations, tables
    from lab.ablations.plot import plot_trade_off
    from lab.ablations.sweep_plot import plot_sweep
    from lab.ablations.thresholds_plot import is_thresholds, plot_thresholds

    records: list[Path] = arguments.records
    if all(path.suffix == ".csv" for path in records):
        plot_sweep(records, arguments.output)
    elif all(map(is_ablation, records)):
        plot_ablations(records, arguments.output)
        print(tables(records))
    elif all(map(is_thresholds, records)):
        plot_thresholds(records, arguments.output)
    else:
        plot_trade_off(records, arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
