"""What every benchmark result says of its origin: command, commit, machine, versions."""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["environment", "spread", "write_record"]

PACKAGES = (
    "d2f-stream", "onnxruntime", "onnxruntime-gpu", "torch", "triton", "numpy", "tokenizers",
)  # fmt: skip


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """Return command, commit, date, processor and the versions of what may be involved.

    Where the sources are a copy outside their repository, D2F_COMMIT names their commit.
    """
    return {
        "command": shlex.join(["python", "-m", "lab.bench", *arguments]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "versions": _versions(),
    }


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, 10th and 90th percentile and the number of values."""
    ordered = sorted(values)
    deciles = statistics.quantiles(ordered, n=10) if len(ordered) > 1 else ordered * 9
    return {
        "median": round(statistics.median(ordered), digits),
        "p10": round(deciles[0], digits),
        "p90": round(deciles[8], digits),
        "count": len(ordered),
    }


def write_record(
    path: Path, name: str, results: dict[str, Any], *, arguments: Sequence[str]
) -> None:
    """Write a result with its origin as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, **environment(arguments), "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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
