"""Trains cases on a model that no engine drives; writes weights and g0 of each to the folder.

Arguments: the folder, the layout (`LAYOUTS`), and the cases.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.support.cases import CASES, Case, batches, mean_loss
from tests.support.layouts import Attached, Layout, Run, device_type, fsdp2
from tests.workers.teardown import shut_down

LAYOUTS = {
    "replicated": Layout(2, Attached),
    "fsdp2": Layout(2, fsdp2),
    "fsdp2-offload": Layout(2, fsdp2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}


def train(layout: Layout, case: Case, device: str = "cpu") -> dict[str, Any]:
    run = layout.run(case.build().to(device), case.hyperparameters)
    steps = batches()[: case.steps]
    g0 = [train_step(run, case, *(x.to(device) for x in batch)) for batch in steps]
    result = {"g0": g0, "weights": run.weights()}
    run.close()
    return result


def train_step(run: Run, case: Case, long: Tensor, short: Tensor) -> float:
    """One step on this rank's rows of the two global batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    long, short = long.chunk(world_size)[rank], short.chunk(world_size)[rank]
    first_order = (lambda: mean_loss(run.model, short)) if case.hyperparameters.alpha < 1 else None
    return run.train(lambda: mean_loss(run.model, long), first_order)


def main() -> None:
    folder, layout, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    device = device_type()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    for name in names:
        result = train(LAYOUTS[layout], CASES[name], device)
        torch.save(result, folder / f"{name}-rank{dist.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
