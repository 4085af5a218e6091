"""What ranks have to agree on before any of them goes on."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from addax_ds.errors import UserError

_START_SECONDS = 600.0
_FAREWELL_SECONDS = 60.0

# Kept, as rank 0 serves it: the process group's own store shares the server while this one lives.
_start_store: dist.TCPStore | None = None


@contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """Let no rank go on, into a collective that waits for all, when another one could not.

    The body must not run collectives that a rank with an error would leave out.

    Raises:
        UserError: on the ranks that could; the others raise what they met.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    _raise_any(problem, everywhere(f"{problem}" if problem else None))


@contextmanager
def starting_together() -> Iterator[None]:
    """Do what `all_ranks_or_none` does, before there is a process group.

    A launcher that loses a rank ends those of its own node. On other nodes they would wait where
    the process group is made, for 10 minutes or more, and then fail without the reason. Does
    nothing where no launcher says who the ranks are.

    Raises:
        UserError: on the ranks that could go on; the others raise what they met. Also if a rank
            has not arrived after 10 minutes.
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
    _raise_any(problem, [word or None for word in words])


def _raise_any(problem: Exception | None, by_rank: list[str | None]) -> None:
    """Raise this rank's own problem, or say that others have one."""
    if problem is not None:
        raise problem
    errors = [error for error in by_rank if error is not None]
    if errors:
        raise UserError(f"stopped, as {len(errors)} other rank(s) had an error: {errors[0]}")


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


def check_same_everywhere(values: Mapping[str, str]) -> None:
    """Check that all ranks run the same thing.

    Args:
        values: what is compared, by a name that a message can use.

    Raises:
        UserError: on all ranks, naming what differs, with its values by rank.
    """
    by_rank = everywhere(dict(values))
    differing = [name for name in values if len({entry.get(name) for entry in by_rank}) > 1]
    if differing:
        lines = [
            f"{name}: "
            + ", ".join(f"rank {i}: {entry.get(name)}" for i, entry in enumerate(by_rank))
            for name in differing
        ]
        raise UserError(
            "the ranks do not run the same training, so they are not started. What differs:\n- "
            + "\n- ".join(lines)
        )


def limit_waiting(seconds: float) -> None:
    """Let a collective fail when another rank has not joined it within this time.

    For every group that exists. Transformers gives its timeout to none on a CPU, and DeepSpeed's
    groups have torch's defaults everywhere: 10 minutes for NCCL, 30 for gloo.
    """
    if dist.is_initialized():
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def aside(wait: float, usually: float) -> Iterator[Callable[[Any], list[Any]]]:
    """Let ranks agree also where one of them has left a collective of the others.

    Every rank has to enter.

    Args:
        wait: seconds after which a collective of the body fails that another rank has not joined.
        usually: the same for afterwards.

    Yields:
        `everywhere` over a group of its own, on which nothing else waits.
    """
    if not dist.is_initialized():
        yield everywhere
        return
    group = dist.new_group(backend="gloo")
    limit_waiting(wait)
    # Others come here only after they have waited for this rank elsewhere.
    distributed_c10d._set_pg_timeout(timedelta(seconds=2 * wait + usually), group)
    try:
        yield partial(everywhere, group=group)
    finally:
        dist.destroy_process_group(group)
        limit_waiting(usually)


def collectives_begun() -> list[int]:
    """Return how many collectives this rank has begun, by group in the order of their making."""
    if not dist.is_initialized():
        return []
    groups: Any = distributed_c10d._world.pg_map
    return [group._get_sequence_number_for_group() for group in groups]


T = TypeVar("T")


def everywhere(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of each rank, on all ranks; it has to be picklable and small."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def leave_together() -> None:
    """End the process group; without this order ranks that end at different times abort at times.

    Every rank has to call it.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
