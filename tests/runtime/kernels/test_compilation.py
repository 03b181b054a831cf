"""What had to be compiled is told once, and to those who listened before as well."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from triton import knobs

from d2f_runtime.kernels import compilation
from d2f_runtime.kernels.compilation import CompilationLog, kept_in

pytestmark = pytest.mark.torch


def compile_one(*, seconds: float = 0.0, cached: bool = False) -> None:
    """Tell of a kernel as Triton's compiler does."""
    listener: Any = knobs.compilation.listener
    times = SimpleNamespace(total=seconds * 1e6)
    listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=cached)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return what another listener hears."""
    heard: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda *, cache_hit, **_: heard.append(cache_hit)
    )
    compilation._listener.cache_clear()
    return heard


@pytest.mark.usefixtures("heard")
def test_what_was_compiled_is_told_once() -> None:
    log = CompilationLog()
    assert log.news() == ""
    compile_one(seconds=1.25)
    compile_one(seconds=0.5)
    compile_one(cached=True)
    found = log.news()
    assert found.startswith("2 kernels were compiled in 1.8 s, 1 were read from ")
    assert log.news() == ""
    assert CompilationLog().news() == "", "others' kernels are no news to a later runner"


def test_others_are_told_as_before(heard: list[bool]) -> None:
    CompilationLog()
    compile_one()
    compile_one(cached=True)
    assert heard == [False, True]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels" / "here"))
    assert kept_in() == str(tmp_path / "kernels" / "here")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    assert kept_in().startswith(f"nowhere, as {tmp_path} is read-only (TRITON_CACHE_DIR")
