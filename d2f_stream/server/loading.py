"""The options of `d2f-stream serve` that say which model is loaded, and how."""

import argparse

from d2f_stream.core.errors import InvalidRequest

__all__ = ["add_loading", "check_unset"]


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "-m",
        "--model",
        help="a name, a folder, a .gguf file or a hub id (default: smollm2-135m-d2f, or "
        "word-problems)",
    )
    parser.add_argument("--adapter", help="folder or hub id of a LoRA adapter to merge")
    parser.add_argument(
        "--backend",
        choices=("auto", "onnx", "torch", "scripted"),
        default="auto",
        help="what runs the model",
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
        "--warm-up",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile and capture before the first request (GPU)",
    )
    parser.add_argument(
        "--may-narrow",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="under load, serve faster by fewer blocks at once: answers then depend on what else "
        "runs, unless a request says may_narrow=false",
    )


def check_unset(args: argparse.Namespace) -> None:
    """Refuse the options beside --engines, whose engines have loaded a model already.

    Raises:
        InvalidRequest: one of them is set.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_loading(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            option = ("--no-" if default is True else "--") + name.replace("_", "-")
            raise InvalidRequest(
                f"--engines and {option} do not go together: the engines have loaded a model "
                "already; say it where they are deployed"
            )
