"""Start of the ranks: errors before there is a process group, then DeepSpeed's set-up."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout

from addax_ds.distributed.collectives import raise_any
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

_START_SECONDS = 600.0
_FAREWELL_SECONDS = 60.0
_COMPILES_SECONDS = 120.0
_SAID_AFTER_SECONDS = 5.0
_POLL_SECONDS = 0.2
_WAITING = "Waiting for another process to compile DeepSpeed's collectives: %s"
# As launchers name it; the same that Accelerate reads.
_RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

# Kept, as rank 0 serves it: the process group's own store shares the server while this one lives.
_start_store: dist.TCPStore | None = None


@contextmanager
def raise_on_all_ranks_at_start() -> Iterator[None]:
    """Do what `raise_on_all_ranks` does, before there is a process group.

    A launcher that loses a rank ends those of its own node. On other nodes they would wait where
    the process group is made, for 10 minutes or more, and then fail without the reason. Does
    nothing where no launcher says who the ranks are.

    Raises:
        UserError: on ranks whose own body succeeded; the others re-raise their error. Also if a
            rank has not arrived after 10 minutes.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    try:
        words = _first_words(f"{problem}" if problem else "")
    except dist.DistError as error:
        raise problem or UserError(
            f"not all ranks have started within {_START_SECONDS:.0f} s, so none does: another node "
            f"has ended, or cannot reach {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']}; its own output says more ({error})"
        ) from error
    raise_any(problem, [word or None for word in words])


def launched_as_rank_zero() -> bool:
    """Return whether this is rank 0 by what its launcher says, before there is a process group."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0") == "0"


def launcher_patience() -> tuple[str, float] | None:
    """Return the launcher, and the seconds after which it kills ranks that it has told to end.

    None where there is no launcher, or one whose patience is not known.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # of accelerate launch, too
        return "torchrun", float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    if "CROSS_SIZE" in os.environ:  # as its launch.py has it, which takes no option
        return "deepspeed", 30.0
    return None


def _first_words(word: str) -> list[str]:
    """Return the word of each rank, by way of the store that the process group will use."""
    global _start_store
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if dist.is_initialized() or any(name not in os.environ for name in names):
        return [word]
    rank, ranks = int(os.environ["RANK"]), range(int(os.environ["WORLD_SIZE"]))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun serves the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=_FAREWELL_SECONDS if word else _START_SECONDS)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        _start_store = dist.TCPStore(
            address,
            port,
            is_master=serves,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if not serves:
            raise
        raise UserError(
            f"port {port}, at which the ranks are to meet, cannot be opened here; if another "
            f"training uses it, give the launcher another --master_port ({error})"
        ) from error
    store = dist.PrefixStore(f"addax_ds/{attempt}", _start_store)
    store.set(f"said/{rank}", word)
    words = [store.get(f"said/{other}").decode() for other in ranks]
    store.set(f"heard/{rank}", "")
    if any(words) and serves:
        # The words are gone with their server.
        with suppress(dist.DistError):
            heard = [f"heard/{other}" for other in ranks]
            store.wait(heard, timedelta(seconds=_FAREWELL_SECONDS))
    return words


def init_deepspeed() -> None:
    """Call ``deepspeed.init_distributed``, after its extension for CPUs has been compiled.

    That happens once for a machine, by one process at a time.

    Raises:
        UserError: see `compiling_alone`.
    """
    import deepspeed  # users of other back ends have none
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        _compile_collectives()
    deepspeed.init_distributed()


def _compile_collectives() -> None:
    """Compile or load what ``init_distributed`` finds loaded; it waits for ranks, this does not."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension  # slow, and only ZeRO-3 on CPUs needs it

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        try:
            folder = cpp_extension._get_build_directory(builder.name, verbose=False)
        except OSError as error:
            raise UserError(
                f"DeepSpeed's CPU collectives cannot be compiled: {error}. Set "
                "TORCH_EXTENSIONS_DIR to a folder on a local disk that can be written"
            ) from error
        with compiling_alone(Path(folder).resolve() / "lock"):
            builder.load()


@contextmanager
def compiling_alone(lock: Path) -> Iterator[None]:
    """Keep other processes from compiling an extension, and remove the lock of a killed one.

    torch locks the folder of an extension by a file that stays if its process is killed, and then
    waits for ever without a word. A second lock, which the kernel releases with its process, lets
    one process at a time look at that file. The file of a program that does not take the second
    lock is respected while it is young or open.

    Args:
        lock: torch's file, beside which the second lock is made.

    Raises:
        UserError: the file system has no locks, or torch's file is old and may be open in a process
            that cannot be looked into.
    """
    path = lock.with_name("addax_ds.lock")
    own = FileLock(path, fallback_to_soft=False)
    try:
        _acquire(own)
    except (NotImplementedError, OSError) as error:
        raise UserError(
            f"{path} cannot be locked ({error}): set TORCH_EXTENSIONS_DIR to a folder on a local "
            "disk, where DeepSpeed's CPU collectives can be compiled"
        ) from error
    try:
        _wait_for_compilation(lock)
        yield
    finally:
        own.release()


def _acquire(lock: FileLock) -> None:
    try:
        lock.acquire(timeout=_SAID_AFTER_SECONDS)
    except Timeout:  # is an OSError
        logger.info(_WAITING, lock.lock_file)
        lock.acquire()


def _wait_for_compilation(lock: Path) -> None:
    """Wait until nothing compiles; whoever calls it holds the second lock."""
    began, said = time.monotonic(), False
    while (age := _age(lock)) is not None:
        if age > _COMPILES_SECONDS and _is_abandoned(lock, age):
            logger.warning("Removing %s: no process here has it open", lock)
            lock.unlink(missing_ok=True)
            return
        if not said and time.monotonic() - began > _SAID_AFTER_SECONDS:
            logger.info(_WAITING, lock)
            said = True
        time.sleep(_POLL_SECONDS)


def _age(lock: Path) -> float | None:
    """Return the seconds since a lock was taken, or None if there is none."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_abandoned(lock: Path, age: float) -> bool:
    """Return whether no process has a lock open, in two looks: torch closes it, then removes it.

    Raises:
        UserError: a process cannot be looked into.
    """
    if _is_open(lock):
        return False
    time.sleep(_POLL_SECONDS)
    if not lock.exists():
        return False
    is_open = _is_open(lock)
    if is_open is None:
        raise UserError(
            f"{lock} says that another process compiles DeepSpeed's CPU collectives, but it is "
            f"{age:.0f} s old, and no process that can be looked into has it open. Delete the "
            "file, unless another machine, user or container that shares the folder compiles just "
            "now"
        )
    return not is_open


def _is_open(path: Path) -> bool | None:
    """Return whether a visible process of this machine has a file open; None if it is not known."""
    import psutil

    hidden = False
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path for file in process.open_files()):
                return True
        except psutil.AccessDenied:
            hidden = hidden or _may_have_made(process, path)
        except psutil.NoSuchProcess:
            continue
    return None if hidden else False


def _may_have_made(process: Any, path: Path) -> bool:
    """Return whether a process that cannot be looked into may hold the lock that it made.

    Init and processes of other users than the file's owner are always there, and did not make it.
    """
    import psutil

    if process.pid == 1:  # in a container it may have more rights than this one
        return False
    try:
        return path.stat().st_uid == process.uids().effective
    except FileNotFoundError:
        return False
    except psutil.Error:
        return True
