"""Every command's arguments: mistakes are answered with what was meant, help is whole."""

import argparse
import importlib.util
import shlex
from collections.abc import Iterator

import pytest

from d2f_export.distill.command import build_parser as distill_parser
from d2f_export.distill.from_ar.command import train_parser, write_parser
from d2f_export.onnx.command import export_parser, verify_parser
from d2f_runtime.evaluation.__main__ import EXAMPLE, completed, eval_parser
from d2f_runtime.evaluation.humaneval import humaneval_parser
from d2f_runtime.models.installed import DEFAULT
from d2f_runtime.models.names import find, suggest
from d2f_stream import cli
from d2f_stream.core.nearest import did_you_mean
from d2f_stream.parser import Parser
from d2f_stream.terminal.arguments import ELSEWHERE

Capture = pytest.CaptureFixture[str]


def below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield a parser and those of its subcommands that are not elsewhere."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and parser.prog != "d2f-stream eval":
            for name, inner in action.choices.items():
                if name not in ELSEWHERE:
                    yield from below(inner)


OFFLINE = [distill_parser("d2f-stream distill"), train_parser(), write_parser()]
OFFLINE += [export_parser(), verify_parser(), humaneval_parser(), eval_parser()]
PARSERS = [*below(cli.build_parser()), *OFFLINE]


def example_of(parser: argparse.ArgumentParser) -> list[str]:
    line = (parser.epilog or "").rpartition("example: ")[2]
    words = shlex.split(line.removeprefix('eval "$(').removesuffix(')"'))
    return words[1:]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_help_has_an_example_and_explains_every_argument(parser: argparse.ArgumentParser) -> None:
    assert isinstance(parser, Parser)
    shown = " ".join(parser.format_help().split())
    assert "example: " in shown
    assert parser.description
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action.dest
    for empty in ("default: )", "default: ()", "default: [])", "default: None)", "()"):
        assert empty not in shown


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_model_has_its_short_form_wherever_it_is_taken(parser: argparse.ArgumentParser) -> None:
    forms = [action.option_strings for action in parser._actions]
    assert [names for names in forms if "--model" in names or "-m" in names] in (
        [],
        [["-m", "--model"]],
    )


@pytest.mark.parametrize("parser", PARSERS[:-1], ids=lambda parser: parser.prog)
def test_example_of_the_help_parses(parser: argparse.ArgumentParser) -> None:
    command, *rest = example_of(parser)
    match command:
        case "eval":
            humaneval_parser().parse_args(rest[1:])
        case "distill" | "distill-data" | "export" | "verify":
            parser.parse_args(rest)
        case _:
            cli.build_parser().parse_args([command, *rest])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_example_of_eval_parses() -> None:
    from lm_eval._cli.harness import HarnessCLI

    words = shlex.split(EXAMPLE)[2:]
    parsed = HarnessCLI()._parser.parse_args(completed(words))
    assert (parsed.tasks, parsed.model) in [(["gsm8k"], "d2f_stream"), ("gsm8k", "d2f_stream")]


def test_every_command_of_the_help_is_looked_at() -> None:
    looked_at = {parser.prog.split()[1] for parser in PARSERS if " " in parser.prog}
    (actions,) = [
        action
        for action in cli.build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    assert looked_at == set(actions.choices)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("generate --temprature 0.5 hi", "no option --temprature; did you mean --temperature?"),
        ("generate hi --temprature=0.5", "no option --temprature; did you mean --temperature?"),
        ("serve --prot 8000", "no option --prot; did you mean --port?"),
        ("chat --zzz", "no option --zzz; d2f-stream chat --help lists the options"),
        ("--modle x chat", "no option --modle; d2f-stream --help lists the options"),
        ("genrate hi", "no command 'genrate'; did you mean generate?"),
        ("models lst", "no command 'lst'; did you mean list?"),
        ("models zzz", "no command 'zzz'; d2f-stream models --help lists the commands"),
        ("config st model x", "no command 'st'; did you mean set"),
        ("config set modle x", "KEY is 'modle' but must be one of model, server, token; did you"),
        ("completion bsh", "SHELL is 'bsh' but must be one of bash, zsh, tcsh; did you mean bash"),
        ("generate hi --commit verfy", "--commit is 'verfy'"),
        ("generate hi --temperature hot", "--temperature is 'hot' but must be a number"),
        ("serve --port http", "--port is 'http' but must be a whole number"),
        ("generate two words", "no place for 'words'; a text with spaces needs quotes"),
        ("generate -x", "no option -x"),
        ("distill --modle x --output y", "no option --modle; did you mean --model?"),
        ("distill --from-ar x --dta y", "no option --dta; did you mean --data?"),
        ("distill-data --outptu y", "no option --outptu; did you mean --output?"),
        ("export --modle x", "no option --modle; did you mean --model?"),
        ("verify folder --nubmer 3", "no option --nubmer; did you mean --number?"),
    ],
)
def test_mistake_is_one_sentence_with_what_was_meant(
    arguments: str, sentence: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert usage.startswith("usage: d2f-stream")
    assert sentence in error


@pytest.mark.parametrize(
    "arguments", ["generate --temp 0 --max-new 3 -- --temprature", "generate --stop=--x hi"]
)
def test_beginnings_of_options_and_dashes_in_texts_are_taken(arguments: str) -> None:
    parsed = cli.build_parser().parse_args(arguments.split())
    assert parsed.prompt in ("--temprature", "hi")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2-135m", "smollm2:135m"),
        ("sdar", "sdar:1.7b, sdar:4b, sdar:8b or sdar:30b-a3b"),
        ("word-problem", "word-problems"),
        ("d2f-lada:8b", "d2f-llada:8b"),
    ],
)
@pytest.mark.parametrize(
    "command", ["generate hi -m", "serve --port 0 -m", "models show", "models rm", "models pull"]
)
def test_misspelt_model_is_answered_with_those_like_it(
    command: str, name: str, meant: str, capsys: Capture
) -> None:
    assert cli.main([*command.split(), name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"d2f-stream: error: there is no model called '{name}'; did you mean ")
    assert meant in error
    assert error.count("\n") == 1


def test_package_that_is_not_installed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("d2f_runtime.models.names.installed_names", list)
    assert cli.main(["models", "show", DEFAULT]) == 2
    assert f"pip install ./models/{DEFAULT}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["student", "./sdar", "runs/sdar", "word-problems", "my/sdar"])
def test_what_is_no_misspelt_name_is_none(name: str) -> None:
    assert find(name) is None
    assert "did you mean" not in suggest("student")


def test_beginning_comes_before_spelling_and_case_does_not_count() -> None:
    assert did_you_mean("LLADA", ["lama", "llada:8b"]) == "did you mean llada:8b?"
    assert did_you_mean("--prot", ["--port", "--top-p"]) == "did you mean --port?"
    assert did_you_mean("", ["a"]) == ""
    assert did_you_mean("a", ["ab", "ac", "ad", "ae", "af"]) == "did you mean ab, ac, ad or ae?"
