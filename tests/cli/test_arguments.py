"""`d2f-stream generate` over a scripted model: arguments, tokens, defaults and help."""

from pathlib import Path
from typing import Any

import pytest

from d2f_stream import __version__, cli
from scripted_cli import ScriptedLoad, chat, generate

Capture = pytest.CaptureFixture[str]


def test_options_of_the_model_reach_the_loader() -> None:
    load = ScriptedLoad()
    options = ["--model", "folder", "--backend", "onnx", "--quantization", "int8"]
    generate("?", *options, "--device", "cuda:1", "--kv-tokens", "9000", load=load)
    assert load.asked == [("folder", None, "onnx", "int8", "cuda:1", 9000)]


def test_options_of_the_model_default_to_auto() -> None:
    load = ScriptedLoad()
    generate("?", load=load)
    assert load.asked == [(None, None, "auto", "auto", "auto", None)]


ADDRESS = "ws://host"


@pytest.mark.parametrize(
    ("arguments", "environment", "token"),
    [
        (["-m", ADDRESS, "--token", "given"], {"D2F_TOKEN": "kept"}, "given"),
        (["-m", ADDRESS], {"D2F_TOKEN": "kept"}, "kept"),
        (["-m", ADDRESS], {}, None),
        (["-m", "folder"], {"D2F_TOKEN": "kept"}, None),
        (["-m", "folder", "--token", "given"], {}, "given"),  # which load() refuses
    ],
)
def test_token_reaches_a_server_and_nothing_else(
    arguments: list[str],
    environment: dict[str, str],
    token: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("D2F_TOKEN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load = ScriptedLoad()
    assert generate("?", *arguments, load=load) == 0
    assert load.tokens == [token]


def test_another_model_of_a_chat_takes_what_the_options_say_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("prompt_toolkit")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("D2F_TOKEN", "kept")
    load = ScriptedLoad()
    options = ["--model", ".", "--adapter", "draft", "--backend", "torch", "--kv-tokens", "9000"]
    lines = ["/model word-problems", f"/model {ADDRESS}", "/model ."]
    assert chat(*lines, options=options, load=load) == 0
    first = (".", "draft", "torch", "auto", "auto", 9000)
    assert load.asked == [
        first,
        ("word-problems", None, "torch", "auto", "auto", 9000),
        (ADDRESS, None, "auto", "auto", "auto", None),
        first,
    ]
    assert load.tokens == [None, None, "kept", None]


@pytest.mark.parametrize(("model", "token"), [(None, "secret"), ("ws://another", None)])
def test_kept_token_is_for_the_server_that_is_kept_beside_it(
    model: str | None, token: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("D2F_TOKEN", raising=False)
    (tmp_path / "d2f-stream").mkdir()
    config = tmp_path / "d2f-stream" / "config.toml"
    config.write_text(f'server = "{ADDRESS}"\ntoken = "secret"\n')
    load = ScriptedLoad()
    generate("?", *([] if model is None else ["--model", model]), load=load)
    assert load.asked[0][0] == (model or ADDRESS)
    assert load.tokens == [token]


def test_token_for_a_model_that_runs_here_is_refused(capsys: Capture) -> None:
    assert cli.main(["generate", "?", "--token", "given"]) == 2
    assert "a token is for a server, and this model runs here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ([], {}),
        (["--block-size", "16"], {"block_size": 16}),
        (["--confidence", "0.7"], {"confidence_threshold": 0.7}),
        (["--add", "0.2"], {"add_threshold": 0.2}),
        (["--activate", "1"], {"activate_threshold": 1.0}),
        (["--max-active-blocks", "2"], {"max_active_blocks": 2}),
        (["--max-active-blocks", "0"], {"max_active_blocks": None}),
        (["--max-new-tokens", "9"], {"max_new_tokens": 9}),
        (["--temperature", "0.5", "--top-p", "0.9"], {"temperature": 0.5, "top_p": 0.9}),
        (["--seed", "7"], {"seed": 7}),
        (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flag_becomes_an_override_and_others_stay_with_the_model(
    arguments: list[str], overrides: dict[str, Any]
) -> None:
    args = cli.build_parser().parse_args(["generate", "?", *arguments])
    assert cli.overrides_of(args) == overrides


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["", "--json"], "the prompt is empty"),
        ([" \n"], "the prompt is empty"),
        (["?", "--confidence", "2"], "confidence_threshold is 2.0 but must be above 0"),
        (["?", "--max-new-tokens", "100000"], "the model holds 4096"),
        (["?", "--block-size", "128"], "block_size is 128"),
        (["\udcff"], "the prompt is not valid text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: Capture
) -> None:
    assert generate(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("d2f-stream: error: ")
    assert sentence in output.err
    assert output.err.count("\n") == 1


def test_bad_parameter_is_found_before_the_model_loads() -> None:
    load = ScriptedLoad()
    assert generate("?", "--top-p", "0", load=load) == 2
    assert load.asked == []


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"d2f-stream {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["sing"], ["generate", "--model"], ["generate", "?", "--seed", "x"]]
)
def test_unknown_arguments_show_the_usage(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: d2f-stream")


@pytest.mark.parametrize("command", ["chat", "generate", "serve", "distill", "export", "verify"])
def test_help_shows_no_empty_default(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: )" not in shown
    assert "default: ()" not in shown


def test_no_command_prints_the_help(capsys: Capture) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: d2f-stream")


def test_misspelt_command_is_answered_with_the_one_that_was_meant(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generat", "?"])
    assert "there is no command 'generat'; did you mean generate?" in capsys.readouterr().err


def test_default_model_is_that_of_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cli.main(["config", "set", "model", "some/model"]) == 0
    assert cli.main(["config", "set", "token", "secret"]) == 0
    assert cli.main(["config", "set", "server", "localhost:8000"]) == 2
    assert "such as http://localhost:8000" in capsys.readouterr().err
    cli.main(["config", "show"])
    shown = capsys.readouterr().out
    assert "some/model" in shown
    assert "secret" not in shown
    assert (tmp_path / "d2f-stream" / "config.toml").stat().st_mode & 0o077 == 0
    load = ScriptedLoad()
    generate("?", load=load)
    generate("?", "-m", "other", load=load)
    cli.main(["config", "unset", "model"])
    generate("?", load=load)
    assert [asked[0] for asked in load.asked] == ["some/model", "other", None]


@pytest.mark.parametrize("text", ["model = ", "model = 3\n", 'modle = "x"\n'])
def test_broken_config_file_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "d2f-stream").mkdir()
    (tmp_path / "d2f-stream" / "config.toml").write_text(text)
    assert generate("?") == 2
    assert "config.toml" in capsys.readouterr().err


def test_completion_script_knows_the_commands(capsys: Capture) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    assert "recommend" in capsys.readouterr().out


def test_help_lists_the_commands_that_exist(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    output = capsys.readouterr().out
    names = (
        "chat",
        "generate",
        "models",
        "config",
        "serve",
        "doctor",
        "eval",
        "distill",
        "export",
        "verify",
    )
    assert [name for name in names if f"\n    {name} " not in output] == []
