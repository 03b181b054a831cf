"""How many CPUs a process may keep busy: on a machine, and in containers of either version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2f_runtime.cpus import num_cpus, quota_of

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "32 23 0:28 {root} /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def tree(root: Path, *, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A copy of what the kernel shows, with control groups of our own."""
    held = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}
    held |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in held.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpu_max", "quota"),
    [("200000 100000", 2.0), ("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", None)],
)
def test_version_2(tmp_path: Path, cpu_max: str, quota: float | None) -> None:
    files = {"cpu.max": f"{cpu_max}\n"}
    root = tree(tmp_path, cgroup="0::/\n", mounts=V2.format(root="/"), files=files)
    assert quota_of(root) == quota


@pytest.mark.parametrize(
    ("quota_us", "quota"), [("300000", 3.0), ("25000", 0.25), ("-1", None), ("", None)]
)
def test_version_1(tmp_path: Path, quota_us: str, quota: float | None) -> None:
    files = {
        "cpu,cpuacct/docker/id/cpu.cfs_quota_us": f"{quota_us}\n",
        "cpu,cpuacct/docker/id/cpu.cfs_period_us": "100000\n",
    }
    groups = "5:cpuset:/other\n4:cpu,cpuacct:/docker/id\n"
    root = tree(tmp_path, cgroup=groups, mounts=V1.format(root="/"), files=files)
    assert quota_of(root) == quota


def test_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = {
        "cpu.max": "max 100000",
        "slice/cpu.max": "100000 100000",
        "slice/pod/cpu.max": "400000 100000",
        "slice/pod/app/cpu.max": "max 100000",
        "slice/other/cpu.max": "10000 100000",
    }
    mounts = V2.format(root="/")
    root = tree(tmp_path, cgroup="0::/slice/pod/app\n", mounts=mounts, files=files)
    assert quota_of(root) == 1.0


def test_container_that_sees_its_own_part_only(tmp_path: Path) -> None:
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    groups = "4:cpu,cpuacct:/docker/id\n0::/docker/id\n"
    root = tree(tmp_path, cgroup=groups, mounts=V1.format(root="/docker/id"), files=files)
    assert quota_of(root) == 2.0


def test_both_versions_at_once_as_systemd_mounts_them(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "unified/box/cgroup.procs": "",
    }
    mounts = V1.format(root="/") + V2.format(root="/").replace(
        "/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw"
    )
    groups = "4:cpu,cpuacct:/box\n0::/box\n"
    root = tree(tmp_path, cgroup=groups, mounts=mounts, files=files)
    assert quota_of(root) == 2.0


def test_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota_of(tmp_path) is None


def test_threads_are_whole_ones_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(sys, "platform", "linux")
    for quota, count in ((None, 8), (16.0, 8), (3.9, 3), (0.5, 1)):
        monkeypatch.setattr("d2f_runtime.cpus.quota_of", lambda _, quota=quota: quota)
        assert num_cpus() == count


def test_torch_takes_no_more_threads_than_there_are_cpus() -> None:
    pytest.importorskip("torch")
    code = (
        "import torch, d2f_runtime.cpus as cpus; torch.set_num_threads(7); "
        "cpus.num_cpus = lambda: 3; cpus.bound_torch_threads(); print(torch.get_num_threads()); "
        "torch.set_num_threads(2); cpus.bound_torch_threads(); print(torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "2"]
