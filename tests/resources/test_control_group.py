"""Limits of control groups, from trees of files as the kernel lays them out (cgroups(7), proc(5))."""

from __future__ import annotations

from pathlib import Path

import pytest

from wancli.resources import control_group, machine

MIB = 2**20
NO_LIMIT = 9223372036854771712  # LONG_MAX, rounded down to pages
MOUNT_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
MOUNT_V1 = "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw shared:18 - cgroup cgroup rw,memory"


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def group_v2(path: str, limit: object, used: int, files: int = 0, high: object = "max") -> dict[str, object]:
    folder = f"sys/fs/cgroup/{path}"
    stat = f"anon {used - files}\nfile {files}\ninactive_file {files // 2}\nactive_file {files - files // 2}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": stat,
    }


def group_v1(path: str, limit: int, used: int, files: int = 0, above: int = NO_LIMIT) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{path}"
    smallest = min(limit, above)
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.use_hierarchy": 1,
        f"{folder}/memory.stat": f"hierarchical_memory_limit {smallest}\ntotal_inactive_file {files}",
    }


def v2(root: Path, group: str, *groups: dict[str, object], mount: str = MOUNT_V2) -> Path:
    write(root, {"proc/self/cgroup": f"0::{group}", "proc/self/mountinfo": mount})
    for files in groups:
        write(root, files)
    return root


def v1(root: Path, group: str, *groups: dict[str, object], mounted: str = "/") -> Path:
    cgroup = f"9:name=systemd:{group}\n4:memory:{group}\n1:cpu,cpuacct:/\n0::/"
    mounts = (
        f"{MOUNT_V1.format(mounted=mounted)}\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    )
    write(root, {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts})
    for files in groups:
        write(root, files)
    return root


def test_a_container_sees_its_group_as_the_root_of_version_2(tmp_path: Path):
    v2(tmp_path, "/", group_v2("", 1000 * MIB, 900 * MIB, files=700 * MIB))
    assert control_group.read_free_memory(tmp_path) == 800 * MIB


def test_the_smallest_limit_of_a_slurm_job_is_found_above_the_group_of_its_task(tmp_path: Path):
    job = "system.slice/slurmstepd.scope/job_42"
    v2(
        tmp_path,
        f"/{job}/step_batch/user/task_0",
        group_v2(f"{job}/step_batch/user/task_0", "max", 20 * MIB),
        group_v2(f"{job}/step_batch/user", "max", 20 * MIB),
        group_v2(f"{job}/step_batch", 800 * MIB, 30 * MIB),
        group_v2(job, 420 * MIB, 120 * MIB, files=50 * MIB),
        group_v2("system.slice", "max", 900 * MIB),
    )
    assert control_group.read_free_memory(tmp_path) == 350 * MIB


def test_memory_high_limits_too_because_a_group_above_it_is_slowed_to_a_crawl(tmp_path: Path):
    v2(tmp_path, "/user.slice/x", group_v2("user.slice/x", 900 * MIB, 100 * MIB, high=300 * MIB))
    assert control_group.read_free_memory(tmp_path) == 200 * MIB


def test_no_group_limits_where_all_say_max_or_have_no_memory_controller(tmp_path: Path):
    v2(tmp_path, "/user.slice/a b", group_v2("user.slice/a b", "max", 20 * MIB))
    assert control_group.read_free_memory(tmp_path) is None
    assert control_group.read_free_memory(tmp_path / "nowhere") is None


def test_version_1_of_a_batch_system_is_read_up_to_the_root(tmp_path: Path):
    v1(
        tmp_path,
        "/slurm/uid_1/job_42/step_0",
        group_v1("slurm/uid_1/job_42/step_0", NO_LIMIT, 10 * MIB, above=500 * MIB),
        group_v1("slurm/uid_1/job_42", 500 * MIB, 200 * MIB, files=100 * MIB),
        group_v1("slurm/uid_1", NO_LIMIT, 200 * MIB),
        group_v1("slurm", NO_LIMIT, 300 * MIB),
        group_v1("", NO_LIMIT, 4000 * MIB),
    )
    assert control_group.read_free_memory(tmp_path) == 400 * MIB


def test_a_container_of_version_1_is_mounted_under_the_name_that_its_host_knows(tmp_path: Path):
    v1(tmp_path, "/docker/4f2a", group_v1("", 300 * MIB, 100 * MIB), mounted="/docker/4f2a")
    assert control_group.read_free_memory(tmp_path) == 200 * MIB


def test_a_limit_above_the_mounted_part_of_version_1_is_in_the_statistics(tmp_path: Path):
    v1(tmp_path, "/pod/4f2a", group_v1("", NO_LIMIT, 100 * MIB, above=300 * MIB), mounted="/pod/4f2a")
    assert control_group.read_free_memory(tmp_path) == 200 * MIB


def test_without_hierarchy_the_groups_above_limit_nothing(tmp_path: Path):
    v1(
        tmp_path,
        "/batch/job",
        group_v1("batch/job", 500 * MIB, 100 * MIB),
        group_v1("batch", 50 * MIB, 0),
        {"sys/fs/cgroup/memory/batch/memory.use_hierarchy": 0},
    )
    assert control_group.read_free_memory(tmp_path) == 400 * MIB


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path):
    v2(tmp_path, "/", group_v2("", 100 * MIB, 120 * MIB))
    assert control_group.read_free_memory(tmp_path) == 0


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("150000 100000", "max 100000", 1.5),
        ("max 100000", "40000 100000", 0.4),
    ],
)
def test_the_smallest_cpu_quota_of_version_2_counts(
    tmp_path: Path, own: str, above: str, quota: float | None
):
    v2(tmp_path, "/kubepods/pod1")
    for folder, limit in (("kubepods/pod1", own), ("kubepods", above)):
        write(tmp_path, {f"sys/fs/cgroup/{folder}/cpu.max": f"{limit}"})
    assert control_group.read_cpu_quota(tmp_path) == quota


def test_a_cpu_quota_of_version_1_is_read_beside_other_controllers(tmp_path: Path):
    mount = r"32 31 0:29 /docker/4f2a /sys/fs/cgroup/cpu\040x rw - cgroup cgroup rw,cpu,cpuacct"
    write(tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/docker/4f2a", "proc/self/mountinfo": mount})
    folder = "sys/fs/cgroup/cpu x"
    write(tmp_path, {f"{folder}/cpu.cfs_quota_us": -1, f"{folder}/cpu.cfs_period_us": 100000})
    assert control_group.read_cpu_quota(tmp_path) is None
    write(tmp_path, {f"{folder}/cpu.cfs_quota_us": 250000})
    assert control_group.read_cpu_quota(tmp_path) == 2.5


def test_the_free_memory_is_that_of_the_group_if_it_has_less_than_the_machine(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(control_group, "read_free_memory", lambda: None)
    of_machine = machine.available_memory()
    assert of_machine > 0
    monkeypatch.setattr(control_group, "read_free_memory", lambda: 8 * MIB)
    assert machine.available_memory() == 8 * MIB


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.4, 1), (1.0, 1), (2.5, 3), (64.0, 4)])
def test_a_quota_rounds_up_to_whole_cores_and_never_adds_any(
    quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(control_group, "read_cpu_quota", lambda: quota)
    assert machine.usable_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert machine.device_name("cpu").endswith(f", {cores} core{'s' * (cores > 1)}")
