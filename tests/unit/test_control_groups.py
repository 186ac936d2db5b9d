"""Limits of control groups, read from fake trees of both versions; the engine keeps to a CPU quota."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime import machine, opening
from runtime.control_groups import memory_limits, processor_quotas

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_version_2(tmp_path: Path) -> None:
    """The process's own group is unlimited, the one above it is not; the root group has no such files."""
    group = "sys/fs/cgroup/user.slice"
    files = {"proc/self/cgroup": "0::/user.slice/run\n", f"{group}/run/cpu.max": "max 100000\n"}
    files |= {
        f"{group}/run/memory.max": "max\n",
        f"{group}/memory.max": f"{GB}\n",
        f"{group}/cpu.max": "150000 100000\n",
    }
    root = write(tmp_path, files)
    assert memory_limits(root) == [("/user.slice", GB)]
    assert processor_quotas(root) == [("/user.slice", 1.5)]


def test_version_1_in_a_container(tmp_path: Path) -> None:
    """The host's path of the group means nothing inside: its limits are those of the root that is seen."""
    files = {"proc/self/cgroup": "4:cpu,cpuacct:/docker/ab\n3:memory:/docker/ab\n1:name=systemd:/docker/ab\n"}
    files |= {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = f"{2 * GB}\n"
    root = write(tmp_path, files)
    assert memory_limits(root) == [("/", 2 * GB)]
    assert processor_quotas(root) == [("/", 2.0)]


def test_version_1_without_limits(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:cpu:/\n3:memory:/\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}
    files |= {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    root = write(tmp_path, files)
    assert (memory_limits(root), processor_quotas(root)) == ([], [])


@pytest.mark.parametrize(("quota", "usable"), [(0.5, 1), (1.9, 1), (64.0, None)])
def test_cores_under_a_quota(monkeypatch: pytest.MonkeyPatch, quota: float, usable: int | None) -> None:
    bound, cores = machine.core_counts()
    monkeypatch.setattr(machine, "processor_quotas", lambda: [("/a", quota), ("/", 99.0)])
    assert machine.core_counts() == (usable or bound, cores)


def test_threads_keep_to_the_quota_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before, notes = torch.get_num_threads(), []  # type: ignore[var-annotated]
    monkeypatch.setattr(opening, "core_counts", lambda: (1, 64))
    try:
        torch.set_num_threads(2)
        assert opening._set_threads(None, notes) == torch.get_num_threads() == 1
        assert notes == ["arithmetic: 1 of 2 threads: no more cores may be kept busy (quota, taskset)"]
        assert opening._set_threads(3, notes) == torch.get_num_threads() == 3
        assert len(notes) == 1
    finally:
        torch.set_num_threads(before)
