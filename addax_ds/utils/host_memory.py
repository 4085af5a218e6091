"""How much host memory is left: of the machine, and of the control group that limits a process."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from addax_ds.utils.errors import UserError

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def available() -> int:
    """Return the bytes of host memory that the processes of this machine may still take.

    A container or a job of Slurm may have a limit below that of the machine, at which its processes
    are killed: that of its control group or of a group around it, in either version of the
    interface. Cached files count as free, as the kernel drops them first.

    Raises:
        UserError: the machine does not say.
    """
    try:
        entries = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        of_machine = int(entries["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"how much memory is free cannot be read from {_MEMINFO}") from error
    return max(min([of_machine, *_of_groups()]), 0)


def _of_groups() -> Iterator[int]:
    """Yield what each group with a limit has left that this process is in."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, of_all = _MOUNT, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, usage = _MOUNT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            of_all = "total_"
        else:
            continue
        # Seen from inside a container the root may be its own group, and the path lead nowhere.
        own = PurePosixPath(path.lstrip("/"))
        for folder in {root, *(root / group for group in (own, *own.parents))}:
            try:
                room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
                cached = (int(stat[f"{of_all}{kind}_file"]) for kind in ("active", "inactive"))
                yield room + sum(cached)
            except (OSError, ValueError, KeyError):  # no such group, or one without a limit
                continue
