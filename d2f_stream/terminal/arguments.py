"""The arguments of the command line: which commands there are, and what each takes."""

import argparse
from functools import partial
from typing import Final, cast, get_args

from d2f_stream import __version__
from d2f_stream.core.params import Commit, ParamOverrides
from d2f_stream.parser import Parser, add_command, new_parser
from d2f_stream.server import command
from d2f_stream.terminal import models_command
from d2f_stream.terminal.config import KEYS

__all__ = ["ELSEWHERE", "build_parser", "overrides_of"]

QUESTION: Final = "What is the capital of Japan?"
SET_MODEL: Final = "config set model sdar:4b"

ELSEWHERE: Final = {  # by name: the offline work is not the SDK's, and imports heavy libraries
    "eval": "d2f_runtime.evaluation.__main__:main",
    "distill": "d2f_export.distill.command:main",
    "distill-data": "d2f_export.distill.from_ar.command:write",
    "export": "d2f_export.onnx.command:run_export",
    "verify": "d2f_export.onnx.command:run_verify",
}
OFFLINE: Final = {
    "eval": "run tasks of lm-evaluation-harness",
    "distill": "train a D2F student of a model",
    "distill-data": "let a model write the text that its draft learns from",
    "export": "write a model as a folder for onnxruntime",
    "verify": "compare such a folder with its checkpoint",
}


def build_parser() -> Parser:
    """Return the parser of all commands; those of ELSEWHERE have parsers of their own."""
    parser = new_parser(
        "d2f-stream",
        "Stream whole blocks of text from block-diffusion language models.",
        example="d2f-stream chat",
        more="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"d2f-stream {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = partial(add_command, commands)
    chat = add("chat", "talk with a model in the terminal", example="d2f-stream chat -m sdar:4b")
    _add_chat(chat)
    question = f'd2f-stream generate "{QUESTION}"'
    _add_generate(add("generate", "answer a prompt, block by block", example=question))
    serve = "d2f-stream serve --port 8000"
    command.add_arguments(
        add("serve", "serve a model to many clients", example=serve, more=command.NOTE)
    )
    recommend = "d2f-stream models recommend"
    models_command.add_arguments(add("models", "list, fetch and choose models", example=recommend))
    _add_config(add("config", "show or set defaults", example=f"d2f-stream {SET_MODEL}"))
    text = "say what is installed and which backends work"
    doctor = add("doctor", text, example="d2f-stream doctor")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    text = "print a script that completes the command line"
    completion = add("completion", text, example='eval "$(d2f-stream completion bash)"')
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script it is")
    for name, text in OFFLINE.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def overrides_of(args: argparse.Namespace) -> ParamOverrides:
    """Return the generation parameters that were given, and only those."""
    given = vars(args)
    fields = {name: given[name] for name in ParamOverrides.__annotations__ if name in given}
    if fields.get("max_active_blocks") == 0:
        fields["max_active_blocks"] = None
    return cast(ParamOverrides, fields)


def _add_model(parser: Parser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        help="a name (d2f-stream models list), a folder, a .gguf file, a hub id or a server's "
        "address (default: that of the config file, else the default model)",
    )
    parser.add_argument(
        "--adapter", help="folder or hub id of a LoRA adapter, to merge or to draft with"
    )
    parser.add_argument(
        "--backend", choices=("auto", "onnx", "torch"), default="auto", help="what runs the model"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--quantization", default="auto", metavar="NAME", help="auto, bf16, fp8, int8, nf4, ..."
    )
    parser.add_argument(
        "--kv-tokens", type=int, metavar="N", help="how many tokens of K/V to make room for (torch)"
    )
    parser.add_argument("--family", metavar="NAME", help="the model's, if its files tell none")
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="of the server that --model names; D2F_TOKEN is not seen by others on this machine",
    )


def _add_chat(parser: Parser) -> None:
    _add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--canvas", action="store_true", help="show the blocks of an answer as they are filled in"
    )
    _add_params(parser.add_argument_group("decoding (the defaults are the model's own)"))


def _add_generate(parser: Parser) -> None:
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


def _add_config(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add, kept = partial(add_command, actions), f"one of {', '.join(KEYS)}"
    add("show", "print the file's place and its values", example="d2f-stream config show")
    change = add("set", "set a value", example=f"d2f-stream {SET_MODEL}")
    change.add_argument("key", choices=tuple(KEYS), metavar="KEY", help=kept)
    change.add_argument("value", metavar="VALUE", help="what it is from now on")
    drop = add("unset", "take a value out", example="d2f-stream config unset model")
    drop.add_argument("key", choices=tuple(KEYS), metavar="KEY", help=kept)


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
