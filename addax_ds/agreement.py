"""What ranks have to agree on before any of them goes on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from addax_ds.errors import UserError


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
    errors = [error for error in everywhere(problem and f"{problem}") if error is not None]
    if problem is not None:
        raise problem
    if errors:
        raise UserError(f"stopped, as {len(errors)} other rank(s) had an error: {errors[0]}")


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


T = TypeVar("T")


def everywhere(value: T) -> list[T]:
    """Return the value of each rank, on all ranks; it has to be picklable and small."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
