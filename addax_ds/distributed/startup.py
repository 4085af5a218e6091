"""Start of the ranks: errors before there is a process group, then DeepSpeed's set-up."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from unittest import mock

import torch.distributed as dist

from addax_ds.distributed.collectives import raise_any
from addax_ds.utils.errors import UserError

_START_SECONDS = 600.0
_FAREWELL_SECONDS = 60.0
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
    """Call ``deepspeed.init_distributed`` without the extension that it compiles for CPUs.

    That would take a minute on a machine's first run, and hang where one was killed in it. It
    serves ``inference_all_reduce`` alone, which has another way and is not called in training.
    """
    import deepspeed  # users of other back ends have none

    # Not by its name in the package, where `torch` is the library.
    backend = importlib.import_module("deepspeed.comm.torch")
    with mock.patch.object(backend, "build_shm_op", return_value=None):
        deepspeed.init_distributed()
