"""Collectives of a step, and the bytes that a rank sends for them in a ring.

In a ring of n ranks a tensor of S bytes is cut into n parts. For an all-gather and for a
reduce-scatter each rank passes n - 1 parts on, for an all-reduce, which is one after the other,
2 (n - 1) (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009):

    sent = rounds * (n - 1) / n * S         rounds: 1, or 2 for an all-reduce

A library may choose another algorithm; the volume of these is the least that any can do with.

`CollectiveCounter` counts what torch's dispatcher does; `Traffic` is told of the calls of process
groups, with their numbers of ranks, by an instrument that times them. Tests compare the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all_gather", "reduce_scatter", "all_reduce"
KINDS = (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE)


@dataclass(frozen=True)
class Collectives:
    """All collectives of a kind in one step.

    Attributes:
        kind: one of `KINDS`.
        ranks: number of ranks that took part in each.
        calls: how many there were.
        payload: bytes of the whole tensors: those gathered, to be scattered, or reduced.
    """

    kind: str
    ranks: int
    calls: int
    payload: int

    @property
    def rounds(self) -> int:
        """Number of times that the tensor goes round."""
        return 2 if self.kind == ALL_REDUCE else 1

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a ring."""
        return ring_bytes(self.rounds, self.payload, self.ranks)


def ring_bytes(rounds: int, payload: int, ranks: int) -> float:
    """Return the bytes that a rank of a ring sends for tensors of ``payload`` bytes."""
    return rounds * payload * (ranks - 1) / ranks


class Traffic:
    """Counts the collectives of this rank."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, int], list[int]] = {}

    def add(self, kind: str, ranks: int, payload: int) -> None:
        """Count one collective; see `Collectives`."""
        self._calls.setdefault((kind, ranks), []).append(payload)

    def take(self) -> list[Collectives]:
        """Return what has been counted, and begin again."""
        found = [
            Collectives(kind, ranks, len(payloads), sum(payloads))
            for (kind, ranks), payloads in sorted(self._calls.items())
        ]
        self._calls.clear()
        return found


def sent_bytes(collectives: Iterable[Collectives], *kinds: str) -> float:
    """Return the bytes that a rank sends, for some kinds or for all."""
    return sum(c.sent for c in collectives if not kinds or c.kind in kinds)


class CollectiveCounter(TorchDispatchMode):
    """Collects ``(operation, bytes of its largest tensor)`` of every collective.

    The largest tensor is the gathered one, the one to be reduce-scattered, or the reduced one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            sizes = [t.numel() * t.element_size() for t in _tensors(args)]
            self.calls.append((function._schema.name.removeprefix("c10d::"), max(sizes, default=0)))
        return function(*args, **(kwargs or {}))


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, list | tuple):
        return [tensor for argument in arguments for tensor in _tensors(argument)]
    return []
