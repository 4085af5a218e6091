"""Starts DeepSpeed's communication, but does not wait for a compilation that has been killed."""

import logging
import time
from pathlib import Path

import deepspeed
import psutil
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from addax_ds.errors import UserError

logger = logging.getLogger(__name__)

_COMPILES_S = 120.0
_SAID_AFTER_S = 5.0
_POLL_S = 0.2


def init_deepspeed() -> None:
    """Call ``deepspeed.init_distributed``.

    On CPUs it compiles an extension, once for a machine, and first waits as long as the lock of
    another process stands: in silence and for ever, if that process was killed as it compiled.

    Raises:
        UserError: a lock is more than two minutes old, and no process that can be seen from here
            has it open.
    """
    if get_accelerator().device_name() == "cpu":
        folder = cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)
        wait_for_compilation(Path(folder).resolve() / "lock")
    deepspeed.init_distributed()


def wait_for_compilation(lock: Path) -> None:
    """Wait until nothing compiles the extension that a lock is for; see `init_deepspeed`."""
    began, said = time.monotonic(), False
    while (age := _age(lock)) is not None:
        if age > _COMPILES_S and _is_abandoned(lock):
            raise UserError(
                f"{lock} says that another process compiles DeepSpeed's CPU collectives, but it is "
                f"{age:.0f} s old and no process here has it open: the one that wrote it was "
                "killed. Delete the file, unless another machine, user or container that shares "
                "the folder compiles just now"
            )
        if not said and time.monotonic() - began > _SAID_AFTER_S:
            logger.info("Waiting for another process to compile DeepSpeed's collectives: %s", lock)
            said = True
        time.sleep(_POLL_S)


def _age(lock: Path) -> float | None:
    """Return the seconds since a lock was taken, or None if there is none."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_abandoned(lock: Path) -> bool:
    """Say twice whether nobody has a lock open: torch closes the file, then removes it."""
    if _is_open(lock):
        return False
    time.sleep(_POLL_S)
    return lock.exists() and not _is_open(lock)


def _is_open(path: Path) -> bool:
    """Say whether a process of this machine, of those that we may look into, has a file open."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
