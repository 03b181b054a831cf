"""An export that cannot finish leaves nothing under the final name."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2f_runtime.models.manifest import read_manifest, verify_files
from d2f_stream import cli
from tiny_models import tiny_folder

pytestmark = pytest.mark.torch

PAUSED = """
import sys
from pathlib import Path
import d2f_export.onnx.weights as weights
from d2f_stream import cli

inner = weights._arrays

def paused(graph, parameters):
    for index, item in enumerate(inner(graph, parameters)):
        yield item
        if index == 5:
            print("half", flush=True)
            sys.stdin.read()  # for ever

weights._arrays = paused
cli.main(sys.argv[1:])
"""


def arguments(output: Path, tmp_path: Path, *more: str) -> list[str]:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    model = str(tiny_folder("dream", "torch"))
    command = ["export", "--model", model, "--output", str(output), "--quantize", "fp32"]
    return [*command, "--tokenizer", str(tokenizer), *more]


def limit_files(num_bytes: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails instead, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "d2f_stream.cli"]
    done = subprocess.run(
        [*command, *arguments(out / "tiny", tmp_path, "--target", "device")],
        preexec_fn=limit_files(100_000),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("d2f-stream: error: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert list(out.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert cli.main(arguments(tmp_path / "out" / "tiny", tmp_path)) == 1
    assert "0.0 GB free; choose another folder" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_kill_in_mid_write_leaves_the_old_artefact_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tiny"
    assert cli.main(arguments(folder, tmp_path, "--name", "first")) == 0
    command = [sys.executable, "-c", PAUSED]
    again = arguments(folder, tmp_path, "--name", "second", "--target", "device", "--window", "8")
    with subprocess.Popen(
        [*command, *again], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        (unfinished,) = [path for path in folder.parent.iterdir() if path != folder]
        assert unfinished.name.startswith(".tiny-")
        assert (unfinished / "model.onnx.data").is_file()
        assert not (unfinished / "manifest.json").exists()
        process.kill()
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert manifest.name == "first"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
