"""lm-evaluation-harness with the model `d2f_stream`: python -m d2f_runtime.evaluation ARGUMENTS.

The arguments are those of lm-eval; --model d2f_stream and --device auto are added where they are
missing. `python -m d2f_runtime.evaluation humaneval` is the post-processing of HumanEval instead.
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = ("run", "ls", "validate")


def main(argv: Sequence[str] | None = None) -> None:
    """Hand the arguments to lm-eval."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["humaneval"]:
        from d2f_runtime.evaluation import humaneval

        humaneval.main(given[1:])
        return
    import d2f_runtime.evaluation.lm_eval  # registers the model  # noqa: F401  # isort: skip
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *completed(given)]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def completed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of lm-eval with what stands to reason here."""
    given = list(arguments)
    if not given or given[0] in ("ls", "validate", "-h", "--help"):
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
