"""Cpus: how many of them this process may keep busy, by its affinity and its container's quota.

Libraries count the cores of the machine. In a container with a quota their threads then spend each
period's time at once, spin on one another, and all stand still until the next period begins.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["bound_torch_threads", "num_cpus", "quota_of"]

_PROCESS: Final = os.getpid()


def num_cpus() -> int:
    """Return how many threads can compute at once here, at least 1.

    Whole ones of the quota only: a thread more would stop all of them for a part of each period.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = quota_of(Path("/")) if sys.platform == "linux" else None
    return max(1, count if quota is None else min(count, int(quota)))


def bound_torch_threads() -> None:
    """Let torch compute with no more threads than that; with one in a process that was forked.

    There, the threads that OpenMP has begun are the parent's, and a loop over them never ends.
    """
    import torch

    most = 1 if os.getpid() != _PROCESS else num_cpus()
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)


def quota_of(root: Path) -> float | None:
    """Return the CPU quota of this process's control groups, in CPUs; None where there is none.

    Both versions of the kernel's interface are read, and of nested groups the tightest counts.

    Args:
        root: "/", or a copy of its proc and sys for tests.
    """
    found = [quota for folder in _groups(root) if (quota := _quota_in(folder)) is not None]
    return min(found, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the groups that bound this process, the innermost first."""
    paths = {}  # by controllers, "" for version 2
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            paths["" if number == "0" else "cpu"] = path
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        kind, *_, options = rest.split(" ")
        key = "" if kind == "cgroup2" else "cpu"
        is_ours = kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(","))
        if not is_ours or key not in paths:
            continue
        mount_root, mount = fields.split(" ")[3:5]
        top = root / mount.lstrip("/")
        # In a container the path may be the host's, of which the mount shows a part only.
        inner = paths[key].removeprefix("" if mount_root == "/" else mount_root).strip("/")
        folder = top / inner if ".." not in inner.split("/") else top
        while folder != top:
            yield folder
            folder = folder.parent
        yield top


def _quota_in(group: Path) -> float | None:
    limit, _, period = _read(group / "cpu.max").strip().partition(" ")  # version 2
    if not limit:
        limit = _read(group / "cpu.cfs_quota_us").strip()
        period = _read(group / "cpu.cfs_period_us").strip()
    if not (limit.isdecimal() and period.isdecimal()) or int(period) == 0:
        return None  # "max", or -1: no bound
    return int(limit) / int(period)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
