"""Runs jobs as processes of their own, one after the other, each with a time limit.

A job's folder has ``outcome.json`` once it has been measured; one without it is run again from the
start by the next call. A job that fails or takes too long leaves ``failure.json`` and does not stop
the others.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepspeed.launcher.runner import fetch_hostfile

from addax_ds.utils.errors import UserError
from studies.jobs import LOG, Launcher, environment, free_port, read_json, script, write_json
from studies.scaling.measure import MEASURED

logger = logging.getLogger(__name__)

OUTCOME, FAILURE = "outcome.json", "failure.json"
_JOB = "point.json"
_GRACE_S = 10.0
_LAST_LINES = 8


@dataclass(frozen=True)
class Hosts:
    """Machines that the ranks run on.

    Attributes:
        hostfile: DeepSpeed's; None for this machine.
        ranks_per_node: on each of its hosts.
    """

    hostfile: Path | None = None
    ranks_per_node: int = 8

    def placement(self, ranks: int) -> dict[str, int]:
        """Return how many of so many ranks each host has; nothing for this machine.

        Raises:
            UserError: for a hostfile that cannot be read or has too few hosts, or if the ranks do
                not fill nodes.
        """
        if self.hostfile is None:
            return {}
        names = _names(self.hostfile)
        nodes = -(-ranks // self.ranks_per_node)
        if ranks % nodes:
            raise UserError(
                f"--ranks {ranks}: on nodes of {self.ranks_per_node} ranks (--ranks_per_node) that "
                f"is {nodes} nodes with different numbers of ranks"
            )
        if nodes > len(names):
            raise UserError(
                f"--ranks {ranks}: on nodes of {self.ranks_per_node} ranks (--ranks_per_node) that "
                f"is {nodes} nodes, and {self.hostfile} names {len(names)}"
            )
        return dict.fromkeys(names[:nodes], ranks // nodes)

    def launcher_flags(self, ranks: int) -> list[str]:
        """Return the flags of ``deepspeed`` for a number of ranks.

        Raises:
            UserError: see `placement`.
        """
        placement = self.placement(ranks)
        if not placement:
            return ["--num_gpus", str(ranks)]
        nodes = len(placement)
        flags = ["--hostfile", str(self.hostfile), "--num_nodes", str(nodes)]
        # Without --force_multi a single host would be this machine, whatever its name is.
        return [*flags, "--num_gpus", str(ranks // nodes), "--force_multi"]


def _names(hostfile: Path) -> list[str]:
    """Return the hosts of a hostfile, as DeepSpeed reads it.

    Raises:
        UserError: if it cannot be read. DeepSpeed would take this machine instead of a file that is
            not there.
    """
    if not hostfile.is_file():
        raise UserError(f"--hostfile {hostfile}: there is no such file")
    try:
        return list(fetch_hostfile(str(hostfile)))
    except (OSError, ValueError) as error:
        raise UserError(f"--hostfile {hostfile}: {error}") from error


@dataclass(frozen=True)
class Job:
    """One launch.

    Attributes:
        module: what each rank runs, with the folder as its argument.
        ranks: how many there are.
        folder: where its files go.
        content: what ``point.json`` says of it; a folder with another content is not reused.
    """

    module: str
    ranks: int
    folder: Path
    content: dict[str, Any]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """Outcome of the point, or None if it has not been measured."""
        return read_json(self.folder / OUTCOME)

    @property
    def failure(self) -> dict[str, Any] | None:
        """Reason why it has not been measured, if it was tried."""
        return None if self.outcome else read_json(self.folder / FAILURE)

    def check(self) -> None:
        """Check that what was measured in the folder is the same job.

        Raises:
            UserError: if it is another one.
        """
        if self.outcome is None:
            return
        changed = _differences(read_json(self.folder / _JOB) or {}, self.content)
        if changed:
            raise UserError(
                f"{self.folder} holds a measurement with other settings ({'; '.join(changed)}): "
                "give another --folder, or remove that one"
            )


def _differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Return what differs between two contents of ``point.json``, by dotted name."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        there, here = before.get(name), now.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found += _differences(there, here, f"{within}{name}.")
        elif there != here:
            found.append(f"{within}{name} {there} there, {here} here")
    return found


def run(jobs: Sequence[Job], hosts: Hosts, time_limit: float) -> list[Job]:
    """Run the jobs that have not been measured, and return those that failed.

    Args:
        jobs: in their order.
        hosts: where.
        time_limit: seconds for each.

    Raises:
        UserError: before anything is started; see `Job.check` and `Hosts.launcher_flags`.
    """
    for job in jobs:
        job.check()
        hosts.launcher_flags(job.ranks)
    missing = [job for job in jobs if job.outcome is None]

    def begin(job: Job, command: list[str]) -> None:
        logger.info("%d of %d: %s", missing.index(job) + 1, len(missing), job.folder)
        write_json(job.folder / _JOB, job.content)

    launcher = Launcher(
        command=lambda job: _command(job, hosts),
        begin=begin,
        finish=partial(_finish, time_limit),
        environment=environment(),
        limit=time_limit,
        grace=_GRACE_S,
    )
    return launcher.run(lambda: missing)


def _finish(limit: float, job: Job, command: list[str], status: int | None, seconds: float) -> bool:
    """Write what was measured, or why it was not."""
    measured = read_json(job.folder / MEASURED)
    shutil.rmtree(job.folder / "trainer", ignore_errors=True)
    record = {"command": command, "job_seconds": round(seconds, 1)}
    if status == 0 and measured is not None:
        write_json(job.folder / OUTCOME, {**record, **measured})
        (job.folder / MEASURED).unlink()
        return True
    reason = f"took more than {limit:g} s" if status is None else f"exit status {status}"
    write_json(job.folder / FAILURE, {**record, "reason": reason})
    lines = (job.folder / LOG).read_text(errors="replace").splitlines()[-_LAST_LINES:]
    logger.warning("%s: %s\n%s", job.folder, reason, "\n".join(lines))
    return False


def _command(job: Job, hosts: Hosts) -> list[str]:
    port = str(free_port())
    flags = [*hosts.launcher_flags(job.ranks), "--master_port", port, "--no_local_rank"]
    return [script("deepspeed"), *flags, "--module", job.module, str(job.folder.resolve())]
