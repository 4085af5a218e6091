"""Ranks that share a machine."""

from typing import TYPE_CHECKING

from addax_ds.distributed.collectives import all_gather_object

if TYPE_CHECKING:
    from transformers import TrainingArguments


def nodes(args: "TrainingArguments") -> list[list[int]]:
    """Return the ranks of each node; every rank has to call it."""
    found: list[list[int]] = []
    for rank, local in enumerate(all_gather_object(args.local_process_index)):
        if local == 0:
            found.append([])
        found[-1].append(rank)
    return found
