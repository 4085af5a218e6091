"""Detection of diverging ranks, and of weights written by something else.

Replicas of a shard have to be equal bit by bit. A shard that one rank alone holds has nothing to be
compared with but itself: nothing may write it between two steps. And every rank has to have taken
the step with the same values.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from addax_ds.distributed.collectives import all_gather_object
from addax_ds.optim.addax import Addax
from addax_ds.utils.errors import UserError

_INTEGERS = {2: torch.int16, 4: torch.int32}

_REMEDY = (
    "Something other than the optimizer has written to weights (a callback, a faulty device), or "
    "ranks run different code. Go on from a checkpoint that was saved before"
)


class DesyncCheck:
    """Compares checksums every so many steps; each reads the weights once.

    Any one altered element changes a `checksum`.

    Args:
        every: number of steps between two checks; 0 never checks.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._sums: dict[str, int] | None = None

    def before_step(self, optimizer: Addax) -> None:
        """Check that the weights are those that the last check saw, if it was after the last step.

        Raises:
            UserError: on all ranks, naming rank and parameter.
        """
        before, self._sums = self._sums, None
        if before is None:
            return
        now = _checksums(optimizer)
        changed = all_gather_object(_first_difference(before, now))
        lines = [f"rank {rank}: {name}" for rank, name in enumerate(changed) if name is not None]
        if lines:
            raise UserError(
                f"the weights changed between steps {optimizer.index - 1} and {optimizer.index}: "
                f"{', '.join(lines)}. {_REMEDY}"
            )

    def after_step(self, optimizer: Addax) -> None:
        """Check, if it is time, that replicas are equal and that ranks took the same step.

        Raises:
            UserError: on all ranks, naming what differs.
        """
        if not self._every or optimizer.index % self._every:
            return
        self._sums = _checksums(optimizer)
        _check_replicas(optimizer, self._sums)
        check_values(optimizer)


def _checksums(optimizer: Addax) -> dict[str, int]:
    """Checksum of each shard, by name and place of the shard."""
    shards = list(optimizer.sharding.shards())
    if not shards:
        return {}
    sums = torch.stack([checksum(shard.data) for shard in shards]).tolist()
    return {f"{s.name}[{s.start}:]": value for s, value in zip(shards, sums, strict=True)}


def _check_replicas(optimizer: Addax, sums: dict[str, int]) -> None:
    if optimizer.sharding.replicas == 1:
        return
    by_rank = all_gather_object(sums)
    for rank, other in enumerate(by_rank):
        peer = next(i for i, first in enumerate(by_rank) if first.keys() == other.keys())
        name = _first_difference(by_rank[peer], other)
        if name is not None:
            raise UserError(
                f"after step {optimizer.index - 1} rank {rank} has other weights than rank {peer}, "
                f"in {name}. {_REMEDY}"
            )


def check_values(optimizer: Addax) -> None:
    """Check that all ranks took the last step with the same values; see `DesyncCheck`."""
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    state = optimizer.state_dict()["addax"]
    values = all_gather_object(repr((optimizer.report, groups, optimizer.hyperparameters, state)))
    for rank, value in enumerate(values):
        if value != values[0]:
            raise UserError(
                f"ranks took step {optimizer.index - 1} with different values: rank 0 with "
                f"{values[0]}, rank {rank} with {value}. {_REMEDY}"
            )


def checksum(data: Tensor) -> Tensor:
    """Sum the bits of a shard, flat, as integers modulo 2**64: int64 of shape ``()``.

    Words of 64 bits, wherever the shard lies, and what is left over at its end: a sum of narrower
    integers would first widen all of them, to four times the memory.
    """
    per_word = 8 // data.element_size()
    if data.storage_offset() % per_word:
        data = data.clone()  # a view as words has to begin with one
    end = data.numel() // per_word * per_word
    total = data[:end].view(torch.int64).sum()
    if end < data.numel():
        total += data[end:].view(_INTEGERS[data.element_size()]).sum(dtype=torch.int64)
    return total


def _first_difference(a: Mapping[str, int], b: Mapping[str, int]) -> str | None:
    return next((name for name in a if a[name] != b[name]), None)
