"""Collectives of a step, by the ranks that take part: FSDP2 with two replicas of two shards, and
four replicas of whole models.

``python -m tests.workers.replica_bytes FOLDER``: rank 0 writes ``bytes.json``.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.cases import mean_loss
from tests.support.layouts import Attached, fsdp2, hybrid_mesh
from tests.support.models import tiny_opt, token_batches
from tests.support.reference import Hyperparameters
from tests.workers.teardown import shut_down

STEPS = 2  # what FSDP2 does once, in the first, is not counted


class ByRanks(TorchDispatchMode):
    """Collects (ranks, operation, bytes) of every collective: of all its tensors, if it coalesces
    some, or of its largest one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace == "c10d":
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            ranks = dist.get_process_group_ranks(ProcessGroup.unbox(groups[0]))
            name = function._schema.name.removeprefix("c10d::")
            count = sum if "coalesced" in name else max
            self.calls.append((ranks, name, count(sizes(args))))
        return function(*args, **(kwargs or {}))


def sizes(values: Any) -> list[int]:
    if isinstance(values, torch.Tensor):
        return [values.numel() * values.element_size()]
    if isinstance(values, list | tuple):
        return [size for value in values for size in sizes(value)] or [0]
    return [0]


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    sharded = partial(fsdp2, mesh=hybrid_mesh)
    for name, alpha, layout in (
        ("addax", 0.5, sharded),
        ("mezo", 1.0, sharded),
        ("ip-sgd", 0.0, sharded),
        ("whole", 0.5, Attached),
    ):
        run = layout(tiny_opt(dtype=torch.bfloat16), Hyperparameters(lr=0.1, alpha=alpha))
        parameters = [getattr(p, "_local_tensor", p) for p in run.model.parameters()]
        for step, (long, short) in enumerate(token_batches(STEPS)):
            with ByRanks() as counted:
                first = partial(mean_loss, run.model, short) if alpha < 1 else None
                run.train(partial(mean_loss, run.model, long), first)
            if step == STEPS - 1:
                found[name] = {
                    "calls": counted.calls,
                    "shard_bytes": sum(p.nbytes for p in parameters),
                    "shards": len(parameters),
                }
        run.close()
    if dist.get_rank() == 0:
        Path(sys.argv[1], "bytes.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
