"""Commits every mistake that would otherwise be silent, and writes down what it was told."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import addax_ds
from addax_ds.sharding.modules import blocks
from tests.support.cases import mean_loss
from tests.support.layouts import Attached, Run, Zero3, flat_mesh, fsdp2, hybrid_mesh
from tests.support.models import tiny_opt, token_batches
from tests.support.reference import Hyperparameters
from tests.workers.teardown import shut_down

H = Hyperparameters(lr=0.1, alpha=0.5, seed=4)
STARTS: dict[str, Callable[..., Run]] = {"unsharded": Attached, "fsdp2": fsdp2, "zero3": Zero3}


def rows() -> Tensor:
    return token_batches(1)[0][0].chunk(dist.get_world_size())[dist.get_rank()]


def loss(run: Run) -> Tensor:
    return mean_loss(run.model, rows())


def addax(model: nn.Module) -> addax_ds.Addax:
    return addax_ds.Addax(model.parameters(), lr=0.1, alpha=0.5)


# ---- steps in a wrong order --------------------------------------------------------------------


def forward_before_zeroth_order(start: Callable[..., Run]) -> None:
    run = start(tiny_opt(), H)
    loss(run)
    run.optimizer.measure(partial(loss, run), None)


def forward_before_zeroth_order_later(start: Callable[..., Run]) -> None:
    """In the second step; forwards without autograd and a whole step before it are no mistake."""
    run = start(tiny_opt(), H)
    with torch.no_grad():
        loss(run)
    run.train(partial(loss, run), partial(loss, run))
    forgotten = loss(run)
    run.optimizer.measure(partial(loss, run), None)
    del forgotten


def second_backward(start: Callable[..., Run]) -> None:
    run = start(tiny_opt(), H)
    run.optimizer.measure(partial(loss, run), None)
    run.backward(loss(run))
    run.backward(loss(run))


def no_reduction(start: Callable[..., Run]) -> None:
    run = start(tiny_opt(), H)
    run.model.set_requires_gradient_sync(False)
    run.train(partial(loss, run), partial(loss, run))


def no_reduction_over_replicas() -> None:
    run = fsdp2(tiny_opt(), H, mesh=hybrid_mesh)
    run.model.set_requires_all_reduce(False)
    run.train(partial(loss, run), partial(loss, run))


def state_for_torch_checkpoint(start: Callable[..., Run]) -> None:
    """Torch asks for state between two steps: it sets gradients of zero and calls step()."""
    run = start(tiny_opt(), H)
    run.train(partial(loss, run), partial(loss, run))
    get_optimizer_state_dict(run.model, run.optimizer)


def gradient_from_before(start: Callable[..., Run]) -> None:
    model = tiny_opt()
    if start is fsdp2:
        fully_shard(model, mesh=flat_mesh())
    mean_loss(model, rows()).backward()
    run = Attached(model, H)
    run.train(partial(loss, run), partial(loss, run))


# ---- losses in a narrow type -------------------------------------------------------------------


def narrow_output(first_order: bool) -> None:
    """Under the policy that Accelerate makes of ``mixed_precision="bf16"``."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    h = replace(H, alpha=0.0) if first_order else H
    run = fsdp2(tiny_opt(), h, mp_policy=plugin.mixed_precision_policy)
    run.optimizer.measure(partial(loss, run), partial(loss, run))


# ---- models laid out in a way that is not served -----------------------------------------------


def sharded_after_attaching() -> None:
    run = Attached(tiny_opt(), H)
    fully_shard(run.model, mesh=flat_mesh())
    run.optimizer.measure(partial(loss, run), None)


def optimizer_made_before_sharding() -> None:
    model = tiny_opt()
    optimizer = addax(model)
    fully_shard(model, mesh=flat_mesh())
    addax_ds.attach(optimizer, model)


def layers_alone_sharded() -> None:
    model = tiny_opt()
    for block in blocks(model):
        fully_shard(block, mesh=flat_mesh())
    addax_ds.attach(addax(model), model)


def resharded_to_fewer_ranks() -> None:
    fsdp2(tiny_opt(), H, reshard_after_forward=2)


def mesh_of_some_ranks() -> None:
    names = ("others", "shard")
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=names)
    fsdp2(tiny_opt(), H, mesh=lambda: mesh["shard"])


def tensor_parallel() -> None:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = tiny_opt()
    for block in blocks(model):
        weight = nn.Parameter(distribute_tensor(block.fc1.weight.data, mesh["tensor"], [Shard(0)]))
        block.fc1.weight = weight
    fsdp2(model, H, mesh=lambda: mesh["data"])


def sharded_along_columns() -> None:
    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(parameter.ndim - 1)

    fsdp2(tiny_opt(), H, shard_placement_fn=placement)


def left_out_of_sharding() -> None:
    model = tiny_opt()
    fsdp2(model, H, ignored_params={model.model.decoder.final_layer_norm.weight})


def tied_after_sharding() -> None:
    model = tiny_opt(tied=False)
    fully_shard(model.model.decoder.embed_tokens, mesh=flat_mesh())
    fully_shard(model, mesh=flat_mesh())
    model.lm_head.weight = model.model.decoder.embed_tokens.weight
    addax_ds.attach(addax(model), model)


def weights_of_two_dtypes() -> None:
    model = tiny_opt(dtype=torch.bfloat16)
    model.model.decoder.final_layer_norm.float()
    fsdp2(model, H)


def wrapped_in_ddp() -> None:
    model = DistributedDataParallel(tiny_opt())
    addax_ds.attach(addax(model), model)


def zero3_attached() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Addax", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3},
    }
    engine = deepspeed.initialize(model=tiny_opt(), config=config)[0]
    addax_ds.attach(addax(engine.module), engine.module)


def zero_stage_left_out() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Addax", "params": {"lr": 0.1, "alpha": 0.5}},
    }
    model, optimizer, *_ = deepspeed.initialize(model=tiny_opt(), config=config)
    optimizer.measure(lambda: mean_loss(model, rows()), None)


MISTAKES: dict[str, Callable[[], None]] = {
    **{
        f"{mistake.__name__} {name}": partial(mistake, start)
        for mistake in (forward_before_zeroth_order, forward_before_zeroth_order_later)
        for name, start in STARTS.items()
    },
    "second_backward unsharded": partial(second_backward, Attached),
    "second_backward fsdp2": partial(second_backward, fsdp2),
    "no_reduction fsdp2": partial(no_reduction, fsdp2),
    "state_for_torch_checkpoint unsharded": partial(state_for_torch_checkpoint, Attached),
    "state_for_torch_checkpoint fsdp2": partial(state_for_torch_checkpoint, fsdp2),
    "gradient_from_before unsharded": partial(gradient_from_before, Attached),
    "gradient_from_before fsdp2": partial(gradient_from_before, fsdp2),
    "narrow_output zeroth order": partial(narrow_output, False),
    "narrow_output first order": partial(narrow_output, True),
    **{
        mistake.__name__: mistake
        for mistake in (
            sharded_after_attaching,
            optimizer_made_before_sharding,
            layers_alone_sharded,
            mesh_of_some_ranks,
            tensor_parallel,
            sharded_along_columns,
            left_out_of_sharding,
            tied_after_sharding,
            weights_of_two_dtypes,
            wrapped_in_ddp,
            zero3_attached,
            zero_stage_left_out,
        )
    },
}
MISTAKES_OF_FOUR: dict[str, Callable[[], None]] = {
    "resharded_to_fewer_ranks": resharded_to_fewer_ranks,
    "no_reduction_over_replicas": no_reduction_over_replicas,
}


def what_is_said(mistake: Callable[[], None]) -> str:
    """Type and text of the error, or nothing."""
    try:
        mistake()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def replicas_that_start_apart() -> dict[str, Any]:
    """Not a mistake: replicated ranks take rank 0's weights and buffers, and stay together."""
    model = tiny_opt()
    model.register_buffer("scale", torch.full((3,), float(dist.get_rank())))
    for parameter in model.parameters():
        parameter.data += dist.get_rank()
    run = Attached(model, H)
    start = run.weights()
    run.train(partial(loss, run), partial(loss, run))
    return {"start": start, "end": run.weights(), "buffer": model.scale}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    said = {}
    for name, mistake in (MISTAKES_OF_FOUR if world_size == 4 else MISTAKES).items():
        print(name, flush=True)
        said[name] = what_is_said(mistake)
    torch.save(said, folder / f"said-{world_size}-rank{rank}.pt")
    if world_size == 2:
        torch.save(replicas_that_start_apart(), folder / f"replicas-rank{rank}.pt")
    shut_down()


if __name__ == "__main__":
    main()
