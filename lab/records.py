"""Records: the JSON files of benchmark results, with their origin."""

import json
import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2f_runtime.provenance import environment

__all__ = ["command_of", "replace_text", "spread", "whole_lines", "write_record"]


def command_of(module: str, arguments: Sequence[str]) -> str:
    """Return the command line that runs a module of the lab."""
    return shlex.join(["python", "-m", module, *arguments])


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


def whole_lines(path: Path) -> str:
    """Return a file's text; a last line that was not written whole is dropped from the file too.

    Empty where there is no such file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        replace_text(path, whole)
    return whole


def replace_text(path: Path, text: str) -> None:
    """Write a file anew, at once."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_record(path: Path, name: str, results: dict[str, Any], *, command: str) -> None:
    """Write a result with its origin as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, **environment(command), "results": results}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
