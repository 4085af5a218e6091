"""Ranks that share a machine."""

from typing import TYPE_CHECKING

from addax_ds.distributed.collectives import all_gather_object
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def replicas_of(asked: str, args: "TrainingArguments") -> int:
    """Return the copies of the weights that ``--replicas`` asks for; every rank has to call it.

    Raises:
        UserError: the ranks cannot be divided by them, or each rank would hold a whole copy.
    """
    ranks, per_node = args.world_size, {len(node) for node in nodes(args)}
    if asked == "node" and len(per_node) > 1:
        raise UserError(
            f"--replicas node needs as many ranks on each node; there are {sorted(per_node)}"
        )
    replicas = ranks // per_node.pop() if asked == "node" else int(asked)
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


def nodes(args: "TrainingArguments") -> list[list[int]]:
    """Return the ranks of each node; every rank has to call it."""
    found: list[list[int]] = []
    for rank, local in enumerate(all_gather_object(args.local_process_index)):
        if local == 0:
            found.append([])
        found[-1].append(rank)
    return found
