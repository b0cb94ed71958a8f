"""Free cores: the affinity mask, quotas of both versions of control groups, and what others compute."""

import os
from pathlib import Path

import pytest

from longforge.server.cores import Cores, busy_cores, free_cores, quota_cores


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("400000 100000\n", 4.0)]
)
def test_quota_of_version_2(tmp_path: Path, text: str, cores: float | None):
    write(tmp_path / "app", cpu__max=text)
    assert quota_cores(tmp_path, "0::/app\n") == cores


def test_the_tightest_quota_of_a_group_and_its_parents_counts(tmp_path: Path):
    write(tmp_path, cpu__max="800000 100000")
    write(tmp_path / "pod", cpu__max="200000 100000")
    write(tmp_path / "pod" / "app", cpu__max="max 100000")
    assert quota_cores(tmp_path, "0::/pod/app\n") == 2.0


def test_a_container_that_sees_only_its_own_group_finds_the_quota_at_the_root(tmp_path: Path):
    write(tmp_path, cpu__max="300000 100000")
    assert quota_cores(tmp_path, "0::/../../hidden\n") == 3.0


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_quota_of_version_1(tmp_path: Path, mount: str):
    write(tmp_path / mount / "docker", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert quota_cores(tmp_path, "3:memory:/docker\n4:cpu,cpuacct:/docker\n") == 2.5


def test_version_1_without_a_limit_is_none(tmp_path: Path):
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert quota_cores(tmp_path, "4:cpu:/\n") is None


def test_no_control_groups_are_no_limit(tmp_path: Path):
    assert quota_cores(tmp_path, "") is None
    assert quota_cores(tmp_path, "0::/gone\n1:name=systemd:/x\n") is None


def test_busy_cores_from_two_looks_at_the_ticks():
    before = "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3\n"
    after = "cpu  150 0 125 815 10 0 0 0 99 0\ncpu0 1 2 3\n"
    assert busy_cores(before, after) == pytest.approx(0.75)  # 75 of 100 ticks; waiting for a disk is idle
    assert busy_cores(before, before) == 0.0
    assert busy_cores("", "") == 0.0


@pytest.mark.parametrize(
    ("cores", "free"),
    [
        (Cores(machine=8, allowed=8, quota=None, busy=0.0), 8),
        (Cores(machine=8, allowed=2, quota=None, busy=0.0), 2),
        (Cores(machine=8, allowed=8, quota=3.7, busy=0.0), 3),
        (Cores(machine=8, allowed=8, quota=0.5, busy=0.0), 1),
        (Cores(machine=8, allowed=8, quota=None, busy=2.6), 5),
        (Cores(machine=8, allowed=8, quota=None, busy=0.3), 8),
        (Cores(machine=2, allowed=2, quota=None, busy=2.0), 1),
    ],
)
def test_the_tightest_limit_decides_and_one_core_is_always_used(cores: Cores, free: int):
    assert cores.free == free
    assert cores.why.startswith(f"{free} of {cores.machine} cores")


def test_the_reasons_are_told():
    cores = Cores(machine=8, allowed=4, quota=2.5, busy=3.0)
    assert cores.why == "2 of 8 cores (this process may use 4, its quota is 2.5, 3.0 are busy)"
    assert Cores(machine=4, allowed=4, quota=None, busy=0.1).why == "4 of 4 cores, all free"


def test_this_machine_is_read_from_the_given_folders(tmp_path: Path):
    write(tmp_path / "proc" / "self", cgroup="0::/app\n")
    write(tmp_path / "proc", stat="cpu  1 0 0 9\n")
    write(tmp_path / "cgroups" / "app", cpu__max="100000 100000")
    cores = free_cores(tmp_path / "cgroups", tmp_path / "proc", look_seconds=0.0)
    assert (cores.quota, cores.busy, cores.free) == (1.0, 0.0, 1)
    assert cores.machine == os.cpu_count()


def test_a_machine_without_such_files_has_only_its_mask(tmp_path: Path):
    cores = free_cores(tmp_path, tmp_path, look_seconds=0.0)
    assert cores.free == cores.allowed >= 1
