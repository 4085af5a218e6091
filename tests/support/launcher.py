"""Runs the real launchers with a time limit and sees to it that nothing outlives them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from tests.support.ranks import ROOT, ended, free_port, require_permission

_MARK = "ADDAX_TEST_LAUNCH"


@dataclass(frozen=True)
class Outcome:
    """``status`` is None if the time was up."""

    status: int | None
    output: str
    left_behind: int


LAUNCHERS = {
    "deepspeed": ("--num_gpus={ranks}", "--master_port={port}"),
    "torchrun": ("--nproc_per_node={ranks}", "--master_port={port}"),
    "accelerate": (
        *("launch", "--config_file=launch/accelerate.yaml"),
        *("--num_processes={ranks}", "--main_process_port={port}"),
    ),
}


@dataclass(frozen=True)
class Started:
    """A program that runs; whatever it starts in turn carries its mark."""

    process: subprocess.Popen[str]
    mark: str
    port: int

    def running(self) -> list[psutil.Process]:
        """Return what of it is alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                is_marked = process.environ().get(_MARK) == self.mark
                if is_marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """End what is left of it."""
        for survivor in self.running():
            survivor.kill()


def start(
    command: list[str],
    port: int,
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
    output: int | TextIO = subprocess.PIPE,
) -> Started:
    """Start a program of this environment, as on a machine without a GPU.

    Args:
        command: the program, by name, and its arguments.
        port: on which its ranks meet.
        environment: variables that it gets beside this process's own.
        folder: in which it runs.
        output: file that it writes to; else a pipe, which `finish` reads.
    """
    require_permission()
    mark = uuid.uuid4().hex
    programs = Path(sys.executable).parent
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={
            **inherited,
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # DeepSpeed imports an optimizer that is compiled, and all that compiles it.
            "TORCHDYNAMO_DISABLE": "1",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            **(environment or {}),
            _MARK: mark,
        },
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Started(process, mark, port)


def start_ranks(launcher: str, words: Sequence[str], ranks: int = 2, **options: Any) -> Started:
    """Start a script and its flags on ranks of this machine; for the options see `start`."""
    port = free_port()
    flags = [flag.format(ranks=ranks, port=port) for flag in LAUNCHERS[launcher]]
    return start([launcher, *flags, *words], port, **options)


def finish(started: Started, timeout: float = 300.0) -> Outcome:
    """Wait for a program, and end what is left of it."""
    process = started.process
    status: int | None
    try:
        output, _ = process.communicate(timeout=timeout)
        status = process.returncode
        time.sleep(0.5)  # a rank that was told to end may still be ending
        left_behind = len(started.running())
    except subprocess.TimeoutExpired:
        status, left_behind = None, len(started.running())
    finally:
        started.end()
    if status is None:
        output, _ = process.communicate()
    return Outcome(status, output, left_behind)


def launch(
    script: str,
    *flags: str,
    ranks: int = 2,
    timeout: float = 300.0,
    launcher: str = "deepspeed",
    nodes: int = 1,
) -> Outcome:
    """Run ``<launcher> ... <script> <flags>`` as on a machine without a GPU.

    The launcher "fork" is none: ranks with a launcher's variables, which import nothing anew and
    have to end by themselves. It serves where the program matters and not what has started it.
    """
    if launcher == "fork":
        return _fork(script.removesuffix(".py").replace("/", "."), flags, ranks, timeout, nodes)
    assert nodes == 1
    return finish(start_ranks(launcher, [script, *flags], ranks), timeout)


def _fork(module: str, flags: tuple[str, ...], ranks: int, timeout: float, nodes: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        codes, output = ended(module, ranks, Path(folder), *flags, timeout=timeout, nodes=nodes)
    killed = codes.count(-signal.SIGKILL)
    failed = [code for code in codes if code not in (0, -signal.SIGKILL)]
    status = failed[0] if failed else None if killed else 0
    return Outcome(status, "".join(output), killed)
