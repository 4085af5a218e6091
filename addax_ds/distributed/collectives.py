"""Collectives of Python objects, and errors that reach all ranks."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from addax_ds.utils.errors import UserError

_WEEK_SECONDS = 7 * 24 * 3600.0


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks if the body has raised on any of them.

    The body must not run collectives that a rank with an error would leave out.

    Raises:
        UserError: on ranks whose own body succeeded; the others re-raise their error.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    raise_any(problem, all_gather_object(f"{problem}" if problem else None))


def raise_any(problem: Exception | None, by_rank: list[str | None]) -> None:
    """Raise this rank's own problem, or say that others have one."""
    if problem is not None:
        raise problem
    errors = [error for error in by_rank if error is not None]
    if errors:
        raise UserError(f"stopped, as {len(errors)} other rank(s) had an error: {errors[0]}")


def check_same_on_all_ranks(values: Mapping[str, str]) -> None:
    """Check that all ranks run the same thing.

    Args:
        values: what is compared, by a name that a message can use.

    Raises:
        UserError: on all ranks, naming what differs, with its values by rank.
    """
    by_rank = all_gather_object(dict(values))
    names = dict.fromkeys(name for entry in by_rank for name in entry)  # a rank may lack some
    differing = [name for name in names if len({entry.get(name) for entry in by_rank}) > 1]
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
    """Set the timeout of collectives.

    For every group that exists. Transformers gives its timeout to none on a CPU, and DeepSpeed's
    groups have torch's defaults everywhere: 10 minutes for NCCL, 30 for gloo.
    """
    if dist.is_initialized():
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def patient(usually: float) -> Iterator[None]:
    """Let collectives wait for a week in the body: a node may have hours of work that others lack.

    A process that dies ends the waiting all the same, by its connections or its launcher.

    Args:
        usually: seconds that a collective waits afterwards.
    """
    limit_waiting(_WEEK_SECONDS)
    try:
        yield
    finally:
        limit_waiting(usually)


@contextmanager
def side_group(wait: float, usually: float) -> Iterator[Callable[[Any], list[Any]]]:
    """Second process group, for agreement after a rank has left a collective of the first.

    Every rank has to enter.

    Args:
        wait: seconds after which a collective of the body fails that another rank has not joined.
        usually: their timeout afterwards, in seconds.

    Yields:
        `all_gather_object` over a group of its own, on which nothing else waits.
    """
    if not dist.is_initialized():
        yield all_gather_object
        return
    group = dist.new_group(backend="gloo")
    limit_waiting(wait)
    # Others come here only after they have waited for this rank elsewhere.
    distributed_c10d._set_pg_timeout(timedelta(seconds=2 * wait + usually), group)
    try:
        yield partial(all_gather_object, group=group)
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


def get_rank() -> int:
    """Return the number of this rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Return whether this is the first rank, or the only process."""
    return get_rank() == 0


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the value of each rank, on all ranks; it has to be picklable and small."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def shutdown() -> None:
    """Destroy the process group after a barrier; every rank has to call it.

    Ranks that leave at different times may abort otherwise.
    """
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()
