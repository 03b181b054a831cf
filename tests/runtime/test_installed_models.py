"""Models that are packages: found by name, the default where one is there, and broken ones."""

import sys
from pathlib import Path

import pytest

from d2f_runtime.engine.opening import _key, open_engine
from d2f_runtime.models.installed import (
    DEFAULT,
    default_folder,
    embedded_folder,
    find_installed,
    installed_names,
)
from d2f_stream.core.errors import ModelNotFound
from scripted_folder import write_model


def install(site: Path, monkeypatch: pytest.MonkeyPatch, *, name: str = DEFAULT) -> Path:
    """Put a package with an entry point on the path, as pip does; return its model's folder."""
    module = f"model_{abs(hash(site))}"
    (site / module / "model").mkdir(parents=True)
    code = "from pathlib import Path\nFOLDER = Path(__file__).parent / 'model'\n"
    (site / module / "__init__.py").write_text(code)
    about = site / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[d2f_stream.models]\n{name} = {module}:FOLDER\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return site / module / "model"


async def test_an_installed_model_is_the_default_and_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(install(tmp_path, monkeypatch))
    assert DEFAULT in installed_names()
    assert default_folder() == find_installed(DEFAULT) == folder
    for model in (None, DEFAULT):
        async with open_engine(model) as engine:
            assert (await engine.generate("hi").result()).text == "abc"


def test_another_package_is_found_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = default_folder()
    folder = write_model(install(tmp_path, monkeypatch, name="somebody-elses"))
    assert find_installed("somebody-elses") == folder
    assert find_installed("nobodys") is None
    assert default_folder() == before


def test_a_package_without_its_model_says_so_and_is_no_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch)
    with pytest.raises(ModelNotFound, match=r"installed, but .* holds no manifest\.json"):
        open_engine(DEFAULT)
    assert default_folder() == embedded_folder()
    assert "until then word-problems answers" in caplog.text


def test_a_folder_of_the_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(install(tmp_path / "site", monkeypatch))
    own = tmp_path / "work" / DEFAULT
    own.mkdir(parents=True)
    write_model(own, name="own")
    monkeypatch.chdir(own.parent)
    key = _key(DEFAULT, backend="auto", quantization="auto", device="auto")
    assert isinstance(key.path, Path)
    assert key.path.resolve() == own
