"""Trains on a CPU that pretends to have streams; returns the accesses that nothing ordered."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import cpu_accelerator
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard import (
    _fsdp_collectives,
    _fsdp_param,
    _fsdp_param_group,
    _fsdp_state,
)

from addax_ds.sharding.zero3 import Zero3Sharding
from tests.support.cases import mean_loss
from tests.support.layouts import Run, Zero3, flat_mesh, fsdp2, hybrid_mesh
from tests.support.models import tiny_opt, token_batches
from tests.support.reference import Hyperparameters
from tests.support.streams import Event, Order, Stream, Work

ACCELERATOR = cpu_accelerator.CPU_Accelerator
STEPS = 5  # DeepSpeed follows its recorded traces from the third one on
SMALL = {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000}
NONE_KEPT = {"stage3_param_persistence_threshold": 0}


@dataclass(frozen=True)
class Case:
    start: Callable[..., Run]
    options: dict[str, Any] = field(default_factory=dict)
    alpha: float = 1e-3
    micro_batches: int = 1
    max_grad_norm: float = 0.0
    offloaded: bool = False
    drop: Callable[[pytest.MonkeyPatch, Run], None] | None = None  # takes a wait away


def no_waits_for_compute(patch: pytest.MonkeyPatch, run: Run) -> None:
    for name in ("_order_gathers", "_keep_pace"):
        patch.setattr(Zero3Sharding, name, lambda self: None)


def no_wait_before_copies(patch: pytest.MonkeyPatch, run: Run) -> None:
    with torch.no_grad():
        run.model(input_ids=torch.zeros(1, 2, dtype=torch.long))  # makes FSDP2's streams
    context = run.model._get_fsdp_state()._comm_ctx
    for name in ("all_gather_copy_in_stream", "all_gather_stream"):
        patch.setattr(getattr(context, name), "wait_stream", lambda other: None)


def no_wait_for_gradients(patch: pytest.MonkeyPatch, run: Run) -> None:
    copied = Tensor.to

    def without(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
        if "non_blocking" in more:
            more["non_blocking"] = True
        return copied(tensor, *args, **more)

    patch.setattr(Tensor, "to", without)


OFFLOAD = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
CASES = {
    "ZeRO-3": Case(Zero3),
    "ZeRO-3, MeZO, nothing persistent": Case(Zero3, {"zero": NONE_KEPT}, alpha=1.0),
    "ZeRO-3, small buckets": Case(
        Zero3, {"zero": {**SMALL, **NONE_KEPT, "stage3_max_reuse_distance": 0}}
    ),
    "ZeRO-3, two micro-batches, clipped": Case(Zero3, micro_batches=2, max_grad_norm=0.1),
    "ZeRO-3 without a wait": Case(
        Zero3, {"zero": {**SMALL, **NONE_KEPT}}, alpha=1.0, drop=no_waits_for_compute
    ),
    "ZeRO-3, MeZO, small buckets": Case(Zero3, {"zero": {**SMALL, **NONE_KEPT}}, alpha=1.0),
    "FSDP2": Case(fsdp2),
    "FSDP2, MeZO": Case(fsdp2, alpha=1.0),
    "FSDP2, two micro-batches, clipped": Case(fsdp2, micro_batches=2, max_grad_norm=0.1),
    "HSDP": Case(fsdp2, {"mesh": hybrid_mesh}),
    "ZeRO-3, offload": Case(
        Zero3, {"zero": {**SMALL, "offload_param": {"device": "cpu"}}}, offloaded=True
    ),
    "FSDP2, offload": Case(fsdp2, OFFLOAD, offloaded=True),
    "FSDP2, offload, MeZO": Case(fsdp2, OFFLOAD, alpha=1.0, offloaded=True),
    "FSDP2, offload, without a wait": Case(
        fsdp2, OFFLOAD, offloaded=True, drop=no_wait_for_gradients
    ),
    "FSDP2 without a wait": Case(fsdp2, drop=no_wait_before_copies),
}


def pretend_deepspeed(order: Order, patch: pytest.MonkeyPatch) -> None:
    """Give DeepSpeed an accelerator with streams."""
    new_stream, new_event = partial(Stream, order), partial(Event, order)

    def synchronize(*_: Any) -> None:
        for stream in order.streams:
            order.wait(stream.clock)

    for name, value in {
        **dict.fromkeys(
            ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"),
            lambda self: False,
        ),
        "Stream": property(lambda self: new_stream),
        "Event": property(lambda self: new_event),
        "stream": lambda self, stream: order.on(stream),
        "current_stream": lambda self, device=None: order.current[-1],
        "default_stream": lambda self, device=None: order.main,
        "synchronize": lambda self, device=None: synchronize(),
        "device_count": lambda self: dist.get_world_size(),
    }.items():
        patch.setattr(ACCELERATOR, name, value)
    gather, reduce = deepspeed.comm.allgather_fn, deepspeed.comm.reduce_scatter_fn

    def noted_gather(output: Tensor, own: Tensor, *args: Any, async_op: bool = False, **more: Any):
        run = partial(gather, output, own, *args, async_op=async_op, **more)
        work = Work(order, order.collective(run, own, output))
        return work if async_op else order.current[-1].clock.join(order.nccl.clock)

    def noted_reduce(output: Tensor, whole: Tensor, *args: Any, **more: Any) -> Any:
        result = order.collective(partial(reduce, output, whole, *args, **more), whole, output)
        order.current[-1].clock.join(order.nccl.clock)
        return result

    patch.setattr(deepspeed.comm, "allgather_fn", noted_gather)
    patch.setattr(deepspeed.comm, "reduce_scatter_fn", noted_reduce)
    # Gathers of several parameters copy their shards into one tensor.
    cat = torch.cat

    def noted_cat(tensors: Any, *args: Any, **more: Any) -> Tensor:
        order.launch()
        for tensor in tensors:
            order.access(tensor, "copy")
        return cat(tensors, *args, **more)

    patch.setattr(torch, "cat", noted_cat)
    handle = partition_parameters.NoGatherCoalescedHandle.__init__

    def noted_handle(self: Any, params: Any) -> None:
        for parameter in params:
            order.launch()
            order.access(parameter.ds_tensor, "copy")
        handle(self, params)

    patch.setattr(partition_parameters.NoGatherCoalescedHandle, "__init__", noted_handle)


def pretend_fsdp2(order: Order, patch: pytest.MonkeyPatch) -> None:
    """Give FSDP2 a device with streams."""

    class Device:
        Stream = staticmethod(lambda *_, **__: Stream(order))
        Event = staticmethod(lambda *_, **__: Event(order))
        current_stream = staticmethod(lambda device=None: order.current[-1])
        stream = staticmethod(order.on)

    for module in (_fsdp_collectives, _fsdp_param, _fsdp_param_group, _fsdp_state):
        if hasattr(module, "_get_device_handle"):
            patch.setattr(module, "_get_device_handle", lambda kind: Device)
    inputs = _fsdp_param.FSDPParam.all_gather_inputs.fget

    def noted_inputs(self: Any) -> Any:
        order.launch()
        order.access(vars(self)["_sharded_param_data"], "copy")
        return inputs(self)

    patch.setattr(_fsdp_param.FSDPParam, "all_gather_inputs", property(noted_inputs))

    def noted(run: Callable[..., Any], *args: Any, **more: Any) -> Any:
        tensors = [t for t in (*args, *more.values()) if isinstance(t, Tensor)]
        result = order.collective(partial(run, *args, **more), tensors[-1], tensors[0])
        order.current[-1].clock.join(order.nccl.clock)
        return result

    for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
        patch.setattr(dist, name, partial(noted, getattr(dist, name)))


def run_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    hyperparameters = Hyperparameters(
        lr=1e-2, alpha=case.alpha, max_grad_norm=case.max_grad_norm, zo_eps=1e-3
    )
    order = Order()
    with pytest.MonkeyPatch.context() as patch:
        order.install(patch)
        (pretend_deepspeed if case.start is Zero3 else pretend_fsdp2)(order, patch)
        options = {"mesh": flat_mesh, **case.options} if case.start is fsdp2 else case.options
        model = tiny_opt(dtype=torch.bfloat16, unused=True).train()
        run = case.start(model, hyperparameters, **options)
        if case.offloaded:
            order.offload(patch)
            order.brings_gradients = case.start is Zero3  # FSDP2 has brought them by then
        if case.drop:
            case.drop(patch, run)

        def compute(*_: Any) -> None:
            order.launch()

        for module in model.modules():
            module.register_forward_hook(compute)
        sharding = run.optimizer.sharding
        order.watched = {shard.data.data_ptr(): shard.name for shard in sharding.shards()}
        waits = [train(run, order, case, *pair) for pair in token_batches(STEPS)]
        run.close()
    return {
        "races": dict(order.races),
        "accesses": dict(order.accesses),
        "waits": waits[-1],
        "lead": order.lead,
    }


def train(run: Run, order: Order, case: Case, *batches: Tensor) -> dict[str, dict[str, int]]:
    """Take a step; return by whom the host was made to wait, in the passes and in the whole."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    zeroth, first = (
        [partial(mean_loss, run.model, part) for part in whole.chunk(world_size)[rank].chunk(n)]
        for whole, n in zip(batches, [case.micro_batches] * 2, strict=True)
    )
    order.host_waits.clear()
    loss = run.optimizer.measure(zeroth, first if case.alpha < 1 else None)
    passes = dict(order.host_waits)
    if loss is not None:
        run.backward(loss)
    run.step()
    return {"measure": passes, "step": dict(order.host_waits)}


def set_up() -> None:
    deepspeed.init_distributed("gloo")
