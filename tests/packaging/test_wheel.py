"""The wheel: what it holds, how large it is, and that it imports outside the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from d2f_stream import __version__

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "scripts" / "page-libraries.js"
MAX_WHEEL_BYTES = 60 * 2**20
MAX_SOURCE_BYTES = 5 * 10**6
EMBEDDED = "d2f_runtime/models/embedded/"
DIST_INFO = f"d2f_stream-{__version__}.dist-info"


def build(folder: Path, target: str, *, root: Path = ROOT) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            target,
            "--directory",
            str(folder),
        ],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=100,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build(folder, "wheel")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def import_from(folder: Path, code: str) -> str:
    """Run code with `folder` first on the path, away from the repository and its installation."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder.parent,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_three_packages_and_nothing_else(unpacked: Path) -> None:
    names = {path.name for path in unpacked.iterdir()}
    assert names == {"d2f_stream", "d2f_runtime", "d2f_export", DIST_INFO}


def test_wheel_holds_every_module_of_the_repository(unpacked: Path) -> None:
    for folder in (ROOT / "d2f_stream", ROOT / "runtime/d2f_runtime", ROOT / "export/d2f_export"):
        expected = {path.relative_to(folder.parent) for path in folder.rglob("*.py")}
        packed = {path.relative_to(unpacked) for path in (unpacked / folder.name).rglob("*.py")}
        assert packed == expected


def test_wheel_is_typed_and_licensed(unpacked: Path) -> None:
    assert all((unpacked / name / "py.typed").is_file() for name in ("d2f_stream", "d2f_runtime"))
    assert (unpacked / DIST_INFO / "licenses" / "LICENSE").is_file()


def test_page_has_the_files_that_it_may_have_and_the_licences_of_all_it_takes(
    unpacked: Path,
) -> None:
    page = unpacked / "d2f_stream" / "server" / "static"
    files = [path.relative_to(page) for path in page.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".css", ".html", ".js", ".svg", ".ts", ".txt"}
    vendored = {path.name for path in files if path.parent.name == "vendor"}
    assert vendored == {"LICENSES.txt", "libraries.d.ts", "libraries.js"}
    packages = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    licences = (page / "vendor" / "LICENSES.txt").read_text()
    for name, version in re.findall(r"^==== (\S+) (\S+) ", licences, re.MULTILINE):
        assert packages[f"node_modules/{name}"]["version"] == version
    for name in re.findall(r'from "(@[^"/]+/[^"/]+|[^"/]+)', LIBRARIES.read_text()):
        assert f"==== {name} " in licences


def test_wheel_is_small_enough(wheel: Path) -> None:
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES


def test_wheel_needs_only_msgspec(unpacked: Path) -> None:
    metadata = message_from_bytes((unpacked / DIST_INFO / "METADATA").read_bytes())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.split(">")[0] for line in needed] == ["msgspec"]


def test_unpacked_wheel_imports(unpacked: Path) -> None:
    code = "import d2f_stream; print(d2f_stream.__file__, d2f_stream.__version__)"
    assert import_from(unpacked, code).split() == [
        str(unpacked / "d2f_stream" / "__init__.py"),
        __version__,
    ]


def test_unpacked_wheel_runs_its_command(unpacked: Path) -> None:
    code = "import sys; from d2f_stream.cli import main; sys.exit(main(['--version']))"
    assert import_from(unpacked, code) == f"d2f-stream {__version__}\n"


def test_index_page_names_no_file_of_the_repository(unpacked: Path) -> None:
    text = message_from_bytes((unpacked / DIST_INFO / "METADATA").read_bytes()).get_payload()
    targets = re.findall(r"\]\(([^)\s]+)|src=\"([^\"]+)", str(text))
    assert targets
    assert all((link or image).startswith(("https://", "#")) for link, image in targets)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build(folder, "sdist")
    (path,) = folder.glob("*.tar.gz")
    return path


def test_source_distribution_is_small_and_builds_the_same_modules(
    source: Path, unpacked: Path, tmp_path: Path
) -> None:
    assert source.stat().st_size < MAX_SOURCE_BYTES
    shutil.unpack_archive(source, tmp_path)
    (root,) = tmp_path.iterdir()
    build(tmp_path / "dist", "wheel", root=root)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("RECORD")}
    files = [path for path in unpacked.rglob("*") if path.is_file()]
    packed = {str(path.relative_to(unpacked)) for path in files if path.suffix != ".pyc"}
    missing = {name for name in packed - names if not name.endswith("RECORD")}
    assert all(name.startswith(EMBEDDED) for name in missing)
    assert names <= packed
