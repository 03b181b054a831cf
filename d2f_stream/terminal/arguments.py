"""The arguments of the command line: which commands there are, and what each takes."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Final, cast, get_args

from d2f_stream import __version__
from d2f_stream.core.params import Commit, ParamOverrides
from d2f_stream.server import command
from d2f_stream.terminal import models_command
from d2f_stream.terminal.config import KEYS

__all__ = ["ELSEWHERE", "build_parser", "check_command", "overrides_of"]

QUESTION: Final = "What is the capital of France?"

ELSEWHERE: Final = {  # by name: the offline work is not the SDK's, and imports heavy libraries
    "eval": "d2f_runtime.evaluation.__main__:main",
    "distill": "d2f_export.distill.command:main",
    "distill-data": "d2f_export.distill.from_ar.command:write",
    "export": "d2f_export.onnx.command:run_export",
    "verify": "d2f_export.onnx.command:run_verify",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a default where there is one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        if action.default in (None, False, True, 0.0, "", argparse.SUPPRESS) or "default" in told:
            return told
        return f"{told} (default: %(default)s)"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="d2f-stream",
        description="Stream whole blocks of text from block-diffusion language models.",
        epilog="Each command has its own --help. Begin with: d2f-stream chat",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"d2f-stream {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=_sentence(text), epilog=f"example: {example}",
            formatter_class=_Help,
        )  # fmt: skip

    _add_chat(add("chat", "talk with a model in the terminal", "d2f-stream chat -m sdar:4b"))
    generate = add(
        "generate", "answer a prompt, block by block", f'd2f-stream generate "{QUESTION}"'
    )
    _add_generate(generate)
    command.add_arguments(
        add("serve", "serve a model to many clients", "d2f-stream serve --port 8000")
    )
    models_command.add_arguments(
        add("models", "list, fetch and choose models", "d2f-stream models recommend")
    )
    _add_config(add("config", "show or set defaults", "d2f-stream config set model sdar:4b"))
    doctor = add("doctor", "say what is installed and which backends work", "d2f-stream doctor")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    completion = add(
        "completion", "print a script that completes the command line",
        'eval "$(d2f-stream completion bash)"',
    )  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    commands.add_parser("eval", help="run tasks of lm-evaluation-harness", add_help=False)
    commands.add_parser("distill", help="train a D2F student of a model", add_help=False)
    commands.add_parser(
        "distill-data", help="let a model write the text that its draft learns from", add_help=False
    )
    commands.add_parser("export", help="write a model as a folder for onnxruntime", add_help=False)
    commands.add_parser("verify", help="compare such a folder with its checkpoint", add_help=False)
    return parser


def check_command(given: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Refuse a command that does not exist, with the one that was probably meant.

    Raises:
        SystemExit: as argparse ends a program, with status 2.
    """
    (actions,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not given or given[0].startswith("-") or given[0] in actions.choices:
        return
    near = difflib.get_close_matches(given[0], actions.choices, n=1)
    hint = f"did you mean {near[0]}?" if near else "d2f-stream --help lists the commands"
    parser.error(f"there is no command {given[0]!r}; {hint}")


def overrides_of(args: argparse.Namespace) -> ParamOverrides:
    """Return the generation parameters that were given, and only those."""
    given = vars(args)
    fields = {name: given[name] for name in ParamOverrides.__annotations__ if name in given}
    if fields.get("max_active_blocks") == 0:
        fields["max_active_blocks"] = None
    return cast(ParamOverrides, fields)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        help="a name (d2f-stream models list), a folder, a .gguf file, a hub id or a server's "
        "address (default: that of the config file, else the default model)",
    )
    parser.add_argument(
        "--adapter", help="folder or hub id of a LoRA adapter, to merge or to draft with"
    )
    parser.add_argument("--backend", choices=("auto", "onnx", "torch"), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--quantization", default="auto", metavar="NAME")
    parser.add_argument(
        "--kv-tokens", type=int, metavar="N", help="how many tokens of K/V to make room for (torch)"
    )
    parser.add_argument("--family", metavar="NAME", help="the model's, if its files tell none")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="of the server that --model names; D2F_TOKEN is not seen by others on this machine",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    _add_params(parser.add_argument_group("decoding (the defaults are the model's own)"))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the question; - or none reads standard input")
    _add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--raw", action="store_true", help="the prompt verbatim, not through the chat template"
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


def _add_config(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("show", help="print the file's place and its values")
    change = actions.add_parser("set", help="set a value")
    change.add_argument("key", choices=tuple(KEYS))
    change.add_argument("value")
    actions.add_parser("unset", help="take a value out").add_argument("key", choices=tuple(KEYS))


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
    group.add_argument(
        "--commit",
        choices=get_args(Commit),
        default=argparse.SUPPRESS,
        help="verify keeps what the model's own next tokens say too: its autoregressive answer",
    )
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
