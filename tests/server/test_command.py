"""`d2f-stream serve`: its arguments, its refusals, and the process itself."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fakes
from d2f_stream import cli
from d2f_stream.core.errors import InvalidRequest
from d2f_stream.server.command import run, settings_of, tokens_of
from d2f_stream.server.settings import ServeSettings
from serving import ALICE, Address, Peer, check_whole, request

TOKEN = "0123456789abcdef"


def settings(*arguments: str, **environment: str) -> ServeSettings:
    return settings_of(cli.build_parser().parse_args(["serve", *arguments]), environment)


def test_defaults_are_the_safe_ones() -> None:
    chosen = settings()
    assert chosen == ServeSettings()
    assert (chosen.host, chosen.port, chosen.auth.required) == ("127.0.0.1", 8000, False)


@pytest.mark.parametrize(("arguments", "may"), [([], False), (["--may-narrow"], True)])
def test_windows_narrow_only_where_that_is_asked_for(arguments: list[str], may: bool) -> None:
    assert cli.build_parser().parse_args(["serve", *arguments]).may_narrow is may


def test_arguments_become_settings() -> None:
    chosen = settings(
        *("--host", "0.0.0.0", "--port", "0", "--token", f"alice={ALICE}", "--no-ui"),
        *("--origin", "https://chat.example/", "--mqtt", "mqtt://127.0.0.1"),
        *("--allowed-host", "Host.Docker.Internal", "--allowed-host", "d2f"),
        *("--max-streams", "3", "--max-new-tokens", "4", "--max-prompt-tokens", "5"),
        *("--requests-per-minute", "6", "--resume-ttl", "7", "--shutdown-deadline", "8"),
    )
    assert chosen.auth.tokens == {"alice": ALICE}
    assert chosen.auth.origins == ("https://chat.example",)
    assert chosen.allowed_hosts == ("host.docker.internal", "d2f")
    assert (chosen.ui, chosen.mqtt, chosen.shutdown_deadline_s) == (False, "mqtt://127.0.0.1", 8.0)
    limits = chosen.limits
    assert (limits.max_streams, limits.max_new_tokens, limits.max_prompt_tokens) == (3, 4, 5)
    assert (limits.requests_per_minute, limits.resume_ttl_s) == (6, 7.0)


def test_tokens_come_from_arguments_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# of the devices\n\ncamera={TOKEN}c\n{TOKEN}=\n")
    chosen = settings("--token", f"{TOKEN}a", "--token-file", str(path), D2F_TOKEN=f"{TOKEN}e")
    assert chosen.auth.tokens == {
        "client-1": f"{TOKEN}a",
        "camera": f"{TOKEN}c",
        "client-3": f"{TOKEN}=",
        "client-4": f"{TOKEN}e",
    }


def test_broker_can_come_from_the_environment() -> None:
    assert settings(D2F_MQTT="mqtt://user:secret@host").mqtt == "mqtt://user:secret@host"


@pytest.mark.parametrize("given", [["a=" + TOKEN, "a=other"], ["a=" + TOKEN, "b=" + TOKEN]])
def test_clients_and_tokens_are_distinct(given: list[str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokens_of(given)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "65536"], "port is 65536 but must be between 0"),
        (["--port", "-1"], "port is -1"),
        (["--token", "secret"], "the token of 'client-1' has 6 characters but needs at least 16"),
        (["--token", "alice=secret"], "the token of 'alice' has 6 characters"),
        (["--token", ""], "the token of 'client-1' has 0 characters"),
        (["--host", "0.0.0.0"], "give one with --token, or let everybody in with --insecure"),
        (["--host", "::"], "host :: can be reached from other machines"),
        (["--host", "myhost"], "host myhost can be reached"),
        (["--origin", "chat.example"], "--origin is 'chat.example' but must be an origin"),
        (["--allowed-host", "http://d2f:8000"], "--allowed-host is 'http://d2f:8000' but must be"),
        (["--mqtt", "http://user:secret@x"], "--mqtt: the MQTT address cannot be read"),
        (["--mqtt", ""], "--mqtt is empty; give it a URL, or leave it out"),
        (["--mqtt", "mqtt://user:secret@host:port"], "--mqtt: the MQTT address cannot be read"),
        (["--log", ""], "--log is empty; give it a URL, or leave it out"),
        (["--token-file", "/nonexistent"], "the token file /nonexistent cannot be read"),
        (["--max-streams", "0"], "--max-streams is 0 but must be at least 1"),
        (["--requests-per-minute", "-2"], "--requests-per-minute is -2"),
        (["--resume-ttl", "nan"], "--resume-ttl is nan"),
        (["--shutdown-deadline", "-1"], "--shutdown-deadline is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_loads(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--model", "/nonexistent", *arguments]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert "secret" not in error


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://user:secret@host", "the log needs a URL such as"),
        ("valkey://user:secret@host:port", "the log needs a URL such as"),
        ("valkey://user:secret@[::1", "the log needs a URL such as"),
        (
            "valkeys://host?ssl_ca_certs=/nonexistent/ca.pem",
            "ssl_ca_certs of the log's URL is '/nonexistent/ca.pem', which is no file",
        ),
    ],
)
def test_log_that_cannot_be_used_is_refused_before_the_model_loads(
    url: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("valkey", reason="valkey is not installed")
    arguments = ["serve", "--model", "/nonexistent", "--log", url]
    assert cli.main(arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert "secret" not in error


def test_log_without_its_library_is_refused_before_the_model_loads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("d2f_stream.server."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "valkey", None)
    assert cli.main(["serve", "--model", "/nonexistent", "--log", "valkey://host"]) == cli.FAILED
    assert "needs valkey" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *("--model=m", "--adapter=a", "--backend=torch", "--device=cpu", "--quantization=int8"),
        *("--kv-tokens=5", "--family=dream", "--no-warm-up", "--may-narrow"),
    ],
)
def test_engines_take_no_option_of_loading(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--engines", "ray://", "--port", "0", option]) == cli.BAD_INPUT
    name = option.partition("=")[0]
    assert f"--engines and {name} do not go together" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_this_machine_needs_no_token(host: str) -> None:
    assert settings("--host", host).is_loopback


def test_insecure_lets_everybody_in() -> None:
    assert not settings("--host", "0.0.0.0", "--insecure").auth.required


def test_port_in_use_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == cli.FAILED
    error = capsys.readouterr().err
    assert error.startswith(f"d2f-stream: error: cannot listen on 127.0.0.1 port {port}: Address")
    assert error.count("\n") == 1


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "prometheus_client"])
def test_missing_extra_says_what_to_install(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("d2f_stream.server."):
            monkeypatch.delitem(sys.modules, name)
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", "--port", "0"]) == cli.FAILED
    error = capsys.readouterr().err
    assert f"serving needs {missing}" in error
    assert "pip install 'd2f-stream[serve]'" in error


def test_the_device_s_thread_waits_less_for_the_event_loop_s_than_python_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[float] = []
    monkeypatch.setattr(sys, "setswitchinterval", chosen.append)
    monkeypatch.setattr(asyncio, "run", lambda work: work.close() or 0)
    assert run(cli.build_parser().parse_args(["serve", "--model", "word-problems"])) == 0
    assert chosen == [0.0005]


def test_other_commands_import_nothing_of_the_extra() -> None:
    extra = "{'starlette', 'uvicorn', 'websockets', 'prometheus_client'}"
    code = f"import sys, d2f_stream.cli; print({extra} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_help_warns_of_tokens_in_the_list_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A token on the command line is visible to everybody on this machine" in text


async def test_process_serves_and_ends_by_sigterm(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text(json.dumps({"answers": fakes.ANSWER}))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "d2f_stream.cli", "serve", "--model", str(tmp_path)),
        *("--backend", "scripted", "--port", "0", "--token", f"alice={ALICE}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        assert line.startswith(f"d2f-stream serves {tmp_path.name} on cpu at http://127.0.0.1:")
        assert line.endswith("(stop with Ctrl-C)\n")
        address = Address(int(line.split("127.0.0.1:")[1].split()[0]))
        async with Peer.to(address, token=ALICE) as peer:
            await peer.hello()
            await peer.send(request())
            check_whole(await peer.answer())
            process.send_signal(signal.SIGTERM)
            assert (await peer.closed())[0] == 1012
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0
    assert b"shutting down" in errors
    assert b"Traceback" not in errors
    assert ALICE.encode() not in errors
