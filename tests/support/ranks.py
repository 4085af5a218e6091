"""Runs a worker module on several ranks of this machine, with a time limit."""

import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from addax_ds.utils.bf16_matmul import multiply_in_fp32
from studies.jobs import free_port as free_port

ROOT = Path(__file__).parents[2]
GRACE_SECONDS = 10.0
# Imports are most of what a small case takes: ranks are forked from a process that has them. Their
# hashes of strings are therefore alike, as those of ranks from a launcher are not (test_launch).
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.preload"])


_permitted = True


def permit(permitted: bool) -> None:
    """Say whether the test that comes next may start processes."""
    global _permitted
    _permitted = permitted


def require_permission() -> None:
    """Keep tests that start ranks or launchers out of ``make test-quick``."""
    assert _permitted, "a test that starts processes, itself or in a fixture, is to be marked slow"


def run_ranks(
    worker: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout: float = 480.0,
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
    timeout: float = 480.0,
    accelerator: str = "cpu",
) -> str:
    """Run ``python -m <module> <arguments>`` on each rank, with logs in ``folder``.

    Returns rank 0's output. Fails with the output of all ranks if one exits with a non-zero status
    or the time is up; no process is left behind.
    """
    codes, output = ended(
        module, world_size, folder, *arguments, timeout=timeout, accelerator=accelerator
    )
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(output)
    return output[0]


def ended(
    module: str,
    world_size: int,
    folder: Path,
    *arguments: str,
    timeout: float,
    accelerator: str = "cpu",
    nodes: int = 1,
) -> tuple[list[int | None], list[str]]:
    """Run a module as `run_module` does; return each rank's exit code and output.

    A rank that is still running some time after another one has failed is killed.
    """
    require_permission()
    logs = [folder / f"rank{rank}-of-{world_size}.log" for rank in range(world_size)]
    on_node = world_size // nodes
    environment = rank_environment(world_size, accelerator) | {"LOCAL_WORLD_SIZE": str(on_node)}
    # What a device needs may not be set up in a process that forks.
    context = multiprocessing.get_context("forkserver" if accelerator == "cpu" else "spawn")
    processes: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        of_rank = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % on_node)}
        processes.append(context.Process(target=_run, args=(module, arguments, of_rank, log)))
        processes[-1].start()
    _wait(processes, timeout)
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def _run(module: str, arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
    """Be ``python -m <module> <arguments>``."""
    become_rank(environment, log)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def become_rank(environment: dict[str, str], log: Path) -> None:
    """Take a rank's environment; what this process says goes to ``log``."""
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiply_in_fp32()


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


def _wait(processes: list[BaseProcess], timeout: float) -> None:
    """Wait for all; once one has failed, or the time is up, end the rest."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes):
            if time.monotonic() > deadline:
                break
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
