"""`d2f-stream generate` over a scripted model: output, arguments, errors and exit codes."""

import io
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from d2f_runtime.backends.scripted import SCRIPTED_INFO, ByteCodec, ScriptedBackend
from d2f_runtime.engine import LocalEngine
from d2f_stream import __version__, cli
from d2f_stream.core.errors import MissingExtra, ModelNotFound, NoChatTemplate
from d2f_stream.core.events import (
    Block,
    Event,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamStarted,
)
from d2f_stream.terminal.views import about_silence
from scripted_cli import ANSWER, ScriptedLoad

Capture = pytest.CaptureFixture[str]
SCRIPTED_CLI = Path(__file__).resolve().parents[1] / "scripted_cli.py"


def generate(*arguments: str, load: cli.Loader | None = None) -> int:
    return cli.main(["generate", *arguments], load=load or ScriptedLoad())


def events_of(output: str) -> list[Event]:
    return [msgspec.json.decode(line, type=Event) for line in output.splitlines()]


def test_plain_output_is_the_text_and_one_newline(capsys: Capture) -> None:
    assert generate("How many?") == 0
    assert capsys.readouterr() == (f"{ANSWER}\n", "")


def test_plain_output_keeps_the_newline_of_the_answer(capsys: Capture) -> None:
    generate("How many?", load=ScriptedLoad(ScriptedBackend("eight\n")))
    assert capsys.readouterr().out == "eight\n"


def test_plain_output_is_flushed_at_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        def __init__(self) -> None:
            super().__init__()
            self.flushed: list[str] = []

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    generate("How many?")
    first_block, second_block = ANSWER[:8], ANSWER[:16]
    assert pipe.flushed[:2] == [first_block, second_block]


def test_json_output_is_one_event_per_line_and_nothing_else(capsys: Capture) -> None:
    assert generate("How many?", "--json") == 0
    output = capsys.readouterr()
    events = events_of(output.out)
    assert isinstance(events[0], StreamStarted)
    assert isinstance(events[-1], StreamFinished)
    assert "".join(event.text for event in events if isinstance(event, Block)) == ANSWER
    assert output.err == ""


def test_json_output_is_utf8_and_has_no_line_breaks_inside(capsys: Capture) -> None:
    generate("?", "--json", load=ScriptedLoad(ScriptedBackend("Übung\nmacht den Meister")))
    output = capsys.readouterr().out
    assert "Übung" in output
    assert all(line.startswith('{"type":"') for line in output.splitlines())


def test_dash_reads_the_prompt_from_standard_input(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What now?\n"))
    load = ScriptedLoad(ScriptedBackend({"What now?": "Rest."}))
    assert generate("-", "--raw", load=load) == 0
    assert capsys.readouterr().out == "Rest.\n"


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


@pytest.mark.parametrize("answer", ["", " \n"])
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_empty_answer_is_told_beside_the_output(
    answer: str, arguments: list[str], capsys: Capture
) -> None:
    info = replace(SCRIPTED_INFO, description="Adds numbers.")
    backend = ScriptedBackend(answer, info=info)
    assert generate("Hello!", *arguments, load=ScriptedLoad(backend)) == 0
    assert capsys.readouterr().err == (
        "d2f-stream: the model ended its answer at once, without a word. "
        "What it is for: Adds numbers.\n"
    )


@pytest.mark.parametrize(
    ("reason", "description", "told"),
    [
        ("eos", "", "the model ended its answer at once, without a word"),
        ("stop", "Adds.", "a stop string ended the answer before its first word"),
        ("length", "Adds.", "the answer reached its length without a word"),
        ("cancelled", "Adds.", ""),
    ],
)
def test_silence_has_its_reason(reason: FinishReason, description: str, told: str) -> None:
    assert about_silence(reason, description) == told


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


def test_stop_string_ends_the_answer(capsys: Capture) -> None:
    generate("?", "--stop", " The answer")
    assert capsys.readouterr().out == "Six and two make eight.\n"


def test_max_new_tokens_cuts_the_answer(capsys: Capture) -> None:
    generate("?", "--max-new-tokens", "7")
    assert capsys.readouterr().out == "Six and\n"


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


@pytest.mark.parametrize(
    "error",
    [ModelNotFound("no model\nat nowhere"), MissingExtra("backend 'onnx'", "onnxruntime", "edge")],
)
def test_model_that_cannot_be_opened_is_one_line_and_exit_code_1(
    error: Exception, capsys: Capture
) -> None:
    def load(model: str | None = None, **options: object) -> Any:
        raise error

    assert generate("?", load=load) == 1
    assert capsys.readouterr().err == f"d2f-stream: error: {' '.join(str(error).split())}\n"


def test_failing_step_is_one_line_and_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    load = ScriptedLoad(ScriptedBackend(ANSWER, errors={5: RuntimeError("boom")}))
    assert generate("?", load=load) == 1
    output = capfd.readouterr()
    assert output.out.startswith("Six and ")
    assert output.err.startswith("d2f-stream: error: ")
    assert "boom" in output.err
    assert output.err.count("\n") == 1


def test_failing_step_is_also_an_event_in_json(capsys: Capture) -> None:
    load = ScriptedLoad(ScriptedBackend(ANSWER, errors={5: RuntimeError("boom")}))
    assert generate("?", "--json", load=load) == 1
    assert isinstance(events_of(capsys.readouterr().out)[-1], StreamFailed)


def test_slot_is_closed_after_the_answer() -> None:
    load = ScriptedLoad()
    generate("?", load=load)
    assert load.backend.num_opened == load.backend.num_closed == 1
    assert load.backend.closed


def test_reader_that_goes_away_ends_the_command_silently() -> None:
    command = f"{shlex.join([sys.executable, str(SCRIPTED_CLI), 'generate', 'hello'])} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, timeout=60, check=False
    )
    assert done.stdout == b"o"
    assert done.stderr == b"open slots: 0\n"
    assert done.returncode == 141


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


def test_no_command_prints_the_help(capsys: Capture) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: d2f-stream")


def test_misspelt_command_is_answered_with_the_one_that_was_meant(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generat", "?"])
    assert "there is no command 'generat'; did you mean generate?" in capsys.readouterr().err


def test_prompt_goes_through_the_chat_template_unless_it_is_raw(capsys: Capture) -> None:
    templated = "system: Be brief.\nuser: How many?\nassistant: "
    load = ScriptedLoad(ScriptedBackend({templated: "Eight.", "How many?": "Raw."}))
    generate("How many?", "--system", "Be brief.", load=load)
    generate("How many?", "--raw", load=load)
    assert capsys.readouterr().out == "Eight.\nRaw.\n"


def test_model_without_a_template_gets_the_prompt_itself(capsys: Capture) -> None:
    class Plain(ByteCodec):
        def render(self, messages: Sequence[Mapping[str, str]]) -> str:
            raise NoChatTemplate("the model has no chat template")

    class Load(ScriptedLoad):
        def __call__(self, *arguments: Any, **options: Any) -> LocalEngine:
            return LocalEngine.over(self.backend, Plain())

    backend = ScriptedBackend({"How many?": "Eight."})
    assert generate("How many?", load=Load(backend)) == 0
    assert capsys.readouterr().out == "Eight.\n"
    assert generate("How many?", "--system", "Be brief.", load=Load(backend)) == 2
    assert "no chat template" in capsys.readouterr().err


def test_pipe_is_read_without_a_dash(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\n"))
    assert generate("--raw", load=ScriptedLoad(ScriptedBackend({"How many?": "Eight."}))) == 0
    assert capsys.readouterr().out == "Eight.\n"


def test_default_model_is_that_of_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert cli.main(["config", "set", "model", "some/model"]) == 0
    assert cli.main(["config", "set", "token", "secret"]) == 0
    capsys.readouterr()
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
