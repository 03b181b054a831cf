"""Provenance: what a recorded result says of its origin: command, commit, machine, versions."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2f_runtime.cpus import num_cpus

__all__ = ["environment"]

PACKAGES = (
    "d2f-stream", "onnxruntime", "onnxruntime-gpu", "torch", "triton", "numpy", "tokenizers",
)  # fmt: skip


def environment(command: str) -> dict[str, Any]:
    """Return the command, commit, date, processor and the versions of what may be involved.

    Where the sources are a copy outside their repository, D2F_COMMIT names their commit.
    """
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": num_cpus(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def _commit() -> str:
    if named := os.environ.get("D2F_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if dirty else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
