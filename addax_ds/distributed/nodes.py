"""Ranks that share a machine."""

import os
from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from typing import TYPE_CHECKING

from addax_ds.distributed.collectives import all_gather_object
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def replicas_problem(asked: str) -> str | None:
    """Return what is wrong with a ``--replicas``, whatever the ranks; None if nothing is."""
    if asked == "node" or (asked.isdecimal() and int(asked) > 0):
        return None
    return f"--replicas {asked}: it must be a number from 1 on, or node."


def replicas_of(asked: str, ranks_of_nodes: Collection[int]) -> int:
    """Return how many copies of the weights ``--replicas`` asks for.

    Args:
        asked: a number, or "node".
        ranks_of_nodes: how many ranks each node has.

    Raises:
        UserError: the ranks cannot be divided by them, or each rank would hold a whole copy.
    """
    ranks, sizes = sum(ranks_of_nodes), sorted(set(ranks_of_nodes))
    if asked == "node" and len(sizes) > 1:
        raise UserError(f"--replicas node needs as many ranks on each node; there are {sizes}")
    if problem := replicas_problem(asked):
        raise UserError(problem)
    replicas = len(ranks_of_nodes) if asked == "node" else int(asked)
    if ranks % replicas:
        raise UserError(
            f"--replicas {asked}: {ranks} ranks cannot be divided into {replicas} equal parts"
        )
    if replicas == ranks > 1:
        raise UserError(
            f"--replicas {asked}: each of the {ranks} ranks would hold the whole model; that is "
            "--sharding none"
        )
    return replicas


def ranks_of_node(args: "TrainingArguments", rank: int | None = None) -> list[int]:
    """Return the ranks of the node of a rank, by default this one; every rank has to call it."""
    own = args.process_index if rank is None else rank
    return next(node for node in nodes(args) if own in node)


def threads_of_rank(args: "TrainingArguments") -> int:
    """Return the threads for a rank beside the others of its node; every rank has to call it."""
    cores = all_gather_object(os.sched_getaffinity(0))
    node = ranks_of_node(args)
    return share_of_cores(cores[args.process_index], [cores[rank] for rank in node])


def share_of_cores(own: Collection[int], of_node: Collection[Collection[int]]) -> int:
    """Return how many cores a rank has for itself, at least 1.

    Ranks that a launcher has bound to cores of their own have them whole; a core that n ranks may
    use counts 1/n for each.

    Args:
        own: numbers of the cores that the rank may use.
        of_node: the same of each rank of its node, its own included.
    """
    users = Counter(core for cores in of_node for core in cores)
    return max(1, int(sum(Fraction(1, users[core]) for core in own)))


def nodes(args: "TrainingArguments") -> list[list[int]]:
    """Return the ranks of each node; every rank has to call it."""
    found: list[list[int]] = []
    for rank, local in enumerate(all_gather_object(args.local_process_index)):
        if local == 0:
            found.append([])
        found[-1].append(rank)
    return found
