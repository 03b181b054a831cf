"""`d2f-stream generate` over a scripted model: output, errors and exit codes."""

import io
import logging
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
from d2f_runtime.models.hub import NotFetched
from d2f_stream.core.errors import MissingExtra, ModelNotFound, NoChatTemplate
from d2f_stream.core.events import (
    Block,
    Event,
    FinishReason,
    StreamFailed,
    StreamFinished,
    StreamStarted,
)
from d2f_stream.terminal.losses import tell_of_losses
from d2f_stream.terminal.views import about_silence
from scripted_cli import ANSWER, ScriptedLoad, generate

SCRIPTED_CLI = Path(__file__).resolve().parents[1] / "scripted_cli.py"

Capture = pytest.CaptureFixture[str]


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


def test_stop_string_ends_the_answer(capsys: Capture) -> None:
    generate("?", "--stop", " The answer")
    assert capsys.readouterr().out == "Six and two make eight.\n"


def test_max_new_tokens_cuts_the_answer(capsys: Capture) -> None:
    generate("?", "--max-new-tokens", "7")
    assert capsys.readouterr().out == "Six and\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ModelNotFound("no model\nat nowhere"), 2),
        (NotFetched("no hub"), 1),
        (MissingExtra("backend 'onnx'", "onnxruntime", "edge"), 1),
    ],
)
def test_model_that_cannot_be_opened_is_one_line(
    error: Exception, status: int, capsys: Capture
) -> None:
    def load(model: str | None = None, **options: object) -> Any:
        raise error

    assert generate("?", load=load) == status
    assert capsys.readouterr().err == f"d2f-stream: error: {' '.join(str(error).split())}\n"


def test_failing_step_is_one_line_and_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    load = ScriptedLoad(ScriptedBackend(ANSWER, errors={5: RuntimeError("boom\nand more")}))
    assert generate("?", load=load) == 1
    output = capfd.readouterr()
    assert output.out.startswith("Six and ")
    assert output.err == "d2f-stream: error: the model failed in use: RuntimeError: boom\n"


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, str(SCRIPTED_CLI), "generate", "hello"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.stderr == b"d2f-stream: error: No space left on device\nopen slots: 0\n"
    assert done.returncode == 1


def test_prompt_goes_through_the_chat_template_unless_it_is_raw(capsys: Capture) -> None:
    templated = "system: Be brief.\nuser: How many?\nassistant: "
    load = ScriptedLoad(ScriptedBackend({templated: "Eight.", "How many?": "Raw."}))
    generate("How many?", "--system", "Be brief.", load=load)
    generate("How many?", "--raw", load=load)
    assert capsys.readouterr().out == "Eight.\nRaw.\n"


def test_a_raw_prompt_stays_as_it_is_where_the_model_chats(capsys: Capture) -> None:
    class Chatting(ByteCodec):
        chats = True

    class Load(ScriptedLoad):
        def __call__(self, *arguments: Any, **options: Any) -> LocalEngine:
            return LocalEngine.over(self.backend, Chatting())

    asked = {"user: How many?\nassistant: ": "Eight.", "How many?": "Raw."}
    generate("How many?", load=Load(ScriptedBackend(asked)))
    generate("How many?", "--raw", load=Load(ScriptedBackend(asked)))
    assert capsys.readouterr().out == "Eight.\nRaw.\n"


def test_a_lost_connection_is_told_at_once(capsys: Capture) -> None:
    tell_of_losses()
    tell_of_losses()
    logger = logging.getLogger("d2f_stream.client")
    logger.info("lost the server: %s", "closed (1006)", extra={"lost": True})
    logger.info("something else")
    told = "d2f-stream: lost the server: closed (1006); reconnecting ...\n"
    assert capsys.readouterr().err == told


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
