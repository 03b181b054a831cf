"""What the edge extra costs a small machine: disk, download, memory, time to the first block.

Works in a fresh virtual environment, made from the built wheel, so that nothing of the caller's
installation is counted.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

__all__ = ["footprint"]

COLD_STARTS = 5
PROBE = """
import asyncio, json, resource, sys, time
started = time.perf_counter()
import d2f_stream
imported = time.perf_counter()

async def main():
    session = d2f_stream.generate(sys.argv[1])
    async for block in session:
        return time.perf_counter()

first = asyncio.run(main())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"import_ms": 1e3 * (imported - started),
                  "first_block_ms": 1e3 * (first - started), "peak_rss_mb": peak / 1024}))
"""


def footprint(prompt: str) -> dict[str, Any]:
    """Build the wheel, install it with the edge extra, and measure."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").exists():
        raise SystemExit("footprint builds the wheel, so it needs a source checkout")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        downloads = folder / "wheels"
        _pip(sys.executable, "wheel", "--no-deps", "-w", str(folder / "own"), str(root))
        (wheel,) = (folder / "own").glob("*.whl")
        _pip(sys.executable, "download", "-d", str(downloads), f"{wheel}[edge]")
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        before = _size(folder / "venv")
        _pip(python, "install", "--no-index", "--find-links", str(downloads), f"{wheel}[edge]")
        starts = [_probe(python, prompt, folder) for _ in range(COLD_STARTS)]
        return {
            "wheel_mb": _mb(wheel.stat().st_size),
            "download_mb": _mb(_size(downloads)),
            "downloads_mb": {p.name: _mb(p.stat().st_size) for p in sorted(downloads.iterdir())},
            "installed_mb": _mb(_size(folder / "venv") - before),
            "aarch64_wheels": _aarch64(downloads, folder / "aarch64"),
            **{key: round(statistics.median(s[key] for s in starts), 1) for key in starts[0]},
            "cold_starts": COLD_STARTS,
        }


def _pip(python: str, *arguments: str) -> None:
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _probe(python: str, prompt: str, folder: Path) -> dict[str, float]:
    run = subprocess.run(
        [python, "-c", PROBE, prompt], capture_output=True, text=True, check=True, cwd=folder
    )
    result: dict[str, float] = json.loads(run.stdout)
    return result


def _aarch64(downloads: Path, target: Path) -> dict[str, str]:
    """Ask pip for an aarch64 Linux wheel of the same version of everything that was downloaded."""
    found = {}
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28, 31, 34)]
    for path in sorted(downloads.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        if name == "d2f_stream":
            continue
        options = [option for tag in platforms for option in ("--platform", tag)]
        try:
            _pip(
                sys.executable, "download", "--no-deps", "--only-binary=:all:", *options,
                "--python-version", "3.12", "--implementation", "cp", "-d", str(target / name),
                f"{name}=={version}",
            )  # fmt: skip
            (wheel,) = (target / name).iterdir()
            found[name] = wheel.name
        except subprocess.CalledProcessError:
            found[name] = "none"
    return found


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _mb(size: int) -> float:
    return round(size / 1e6, 1)
