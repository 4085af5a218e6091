"""Runs a worker module on several ranks of this machine, with a time limit."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRACE_SECONDS = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    worker: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout: float = 240.0,
    accelerator: str = "cpu",
) -> str:
    """Run ``tests.workers.<worker> <folder> <arguments>`` on each rank; see `run_module`."""
    module, words = f"tests.workers.{worker}", (str(folder), *arguments)
    return run_module(module, world_size, folder, *words, timeout=timeout, accelerator=accelerator)


def run_module(
    module: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout: float = 240.0,
    accelerator: str = "cpu",
) -> str:
    """Run ``python -m <module> <arguments>`` on each rank, with logs in ``folder``.

    Returns rank 0's output. Fails with the output of all ranks if one exits with a non-zero status
    or the time is up; no process is left behind.
    """
    logs = [folder / f"rank{rank}-of-{world_size}.log" for rank in range(world_size)]
    environment = rank_environment(world_size, accelerator)
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", module, *arguments]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    _wait(processes, timeout)
    output = [log.read_text() for log in logs]
    codes = [process.returncode for process in processes]
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(output)
    return output[0]


def rank_environment(world_size: int, accelerator: str = "cpu") -> dict[str, str]:
    # Without LOCAL_SIZE, as DeepSpeed would keep 69 MB of shared memory a rank, for each port.
    return {
        **{name: value for name, value in os.environ.items() if name != "LOCAL_SIZE"},
        "DS_ACCELERATOR": accelerator,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def _wait(processes: list[subprocess.Popen], timeout: float) -> None:
    """Wait for all; once one has failed, or the time is up, end the rest."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                break
            if any(process.returncode for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
