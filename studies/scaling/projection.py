"""A model of a step on more GPUs than were measured: arithmetic, and no measurement.

Compute is taken from a measured point. A rank's forward and backward do not depend on the number of
ranks, as each has as many rows; perturbing and updating are done where the shard lives, so a rank's
part of them shrinks with their number N:

    compute(N) = forward + backward + other + (perturb + update) n / N      measured on n ranks

Communication is that of rings over all ranks (`studies.collectives`). Ranks are numbered node
by node, so a ring crosses from one node to the next once, with the bandwidth of the node, and else
stays inside. Each link carries the same, and the slowest one sets the pace:

    seconds = calls rounds (N - 1) latency + rounds (N - 1) / N payload / bandwidth

With a copy of the weights on each node (``--replicas node``) all-gathers and reduce-scatters stay
inside a node, perturbing and updating shrink with its GPUs alone, and each reduce-scatter is
followed by an all-reduce of what a GPU has of it, over the nodes. The GPUs of a node do that at the
same time, so together they send between nodes what one ring over the nodes would, of the whole
payload.

Nothing is said about how much of it runs beside compute. Two bounds are given: none of it,
``compute + communication``, and as much as can be, ``max(compute, communication)``. Stragglers,
congestion, other algorithms than rings, kernels that gain from larger batches, and memory are left
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from studies.collectives import ALL_REDUCE, REDUCE_SCATTER, Collectives, ring_bytes

LABEL = "model, not measured"
"""Stands in every output beside what this module computes."""


@dataclass(frozen=True)
class Network:
    """Assumptions about the machines.

    Attributes:
        gpus_per_node: GPUs of a node.
        intra_node: bytes a second that a GPU sends to another one of its node.
        inter_node: bytes a second that a node sends to another one, all its adapters together.
        latency_s: of one hop of a ring.
    """

    gpus_per_node: int
    intra_node: float
    inter_node: float
    latency_s: float

    def bandwidth(self, ranks: int) -> float:
        """Return the bytes a second of the slowest link of a ring."""
        within = ranks <= self.gpus_per_node
        return self.intra_node if within else min(self.intra_node, self.inter_node)


@dataclass(frozen=True)
class Work:
    """Parts of one step of a rank.

    Attributes:
        fixed_s: seconds of compute that do not depend on the number of ranks.
        sharded_s: seconds of compute of all ranks together, that they share out.
        tokens: that each rank contributes to a step.
        collectives: of a step; the number of ranks in them is that of the measured point.
    """

    fixed_s: float
    sharded_s: float
    tokens: float
    collectives: tuple[Collectives, ...]


@dataclass(frozen=True)
class Projection:
    """A step on a number of ranks, as the model has it.

    Attributes:
        ranks: number of ranks.
        compute_s: seconds of compute of a rank.
        communication_s: seconds of all collectives of a step.
        tokens: of a step, all ranks together.
    """

    ranks: int
    compute_s: float
    communication_s: float
    tokens: float

    @property
    def slowest_s(self) -> float:
        """Seconds of a step of which nothing overlaps."""
        return self.compute_s + self.communication_s

    @property
    def fastest_s(self) -> float:
        """Seconds of a step in which compute and communication overlap as far as they can."""
        return max(self.compute_s, self.communication_s)


def communication_seconds(
    collectives: Sequence[Collectives], ranks: int, network: Network
) -> float:
    """Return the seconds of collectives if they were rings over ``ranks`` ranks."""
    bandwidth = network.bandwidth(ranks)
    return sum(
        c.calls * c.rounds * (ranks - 1) * network.latency_s
        + ring_bytes(c.rounds, c.payload, ranks) / bandwidth
        for c in collectives
    )


def project(work: Work, ranks: int, network: Network, *, copy_a_node: bool = False) -> Projection:
    """Project a step to a number of ranks, with one copy of the weights or one on each node."""
    nodes = -(-ranks // network.gpus_per_node) if copy_a_node else 1
    seconds = communication_seconds(work.collectives, ranks, network)
    if nodes > 1:
        stay = [c for c in work.collectives if c.kind != ALL_REDUCE]
        go_on = [c for c in work.collectives if c.kind == ALL_REDUCE]
        seconds = (
            communication_seconds(stay, ranks // nodes, network)
            + communication_seconds(go_on, ranks, network)
            + _between_nodes(stay, nodes, network)
        )
    return Projection(
        ranks=ranks,
        compute_s=work.fixed_s + work.sharded_s * nodes / ranks,
        communication_s=seconds,
        tokens=work.tokens * ranks,
    )


def _between_nodes(collectives: Sequence[Collectives], nodes: int, network: Network) -> float:
    """Return the seconds of the all-reduces over nodes that follow reduce-scatters."""
    return sum(
        2 * c.calls * (nodes - 1) * network.latency_s
        + ring_bytes(2, c.payload, nodes) / network.inter_node
        for c in collectives
        if c.kind == REDUCE_SCATTER
    )
