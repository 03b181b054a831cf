"""lm-evaluation-harness with the model `d2f_stream`: python -m d2f_runtime.evaluation ARGUMENTS.

The arguments are those of lm-eval; --model d2f_stream and --device auto are added where they are
missing. `python -m d2f_runtime.evaluation humaneval` is the post-processing of HumanEval instead.
"""

import sys
from collections.abc import Sequence

from d2f_stream.parser import Parser, new_parser

__all__ = ["EXAMPLE", "eval_parser", "main"]

COMMANDS = ("run", "ls", "validate")
EXAMPLE = "d2f-stream eval --tasks gsm8k --limit 100 --model_args model=sdar:4b"


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the arguments to lm-eval."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["humaneval"]:
        from d2f_runtime.evaluation import humaneval

        humaneval.main(given[1:])
        return
    if given in (["-h"], ["--help"]):
        eval_parser().print_help()
        return
    import d2f_runtime.evaluation.lm_eval  # registers the model  # noqa: F401  # isort: skip
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *completed(given)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def eval_parser() -> Parser:
    """Return the parser that explains the command; what it takes is lm-eval's to read."""
    parser = new_parser(
        "d2f-stream eval",
        "Run tasks of lm-evaluation-harness with a model of d2f_stream.",
        example=EXAMPLE,
        more="--model d2f_stream and --device auto are added where they are missing.",
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    commands.add_parser("run", help="run tasks, with lm-eval's options (default)", add_help=False)
    commands.add_parser("ls", help="list lm-eval's tasks", add_help=False)
    commands.add_parser("validate", help="check configurations of tasks", add_help=False)
    commands.add_parser("humaneval", help="make programs of HumanEval's answers", add_help=False)
    return parser


def completed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of lm-eval with what stands to reason here."""
    given = list(arguments)
    if not given or given[0] in ("ls", "validate"):
        return given
    if given[0] not in COMMANDS:
        given.insert(0, "run")
    names = {argument.partition("=")[0] for argument in given}
    if not names & {"--model", "-M", "--config", "-C"}:
        given += ["--model", "d2f_stream"]
    if "--device" not in names:
        given += ["--device", "auto"]  # lm-eval's own default is the first GPU
    return given


if __name__ == "__main__":
    main()
