"""Trains every case on a model that no engine drives; writes weights and g0 to the folder.

Arguments: the folder, the layout (`LAYOUTS`), and the cases.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

import addax_ds
from addax_ds.sharding.fsdp2 import shard_model
from tests.cases import CASES, Case, batches, mean_loss
from tests.workers.teardown import shut_down


def mesh(*shape: int) -> Any:
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


LAYOUTS = {
    "replicated": lambda model, world: None,
    "fsdp2": lambda model, world: shard_model(model, mesh=mesh(world)),
    "fsdp2-offload": lambda model, world: shard_model(
        model, mesh=mesh(world), offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "hsdp": lambda model, world: shard_model(model, mesh=mesh(2, world // 2)),
}


def train(case: Case, layout: str) -> dict:
    model, world = case.build(), dist.get_world_size()
    LAYOUTS[layout](model, world)
    h = case.hyperparameters
    optimizer = addax_ds.Addax(model.parameters(), h.lr, h.alpha, h.zo_eps, h.weight_decay, h.seed)
    addax_ds.attach(optimizer, model)
    history = []
    for batch in batches():
        long, short = (x.chunk(world)[dist.get_rank()] for x in batch)
        history.append(optimizer.zeroth_order(lambda x=long: mean_loss(model, x)))
        if h.alpha < 1:
            mean_loss(model, short).backward()
        optimizer.step()
    return {"g0": history, "weights": whole_weights(model)}


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: getattr(p, "full_tensor", p.detach)().detach().clone()
        for n, p in model.named_parameters()
    }


def main() -> None:
    folder, layout, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names or CASES:
        torch.save(train(CASES[name], layout), folder / f"{name}-rank{dist.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
