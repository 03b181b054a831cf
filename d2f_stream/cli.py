"""The command line: `d2f-stream generate`, `serve`, `doctor` and the offline commands.

Owns arguments, output and exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 nobody
reads the output. Generation is left to the SDK, output to views.py and canvas.py, serving to
server/command.py, diagnosis to doctor.py.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol, cast

import msgspec

from d2f_stream import __version__
from d2f_stream.core.errors import D2FError, InvalidPrompt, InvalidRequest
from d2f_stream.core.events import StreamFailed
from d2f_stream.core.params import GenerationParams, ParamOverrides
from d2f_stream.core.session import Engine
from d2f_stream.server import command
from d2f_stream.terminal.pacing import paced
from d2f_stream.terminal.views import JsonView, TextView, View

__all__ = ["Loader", "build_parser", "main", "overrides_of"]

FAILED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

ELSEWHERE: Final = {  # by name: the offline work is not the SDK's, and imports heavy libraries
    "eval": "d2f_runtime.evaluation.__main__:main",
    "distill": "d2f_export.distill.command:main",
    "export": "d2f_export.onnx.command:run_export",
    "verify": "d2f_export.onnx.command:run_verify",
}


class Loader(Protocol):
    """Opens a model, as `d2f_stream.load` does."""

    def __call__(
        self,
        model: str | None = None,
        *,
        adapter: str | None = None,
        backend: str,
        quantization: str,
        device: str,
        kv_tokens: int | None = None,
    ) -> AbstractAsyncContextManager[Engine]:
        """Return the engine as an async context manager."""
        ...


def main(argv: Sequence[str] | None = None, *, load: Loader | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes the process's own.
        load: opens the model; None is `d2f_stream.load`.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in ELSEWHERE:  # their arguments are their own
        return _run_elsewhere(given[0], given[1:])
    args = build_parser().parse_args(given)
    # What the SDK logs comes back as an error, which is one line here.
    logging.getLogger("d2f_stream").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        if args.command == "doctor":
            return _doctor(as_json=args.json)
        if args.command == "serve":
            return command.run(args)
        return asyncio.run(_generate(args, _prompt(args.prompt), load or _default_load()))
    except D2FError as exc:
        _complain(str(exc))
        return BAD_INPUT if isinstance(exc, InvalidRequest) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE


def _run_elsewhere(command: str, arguments: list[str]) -> int:
    module, _, function = ELSEWHERE[command].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments) or 0
    except D2FError as exc:
        _complain(str(exc))
        return BAD_INPUT if isinstance(exc, InvalidRequest) else FAILED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except OSError as exc:  # such as a full disk
        _complain(str(exc))
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


async def _generate(args: argparse.Namespace, prompt: str, load: Loader) -> int:
    overrides = overrides_of(args)
    GenerationParams().with_overrides(overrides)  # complain before the model loads
    view = _view(args, prompt)
    if not isinstance(view, TextView | JsonView):
        overrides["drafts"] = True
    failure: StreamFailed | None = None
    with view:
        opening = load(
            args.model,
            adapter=args.adapter,
            backend=args.backend,
            quantization=args.quantization,
            device=args.device,
            kv_tokens=args.kv_tokens,
        )
        async with opening as engine, engine.generate(prompt, **overrides) as session:
            events = session.events()
            if args.pace and not isinstance(view, TextView | JsonView):
                events = paced(events, args.pace)
            async for event in events:
                view.apply(event)
                if isinstance(event, StreamFailed):
                    failure = event
    if failure is not None:
        _complain(failure.message)
    return FAILED if failure else 0


def _doctor(*, as_json: bool) -> int:
    from d2f_stream.terminal import doctor

    report = doctor.examine()
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print(doctor.describe(report))
    sys.stdout.flush()
    return 0 if report.works else FAILED


def _view(args: argparse.Namespace, prompt: str) -> View:
    if args.json:
        return JsonView()
    is_canvas = not args.no_canvas and sys.stdout.isatty()
    if is_canvas and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        from d2f_stream.terminal.canvas import FRAME_S, LiveCanvas

        console = Console(highlight=False)
        if not console.is_dumb_terminal:
            return LiveCanvas(prompt, console=console, frame_s=0.0 if args.pace else FRAME_S)
    return TextView()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands that exist."""
    parser = argparse.ArgumentParser(
        prog="d2f-stream",
        description="Stream whole blocks of text from block-diffusion language models.",
    )
    parser.add_argument("--version", action="version", version=f"d2f-stream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="answer a prompt, block by block"))
    command.add_arguments(commands.add_parser("serve", help="serve a model to many clients"))
    doctor = commands.add_parser("doctor", help="say what is installed and which backends work")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    commands.add_parser("eval", help="run tasks of lm-evaluation-harness", add_help=False)
    commands.add_parser("distill", help="train a D2F student of a diffusion model", add_help=False)
    commands.add_parser("export", help="write a model as a folder for onnxruntime", add_help=False)
    commands.add_parser("verify", help="compare such a folder with its checkpoint", add_help=False)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt, verbatim; - reads it from standard input")
    parser.add_argument(
        "--model", help="a folder, a hub id or a server's address (default: the embedded model)"
    )
    parser.add_argument("--adapter", help="folder or hub id of a LoRA adapter to merge")
    parser.add_argument("--backend", choices=("auto", "onnx", "torch"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quantization", default="auto", metavar="NAME")
    parser.add_argument(
        "--kv-tokens", type=int, metavar="N", help="tokens to have room for (torch)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON event per line")
    output.add_argument("--no-canvas", action="store_true", help="plain text in a terminal too")
    output.add_argument(
        "--pace",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="show each step on the canvas for S seconds; the figures stay the real ones",
    )
    _add_params(parser.add_argument_group("decoding (the defaults are the model's own)"))


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 60.0:  # False for NaN too
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 60 seconds")
    return value


def _add_params(group: "argparse._ArgumentGroup") -> None:
    def add(flag: str, kind: type, field: str, metavar: str, text: str) -> None:
        group.add_argument(
            flag, type=kind, dest=field, metavar=metavar, help=text, default=argparse.SUPPRESS
        )

    add("--max-new-tokens", int, "max_new_tokens", "N", "upper bound of the answer")
    add("--block-size", int, "block_size", "N", "positions denoised together")
    add("--confidence", float, "confidence_threshold", "X", "accept proposals above this")
    add("--add", float, "add_threshold", "X", "share of a block filled before the next joins")
    add("--activate", float, "activate_threshold", "X", "share filled before the next must accept")
    add("--max-active-blocks", int, "max_active_blocks", "N", "blocks at once; 0 is unbounded")
    add("--temperature", float, "temperature", "X", "0 is greedy")
    add("--top-p", float, "top_p", "X", "nucleus mass")
    add("--seed", int, "seed", "N", "of the sampling noise")
    group.add_argument(
        "--stop",
        action="append",
        metavar="S",
        default=argparse.SUPPRESS,
        help="a string that ends the answer; may be given several times",
    )


def overrides_of(args: argparse.Namespace) -> ParamOverrides:
    """Return the generation parameters that were given, and only those."""
    given = vars(args)
    fields = {name: given[name] for name in ParamOverrides.__annotations__ if name in given}
    if fields.get("max_active_blocks") == 0:
        fields["max_active_blocks"] = None
    return cast(ParamOverrides, fields)


def _prompt(given: str) -> str:
    try:
        prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
        prompt.encode()  # bytes that are no text reach Python as lone surrogates
    except UnicodeError as exc:
        raise InvalidPrompt(f"the prompt is not valid text: {exc}") from exc
    if not prompt.strip():
        raise InvalidPrompt("the prompt is empty")
    return prompt


def _default_load() -> Loader:
    from d2f_stream.api import load

    return load


def _complain(message: str) -> None:
    print(f"d2f-stream: error: {' '.join(message.split())}", file=sys.stderr)


def _discard_output() -> None:
    # The interpreter flushes stdout once more at exit, which must not raise again.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
