"""Jobs: launches of training as processes of their own, that go on where they were interrupted.

A job has a folder with ``output.log``. It is over once its outcome can be read from there; one that
is not is run again from the start.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil

from addax_ds.utils.files import appearing

LOG = "output.log"
_ROOT = Path(__file__).parents[1]
_POLL_S = 0.2


class Job(Protocol):
    """One process.

    Attributes:
        folder: where its files go.
        outcome: what it came to, or None if it is not over.
    """

    @property
    def folder(self) -> Path: ...  # noqa: D102

    @property
    def outcome(self) -> Any: ...  # noqa: D102


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Launcher(Generic[J]):
    """Starts jobs of one kind, and makes of a process that has ended an outcome.

    Attributes:
        command: of a job.
        begin: writes beside the log what tells the job apart, before its process starts.
        finish: gets the job, its command, its exit status (None if it took too long) and its
            seconds; writes the outcome, or returns False if there is none.
        environment: of the processes.
        cwd: where they run.
        limit: seconds that a job may take.
        grace: seconds that a process has to end its ranks.
    """

    command: Callable[[J], list[str]]
    begin: Callable[[J, list[str]], None]
    finish: Callable[[J, list[str], int | None, float], bool]
    environment: dict[str, str]
    cwd: Path | None = None
    limit: float = float("inf")
    grace: float = 10.0

    def run(self, next_jobs: Callable[[], Iterable[J]], workers: int = 1) -> list[J]:
        """Run jobs until none is left; an exception ends those that run.

        Args:
            next_jobs: what to run, in order, finished jobs included; asked again after each one.
            workers: processes at a time.

        Returns:
            The jobs that failed, each of which was tried once.
        """
        running: list[_Running[J]] = []
        failed: list[J] = []
        try:
            while True:
                while len(running) < workers:
                    taken = {job.folder for job in (*failed, *(entry.job for entry in running))}
                    due = (j for j in next_jobs() if j.folder not in taken and j.outcome is None)
                    if (job := next(due, None)) is None:
                        break
                    running.append(self._start(job))
                if not running:
                    return failed
                while not any(entry.is_over(self.limit) for entry in running):
                    time.sleep(_POLL_S)
                for entry in [entry for entry in running if entry.is_over(self.limit)]:
                    status, seconds = entry.process.poll(), entry.seconds
                    end(entry.process, self.grace)
                    running.remove(entry)
                    if not self.finish(entry.job, entry.command, status, seconds):
                        failed.append(entry.job)
        finally:
            for entry in running:
                end(entry.process, self.grace)

    def _start(self, job: J) -> "_Running[J]":
        if job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.mkdir(parents=True)
        command = self.command(job)
        self.begin(job, command)
        with (job.folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.cwd, env=self.environment
            )
        return _Running(job, command, process)


@dataclass(frozen=True)
class _Running(Generic[J]):
    job: J
    command: list[str]
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def is_over(self, limit: float) -> bool:
        return self.process.poll() is not None or self.seconds > limit


def script(name: str) -> str:
    """Return the path of a program of a package, ``deepspeed`` say: beside Python, or on PATH.

    Packages that were installed into a folder of their own have theirs elsewhere.
    """
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or str(beside)


def environment() -> dict[str, str]:
    """Return the environment of processes that import this checkout and start programs.

    PYTHONPATH begins with the checkout; PATH with the programs beside this Python. DeepSpeed's
    launcher hands variables of these names on to other nodes.
    """
    modules = f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".removesuffix(os.pathsep)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"OMP_NUM_THREADS": "1", **os.environ, "PATH": programs, "PYTHONPATH": modules}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a launcher that still runs, and the ranks that it may leave behind.

    Args:
        process: is sent SIGTERM, for which it ends its ranks, on other nodes too.
        grace: seconds that it has for it.
    """
    if process.poll() is not None:
        return
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for rank in ranks:
        if rank.is_running():
            rank.kill()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that appears when it is complete."""
    with appearing(path) as file:
        file.write(f"{json.dumps(content, indent=1)}\n".encode())
