"""The arguments of `d2f-stream distill --from-ar` and `d2f-stream distill-data`."""

from collections.abc import Sequence

from d2f_export.distill.command import values_of, with_settings
from d2f_export.distill.from_ar.settings import DraftSettings, WritingSettings
from d2f_export.distill.settings import build_settings
from d2f_stream.core.errors import MissingExtra
from d2f_stream.parser import Parser, new_parser

__all__ = ["train", "train_parser", "write", "write_parser"]


def train(argv: Sequence[str], *, prog: str = "d2f-stream distill") -> None:
    """Train a draft adapter as the arguments say.

    Raises:
        MissingExtra: a library of the export extra is not installed.
        D2FError: see `train_draft`.
    """
    args = train_parser(prog).parse_args(argv)
    settings = build_settings(DraftSettings, values_of(args))
    try:
        from rich.console import Console

        from d2f_export.distill.from_ar.run import train_draft
    except ImportError as error:
        raise MissingExtra("distillation", error.name or "torch", "export") from error
    train_draft(settings, args.output, cpu=args.cpu, console=Console())


def write(argv: Sequence[str]) -> None:
    """Let a model write data as the arguments say.

    Raises:
        MissingExtra: a library of the export extra is not installed.
        D2FError: see `write_data`.
    """
    args = write_parser().parse_args(argv)
    settings = build_settings(WritingSettings, values_of(args))
    try:
        from rich.console import Console

        from d2f_export.distill.from_ar.writing import write_data
    except ImportError as error:
        raise MissingExtra("writing data", error.name or "torch", "export") from error
    write_data(settings, args.output, cpu=args.cpu, console=Console())


def train_parser(prog: str = "d2f-stream distill --from-ar") -> Parser:
    """Return the parser of `train`; settings that are not given are absent."""
    parser = new_parser(
        prog,
        "Train a draft adapter of an autoregressive model.",
        example="d2f-stream distill --from-ar smollm2:135m --data texts.npz --output draft",
    )
    return with_settings(parser, DraftSettings, output="the run's folder; resumes")


def write_parser() -> Parser:
    """Return the parser of `write`; settings that are not given are absent."""
    parser = new_parser(
        "d2f-stream distill-data",
        "Let an autoregressive model write the text that its draft learns from.",
        example="d2f-stream distill-data --model smollm2:135m --output texts.npz",
    )
    return with_settings(parser, WritingSettings, output="the file, NAME.npz")
