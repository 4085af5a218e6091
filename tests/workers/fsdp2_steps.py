"""Steps under FSDP2: weights, order of collectives, gradients, live gradients at the peak."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from addax_ds import Addax, attach
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.sharding.modules import blocks
from studies.collectives import CollectiveCounter
from tests.support.cases import CASES, batches, mean_loss
from tests.support.layouts import Attached, Layout, Run, flat_mesh
from tests.support.models import tiny_opt
from tests.support.reference import Hyperparameters
from tests.workers.attached_cases import LAYOUTS, train
from tests.workers.fsdp2_passes import copies_between_devices

CASES_BY_LAYOUT = {
    "fsdp2": ("checkpointing", "untied", "frozen", "unused", "weight-decay", "shared-by-layers"),
    "fsdp2-offload": ("offload",),
}


def my_rows(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


# ---- what a forward-only pass must not disturb -----------------------------------------------


def order(alpha: float) -> dict[str, Any]:
    """Collectives of each part of the second step, and its gradients beside a plain model's."""
    model = tiny_opt()
    shard_model(model, mesh=flat_mesh())
    gradients: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        note = partial(_note, gradients, name)
        parameter.register_post_accumulate_grad_hook(note)  # runs before the one that updates
    run = Attached(model, replace(Hyperparameters(), alpha=alpha))
    for long, short in batches()[:2]:
        weights = run.weights()
        gradients.clear()
        with CollectiveCounter() as counter:
            run.optimizer.measure(partial(mean_loss, model, my_rows(long)), None)
            passes = len(counter.calls)
            mean_loss(model, my_rows(short)).backward()
            run.step()
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    run.close()
    return {
        "passes": counter.calls[:passes],
        "first_order": counter.calls[passes:],
        "gradients": whole,
        "plain_gradients": plain_gradients(weights, short),
    }


def _note(gradients: dict[str, Any], name: str, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    assert name not in gradients
    gradients[name] = parameter.grad.clone()


def plain_gradients(weights: dict[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
    plain = tiny_opt()
    plain.load_state_dict(weights, strict=False)
    mean_loss(plain, batch).backward()
    return {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


def others(max_grad_norm: float) -> dict[str, Tensor]:
    """Gradients of what another optimizer trains, embeddings and last norm, after a step."""
    model = tiny_opt()
    shard_model(model, mesh=flat_mesh())
    layers = model.model.decoder.layers
    optimizer = Addax(layers.parameters(), lr=0.1, alpha=0.5, max_grad_norm=max_grad_norm)
    attach(optimizer, model)
    own = set(layers.parameters())
    (long, short), *_ = batches()
    loss = optimizer.measure(
        partial(mean_loss, model, my_rows(long)), partial(mean_loss, model, my_rows(short))
    )
    assert loss is not None
    loss.backward()
    optimizer.step()
    rest = [(n, p) for n, p in model.named_parameters() if p not in own and p.grad is not None]
    return {name: p.grad.full_tensor() for name, p in rest}  # type: ignore[union-attr]


# ---- sharded without `shard_model` -----------------------------------------------------------


def listed(model: Any, h: Hyperparameters) -> Run:
    """Shard the last norm together with the head, as Transformers does."""
    mesh = flat_mesh()
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    tail = [model.model.decoder.final_layer_norm, model.lm_head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return Attached(model, h)


def replaced(model: nn.Module, h: Hyperparameters) -> Run:
    """Put other parameters in place after sharding, as Transformers does with loaded weights."""
    shard_model(model, mesh=flat_mesh())
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            assert isinstance(old, DTensor)
            loaded = distribute_tensor(old.full_tensor().detach(), old.device_mesh, old.placements)
            setattr(module, name, nn.Parameter(loaded))
            old.detach().zero_()
    return Attached(model, h)


SHARDED_BY_HAND = {"modules-in-a-list": listed, "parameters-replaced": replaced}
"""Ways to shard the model of the case "untied"."""


# ---- memory ------------------------------------------------------------------------------------


class LiveGradients:
    """Bytes of the reduced gradients that are alive whenever another one is reduced."""

    def __init__(self, model: nn.Module) -> None:
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._measure)

    def _measure(self, parameter: Any) -> None:
        storage = parameter.grad.to_local().untyped_storage()
        self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self._storages = {ref: n for ref, n in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))


def memory(with_addax: bool) -> dict[str, Any]:
    """Live sharded gradients of a backward, counted here and by torch's own tracker."""
    model = tiny_opt(tied=False)
    shard_model(model, mesh=flat_mesh())
    live = LiveGradients(model)
    run: Run | None = Attached(model, Hyperparameters(alpha=0.0)) if with_addax else None
    long, short = batches()[0]
    with torch.no_grad():
        mean_loss(model, my_rows(long))
    tracker = FSDPMemTracker(model)
    with tracker:
        mean_loss(model, my_rows(short)).backward()
    if run is not None:
        run.step()
    groups = [sum(shard_bytes(p) for p in la.parameters()) for la in model.model.decoder.layers]
    outside = sum(shard_bytes(p) for p in model.parameters()) - sum(groups)
    return {
        "peak": live.peak,
        "groups": [*groups, outside],
        "tracked": tracked_gradient_bytes(tracker),
    }


def shard_bytes(parameter: Any) -> int:
    """Of the shard with its padding, which is reduced too."""
    rows = -(-parameter.shape[0] // dist.get_world_size())
    return rows * parameter.shape[1:].numel() * parameter.element_size()


def tracked_gradient_bytes(tracker: FSDPMemTracker) -> dict[str, int]:
    """By kind, the most that the tracker saw at once in any of its snapshots."""
    most: dict[str, int] = {}
    for statistics in tracker.memory_tracking.values():
        for snapshots in statistics.snapshots.values():
            for snapshot in snapshots:
                for kind, size in snapshot[torch.device("cpu")].items():
                    name = getattr(kind, "value", kind)
                    most[name] = max(most.get(name, 0), size)
    return most


def set_up() -> None:
    dist.init_process_group("gloo")


def run_case(name: str) -> dict[Any, Any]:
    if name == "order":
        return {alpha: order(alpha) for alpha in (0.0, 0.001)}
    if name == "others":
        return {norm: others(norm) for norm in (0.0, 1e9)}
    if name == "memory":
        return {with_addax: memory(with_addax) for with_addax in (False, True)}
    if name in SHARDED_BY_HAND:
        return train(Layout(2, SHARDED_BY_HAND[name]), CASES["untied"])
    (layout,) = [layout for layout, names in CASES_BY_LAYOUT.items() if name in names]
    with copies_between_devices():
        return train(LAYOUTS[layout], CASES[name])
