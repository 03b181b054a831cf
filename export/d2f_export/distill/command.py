"""The arguments of `d2f-stream distill`: a flag for each setting, over those of a TOML file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from d2f_export.distill.settings import DistillSettings, build_settings, read_settings
from d2f_stream.core.errors import MissingExtra
from d2f_stream.parser import Parser, new_parser

__all__ = ["build_parser", "main", "values_of", "with_settings"]


def main(argv: Sequence[str] | None = None, *, prog: str = "d2f-stream distill") -> None:
    """Distil as the arguments say.

    Raises:
        MissingExtra: a library of the export extra is not installed.
        D2FError: see `distill`.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if any(flag.partition("=")[0] == "--from-ar" for flag in given):
        from d2f_export.distill.from_ar.command import train

        return train(given, prog=prog)
    parser = build_parser(prog)
    args = parser.parse_args(given)
    settings = build_settings(DistillSettings, values_of(args))
    try:
        from rich.console import Console

        from d2f_export.distill.run import distill
    except ImportError as error:
        raise MissingExtra("distillation", error.name or "torch", "export") from error
    distill(settings, args.output, cpu=args.cpu, console=Console())


def build_parser(prog: str) -> Parser:
    """Return the parser; settings that are not given are absent."""
    parser = new_parser(
        prog,
        "Distil a LLaDA- or Dream-family model into a block-causal D2F student.",
        example=f"{prog} --model dream:7b --data answers.jsonl --output student",
        more="--from-ar MODEL --help: train a draft adapter of an autoregressive model instead.",
    )
    return with_settings(parser, DistillSettings, output="the run's folder; resumes")


def with_settings(parser: Parser, kind: type[msgspec.Struct], *, output: str) -> Parser:
    """Add what every command has, and a flag for each setting, those that must be given first."""
    parser.add_argument("--output", type=Path, required=True, help=output)
    parser.add_argument("--config", type=Path, help="settings from a TOML file; flags win over it")
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    group = parser.add_argument_group("settings")
    fields = msgspec.structs.fields(kind)
    for field in sorted(fields, key=lambda field: not field.required):
        _add(group, field.name, field.type, field.default)
    return parser


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the file and the flags give."""
    values = {} if args.config is None else read_settings(args.config)
    own = {"output", "config", "cpu"}
    return values | {name: value for name, value in vars(args).items() if name not in own}


def _add(group: "argparse._ArgumentGroup", name: str, kind: Any, default: Any) -> None:
    plain, *metas = get_args(kind) if hasattr(kind, "__metadata__") else (kind,)
    text = " ".join(meta.description for meta in metas if meta.description)
    is_told = default not in (msgspec.NODEFAULT, None, "", ())
    shown = f"{text} ({default})" if is_told else text
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": shown.strip()}
    if plain is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif get_origin(plain) is tuple:
        is_number = int in [getattr(part, "__origin__", part) for part in get_args(plain)]
        options |= {"nargs": "+", "metavar": "N" if is_number else "FILE"}
        options |= {"type": int} if is_number else {}
    elif get_origin(plain) is Literal:
        options["choices"] = get_args(plain)
    else:
        parts = [getattr(part, "__origin__", part) for part in (plain, *get_args(plain))]
        kind = next((k for k in (int, float) if k in parts), str)
        options |= {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    short = ("-m",) if name == "model" else ()  # as every command has it
    group.add_argument(*short, f"--{name.replace('_', '-')}", **options)
