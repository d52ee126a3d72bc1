"""Limits of memory: those of the groups above a process, as the kernel shows them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.machine import control_group
from edgetune.machine.control_group import left_bytes
from edgetune.machine.threads import usable_processors
from support.mounts import needs_mounts
from support.repository import ROOT
from support.shared_material import shared_material

MB = 10**6
ASK = "from edgetune.machine.memory import free_memory_bytes; print(free_memory_bytes())"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of groups, in whose root this process is."""
    root = tmp_path / "groups"
    root.mkdir()
    monkeypatch.setattr(control_group, "_GROUPS", root)
    name_groups(monkeypatch, tmp_path, "0::/\n")
    return root


def name_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "named").write_text(text)
    monkeypatch.setattr(control_group, "_OF_THIS_PROCESS", folder / "named")


def v2(group: Path, limit: str, taken: int, high: str | None = None, stat: str = "") -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{taken}\n")
    (group / "memory.stat").write_text(stat)
    if high is not None:
        (group / "memory.high").write_text(f"{high}\n")


def v1(group: Path, limit: int, taken: int, stat: str = "") -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (group / "memory.usage_in_bytes").write_text(f"{taken}\n")
    (group / "memory.stat").write_text(stat)


def test_no_groups_are_no_limit(groups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert left_bytes() is None
    v2(groups, "max", 5 * MB)
    assert left_bytes() is None
    monkeypatch.setattr(control_group, "_OF_THIS_PROCESS", tmp_path / "not there")
    assert left_bytes() is None


def test_the_tightest_group_on_the_way_up_counts(groups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name_groups(monkeypatch, tmp_path, "0::/system.slice/learn.service\n")
    v2(groups / "system.slice" / "learn.service", "300000000", 100 * MB)
    v2(groups / "system.slice", "max", 900 * MB)
    assert left_bytes() == 200 * MB
    v2(groups / "system.slice", "1000000000", 900 * MB)
    assert left_bytes() == 100 * MB
    v2(groups / "system.slice" / "other.service", "1000", 0)
    assert left_bytes() == 100 * MB
    v2(groups, "950000000", 900 * MB)
    assert left_bytes() == 50 * MB


def test_where_a_group_is_slowed_down_is_a_limit(groups: Path) -> None:
    v2(groups, "300000000", 100 * MB, high="250000000")
    assert left_bytes() == 150 * MB
    v2(groups, "max", 100 * MB, high="250000000")
    assert left_bytes() == 150 * MB
    v2(groups, "300000000", 400 * MB, high="max")
    assert left_bytes() == 0


def test_file_pages_that_nobody_uses_are_free(groups: Path) -> None:
    v2(groups, "300000000", 299 * MB, stat="anon 20000000\ninactive_file 200000000\nactive_file 10000000\n")
    assert left_bytes() == 201 * MB
    v2(groups, "300000000", 100 * MB, stat="inactive_file 200000000\n")
    assert left_bytes() == 300 * MB
    for broken in ("inactive_file\n", "inactive_file x\n", "inactive_file -5\n", "\n\n"):
        v2(groups, "300000000", 100 * MB, stat=broken)
        assert left_bytes() == 200 * MB


def test_the_first_version_has_a_tree_of_its_own(groups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = ("7:cpu,cpuacct:/elsewhere", "4:hugetlb,memory:/docker/abc", "1:name=systemd:/", "0::/unified")
    name_groups(monkeypatch, tmp_path, "\n".join(lines))
    v1(groups / "memory", 2**63 - 4096, 9000 * MB)
    v1(groups / "memory" / "elsewhere", 1000, 0)
    assert (left_bytes() or 0) > 2**62
    stat = "inactive_file 1000000\ntotal_inactive_file 40000000\n"
    v1(groups / "memory" / "docker" / "abc", 300 * MB, 100 * MB, stat)
    assert left_bytes() == 240 * MB
    # Both at once, as systemd has them on older systems.
    v2(groups / "unified", "200000000", 150 * MB)
    assert left_bytes() == 50 * MB


@pytest.mark.parametrize("named", ["/../../job", "/docker/abc", "", "/../.."])
def test_a_name_that_leads_nowhere_leaves_the_root(
    groups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str
) -> None:
    name_groups(monkeypatch, tmp_path, f"0::{named}\n4:memory:{named}\n")
    v2(groups, "300000000", 100 * MB)
    v2(groups.parent / "job", "1000", 0)
    v1(groups / "memory", 250 * MB, 100 * MB)
    assert left_bytes() == 150 * MB


@needs_mounts
@pytest.mark.parametrize(("kind", "left"), [("v2root", 209_715_200), ("v1", 209_715_200), ("v2full", 281_000_000)])
def test_what_the_kernel_shows(tmp_path: Path, kind: str, left: int) -> None:
    script = shared_material() / "cases" / "fakecg.sh"
    assert ask(tmp_path, ["unshare", "-m", "bash", str(script), kind, sys.executable, "-c", ASK]) == left


@needs_mounts
def test_what_the_kernel_shows_of_a_service(tmp_path: Path) -> None:
    script = """
    service=/sys/fs/cgroup/system.slice/learn.service
    mount -t tmpfs none /sys/fs/cgroup
    mkdir -p $service
    echo max > /sys/fs/cgroup/system.slice/memory.max
    echo 314572800 > $service/memory.max
    echo 104857600 > $service/memory.current
    echo 0::/system.slice/learn.service > named
    mount --bind named /proc/$$/cgroup  # that of the shell, which becomes Python
    exec "$@"
    """
    assert ask(tmp_path, ["unshare", "-m", "bash", "-c", script, "bash", sys.executable, "-c", ASK]) == 209_715_200


def ask(folder: Path, command: list[str]) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    ("named", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/a/service\n", {"a/cpu.max": "300000 100000", "a/service/cpu.max": "max 100000"}, 3),
        ("0::/what/the/host/sees\n", {"cpu.max": "400000 100000"}, 4),
        ("5:cpu,cpuacct:/b\n0::/\n", {"cpu/b/cpu.cfs_quota_us": "250000", "cpu/b/cpu.cfs_period_us": "50000"}, 5),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("5:cpu:/\n", {"cpu/cpu.cfs_quota_us": "?", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("", {}, 8),
    ],
)
def test_what_the_groups_grant_of_the_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        path = tmp_path / "trees" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(control_group, "_GROUPS", tmp_path / "trees")
    name_groups(monkeypatch, tmp_path, named)
    assert usable_processors() == expected
