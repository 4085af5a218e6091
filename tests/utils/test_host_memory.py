"""What is left of host memory, by files as the kernel writes them."""

from pathlib import Path

import pytest

from addax_ds.utils import host_memory
from addax_ds.utils.errors import UserError

MACHINE = 64 * 2**30
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with 64 GiB available and no groups."""
    for name, file in {"_MEMINFO": "meminfo", "_GROUPS": "cgroup", "_MOUNT": "mount"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / file)
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {MACHINE // 1024} kB\n")
    return tmp_path


def group(folder: Path, limit: object, usage: int, cached: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    total = {1: "total_", 2: ""}[version]
    kinds = f"{total}active_file {cached // 2}\n{total}inactive_file {cached - cached // 2}\n"
    (folder / "memory.stat").write_text(f"anon 5\n{kinds}")


def test_a_machine_without_groups_has_what_it_says(machine):
    assert host_memory.available() == MACHINE


def test_a_job_has_what_its_group_or_one_around_it_allows(machine):
    (machine / "cgroup").write_text("0::/slurm/job_7/step_0\n")
    job = machine / "mount" / "slurm" / "job_7"
    group(job / "step_0", "max", 5 * 2**30, 2**30)
    assert host_memory.available() == MACHINE
    group(job, 16 * 2**30, 6 * 2**30, 2**30)
    assert host_memory.available() == 11 * 2**30
    group(job / "step_0", 8 * 2**30, 6 * 2**30, 2**30)
    assert host_memory.available() == 3 * 2**30
    group(job / "step_0", 8 * 2**30, 9 * 2**30, 0)
    assert host_memory.available() == 0


def test_in_a_container_the_root_is_its_group(machine):
    (machine / "cgroup").write_text("9:cpuset:/docker/1f\n4:memory:/docker/1f\n0::/\n")
    group(machine / "mount" / "memory", UNLIMITED_V1, 2**30, 0, version=1)
    assert host_memory.available() == MACHINE
    group(machine / "mount" / "memory", 10 * 2**30, 4 * 2**30, 2**30, version=1)
    assert host_memory.available() == 7 * 2**30


def test_a_machine_that_does_not_say(machine):
    (machine / "meminfo").write_text("")
    with pytest.raises(UserError, match="how much memory is free cannot be read from"):
        host_memory.available()
