"""`d2f-stream models pull`, from a small hub on loopback: progress, interruptions, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2f_stream import cli
from local_hub import COMMIT, REPO, LocalHub
from scripted_cli import chat
from tiny_checkpoints import write_model

pytest.importorskip("huggingface_hub")
pytest.importorskip("prompt_toolkit")

SHARDS = ["model-1.safetensors", "model-2.safetensors"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {f"layer.{i}": shard for i, shard in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in SHARDS:
        (folder / shard).write_bytes(shard.encode() * 50_000)
    hub = LocalHub(folder)
    with hub.online(tmp_path / "cache", monkeypatch):
        yield hub


def pulled(tmp_path: Path) -> dict[str, bytes]:
    folder = tmp_path / "cache" / "models--org--tiny-dream" / "snapshots" / COMMIT
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pull_fetches_what_the_model_needs_and_shows_the_progress(
    hub: LocalHub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_POSITION", "-1")  # progress of a file beyond terminals too
    assert cli.main(["models", "pull", REPO]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{REPO}: ")
    assert COMMIT in shown.out
    for shard in SHARDS:
        assert f"{shard}: 100%" in shown.err
    assert sorted(hub.fetched) == ["config.json", *SHARDS, "model.safetensors.index.json"]
    assert pulled(tmp_path) == {file.name: file.read_bytes() for file in hub.folder.iterdir()}
    assert cli.main(["models", "list"]) == 0
    assert f" {REPO}\n" in capsys.readouterr().out


def test_pull_goes_on_where_it_was_interrupted(
    hub: LocalHub, tmp_path: Path, capsys: Capture
) -> None:
    hub.failing = {SHARDS[1]}
    assert cli.main(["models", "pull", REPO]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"d2f-stream: error: the weights of {REPO} have not all come; ")
    assert "500" in error
    hub.failing.clear()
    hub.fetched.clear()
    assert cli.main(["models", "pull", REPO]) == 0
    assert hub.fetched == [SHARDS[1]]
    assert pulled(tmp_path)[SHARDS[1]] == (hub.folder / SHARDS[1]).read_bytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "command", ["models pull", "generate hi -m", "serve --port 0 -m", "chat -m"]
)
def test_interrupt_ends_a_fetch_in_the_middle_of_a_file(
    hub: LocalHub, command: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", "Dream", num_shards=2)
    hub.folder = tmp_path / "model"
    first, second = sorted(file.name for file in hub.folder.glob("*.safetensors"))
    hub.interrupting = {second}
    assert cli.main([*command.split(), REPO]) == 130
    assert [name for name in hub.fetched if name.endswith("safetensors")] == [first, second]
    assert first in pulled(tmp_path)


@pytest.mark.timeout(60)
def test_interrupt_of_another_model_in_a_chat_ends_its_fetch_alone(
    hub: LocalHub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    write_model(tmp_path / "model", "Dream", num_shards=2)
    hub.folder = tmp_path / "model"
    first, second = sorted(file.name for file in hub.folder.glob("*.safetensors"))
    hub.interrupting = {second}
    assert chat(f"/model {REPO}", "Six and two?") == 0
    assert first in pulled(tmp_path)
    told = capsys.readouterr().out
    assert "stopped; " in told
    assert "The answer is 8." in told


def test_connection_that_breaks_amid_a_file_goes_on_in_its_middle(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # of a second
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MB
    hub.cut = {SHARDS[0]}
    assert cli.main(["models", "pull", REPO]) == 0
    size = len(SHARDS[0]) * 50_000
    assert f"{SHARDS[0]}@{size // 2}" in hub.fetched
    assert pulled(tmp_path)[SHARDS[0]] == (hub.folder / SHARDS[0]).read_bytes()


@pytest.mark.parametrize(
    ("repo", "status", "sentence"),
    [
        ("org/private", 1, "does not let you read org/private (status 401); log in with `hf auth"),
        ("org/secret", 2, "neither a folder nor a public repository org/secret; for a private one"),
        ("zzz", 2, "nothing is known of zzz; `d2f-stream models list` shows the names"),
        ("sdar:3b", 2, "there is no model called 'sdar:3b'; did you mean sdar:"),
        ("org/missing", 2, "neither a folder nor a public repository org/missing"),
        ("org/gated", 1, "org/gated is gated: accept its terms on huggingface.co"),
        (f"{REPO}@v9", 2, f"the repository {REPO} has no revision 'v9'"),
    ],
)
def test_refusal_is_one_clear_line(
    hub: LocalHub, repo: str, status: int, sentence: str, capsys: Capture
) -> None:
    hub.refused = {"org/private": (401, ""), "org/secret": (401, "RepoNotFound")}
    hub.refused |= {"org/gated": (403, "GatedRepo")}
    assert cli.main(["models", "pull", repo]) == status
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_installed_model_is_not_fetched(hub: LocalHub, capsys: Capture) -> None:
    assert cli.main(["models", "pull", "word-problems"]) == 0
    assert capsys.readouterr().out == "word-problems is installed: there is nothing to fetch\n"
    assert hub.fetched == []
