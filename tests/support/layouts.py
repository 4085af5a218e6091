"""Every way to lay a model out over ranks, each giving a run that trains in the same words."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import addax_ds
from addax_ds.sharding.fsdp2 import shard_model
from tests.support.passes import measured_g0
from tests.support.rank_group import Lazy, RankGroup
from tests.support.reference import Hyperparameters

Closure = Callable[[], Tensor]


class Run:
    """A model trained by Addax: ``measure``, ``backward``, ``step``, on any back end.

    Attributes:
        model: what is called for a forward pass.
        optimizer: what has ``measure``.
    """

    model: Any
    optimizer: Any

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()

    def close(self) -> None:
        self.optimizer.sharding.detach()

    def train(self, zeroth_order: Closure, first_order: Closure | None) -> float:
        """Take one step and return its g0; without ``first_order`` the step has no backward."""
        g0 = measured_g0(self.optimizer, zeroth_order)
        if first_order is not None:
            self.backward(first_order())
        self.step()
        return g0

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights, on every rank."""
        return {
            n: getattr(p, "full_tensor", p.detach)().detach().cpu().clone()
            for n, p in self.model.named_parameters()
        }


class Attached(Run):
    """No engine: the model as it is, or sharded by ``fully_shard`` before."""

    def __init__(self, model: nn.Module, h: Hyperparameters) -> None:
        self.model = model
        self.optimizer = addax_ds.Addax(model.parameters(), **asdict(h))
        addax_ds.attach(self.optimizer, model)


class Zero3(Run):
    def __init__(
        self, model: nn.Module, h: Hyperparameters, zero: dict[str, Any] | None = None
    ) -> None:
        dtype = next(model.parameters()).dtype
        params = asdict(h)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
            "gradient_clipping": params.pop("max_grad_norm"),
            "optimizer": {"type": "Addax", "params": params},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": 150_000, **(zero or {})},
        }
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            # As a model is loaded: what `initialize` cuts itself becomes of one dtype.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, config=config)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def close(self) -> None:
        self.model.destroy()

    def weights(self) -> dict[str, Tensor]:
        module = self.model.module
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return {n: p.detach().clone() for n, p in module.named_parameters()}


def device_type() -> str:
    return os.environ["DS_ACCELERATOR"]


def flat_mesh() -> DeviceMesh:
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("shard",))


def hybrid_mesh() -> DeviceMesh:
    """Two replicas of a model that is sharded over the rest."""
    shape = (2, dist.get_world_size() // 2)
    return init_device_mesh(device_type(), shape, mesh_dim_names=("replicate", "shard"))


def fsdp2(
    model: nn.Module,
    h: Hyperparameters,
    mesh: Callable[[], DeviceMesh] = flat_mesh,
    **options: Any,
) -> Run:
    shard_model(model, mesh=mesh(), **options)
    return Attached(model, h)


@dataclass(frozen=True)
class Layout:
    world_size: int
    start: Callable[..., Run]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, h: Hyperparameters) -> Run:
        return self.start(model, h, **self.options)


LAYOUTS = {
    "unsharded x1": Layout(1, Attached),
    "unsharded x2": Layout(2, Attached),
    "ZeRO-3 x1": Layout(1, Zero3),
    "ZeRO-3 x2": Layout(2, Zero3),
    "ZeRO-3 x2, CPU offload": Layout(2, Zero3, {"zero": {"offload_param": {"device": "cpu"}}}),
    "FSDP2 x2": Layout(2, fsdp2),
    "FSDP2 x4 (HSDP 2x2)": Layout(4, fsdp2, {"mesh": hybrid_mesh}),
}


@contextmanager
def on_layouts(
    worker: str,
    new_folder: Callable[[str], Path],
    keys: Iterable[Any],
    layouts: Iterable[str] = tuple(LAYOUTS),
) -> Iterator[Mapping[str, list[Mapping[Any, Any]]]]:
    """Give out what ``run_case(layout, key)`` of a worker returns, by layout, rank and key.

    A case runs when its result is looked at; layouts of a world size share their ranks.
    """
    names, keys = tuple(layouts), tuple(keys)
    sizes = sorted({LAYOUTS[name].world_size for name in names})
    groups = {n: RankGroup(worker, n, new_folder(f"{worker}{n}")) for n in sizes}

    def of_layout(name: str) -> list[Mapping[Any, Any]]:
        world_size = LAYOUTS[name].world_size
        found = Lazy(keys, lambda key: groups[world_size].call("run_case", name, key))
        return [Lazy(keys, lambda key, r=rank: found[key][r]) for rank in range(world_size)]

    with ExitStack() as stack:
        for group in groups.values():
            stack.callback(group.close)
        yield Lazy(names, of_layout)
