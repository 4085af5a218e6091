"""What the zeroth-order passes see under FSDP2, and what they leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import addax_ds
from tests.support.layouts import Run, fsdp2, hybrid_mesh
from tests.support.models import tiny_opt, token_batches
from tests.support.passes import measured_g0
from tests.support.reference import Hyperparameters
from tests.workers.parity import digest

H = Hyperparameters(lr=0.1, alpha=0.5, zo_eps=1e-2, seed=5)
BF16, FP32 = torch.bfloat16, torch.float32
OFFLOAD = CPUOffloadPolicy(pin_memory=False)

CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "mezo": {"alpha": 1.0},
    "fp32": {"model": {"dtype": FP32}},
    "vocabulary-5001": {"model": {"vocabulary": 5001}},
    "untied": {"model": {"tied": False}},
    "frozen": {"model": {"frozen": True}},
    "unused": {"model": {"unused": True}},
    "dropout": {"model": {"dropout": 0.3}},
    "resharded-after-forward": {"shard": {"reshard_after_forward": True}},
    "whole-after-forward": {"shard": {"reshard_after_forward": False}},
    "offload": {"shard": {"offload_policy": OFFLOAD}},
    # FSDP2 then casts the shards of a layer with one foreach copy, a path of its own.
    "bf16-compute": {
        "model": {"dtype": FP32},
        "shard": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)},
        "seen_as": BF16,
    },
    "bf16-compute-offload": {
        "model": {"dtype": FP32},
        "shard": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16), "offload_policy": OFFLOAD},
        "seen_as": BF16,
    },
}
AGAINST_UNINTERRUPTED = ("bf16", "dropout", "offload", "whole-after-forward", "hsdp")
HYBRID: dict[str, dict[str, Any]] = {
    "hsdp": {"shard": {"mesh": hybrid_mesh}},
    "hsdp-bf16-compute": {
        "model": {"dtype": FP32},
        "shard": {"mesh": hybrid_mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=BF16)},
        "seen_as": BF16,
    },
    "four-shards": {"model": {"unused": True}},  # rank 3 holds none of the 5 elements of its bias
}


@contextmanager
def copies_between_devices() -> Iterator[None]:
    """Let ``to(device)`` copy, as it does where shards and computation have two devices."""
    original = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = original(self, *args, **kwargs)
        named = kwargs.get("device", args[0] if args else None)
        is_device = isinstance(named, str | torch.device)
        return result.clone() if result is self and is_device else result

    Tensor.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.to = original  # type: ignore[method-assign]


def digests(run: Run) -> dict[str, str]:
    """Of the stored shards."""
    return {shard.name: digest(shard.data) for shard in run.optimizer.sharding.shards()}


def local_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss.float()


@torch.no_grad()
def unperturbed_loss(model: nn.Module, x: Tensor) -> float:
    model.eval()
    loss = local_loss(model, x).item()
    model.train()
    return loss


def plain_loss(
    case: dict[str, Any], weights: dict[str, Tensor], step: int, sign: int, x: Tensor
) -> float:
    """Loss of an unsharded model at theta + sign * eps z."""
    options = {"dtype": BF16, **case.get("model", {})}
    model = tiny_opt(**options).eval()
    for n, p in model.named_parameters():
        p.data.copy_(weights[n])
        if p.requires_grad:
            z = addax_ds.gaussian(H.seed, step, n, 0, p.numel()).view(p.shape)
            p.data.copy_(weights[n].float() + sign * H.zo_eps * z)
    with torch.no_grad():
        return local_loss(model.to(case.get("seen_as", options["dtype"])), x).item()


def raises(run: Run, x: Tensor, where: str) -> bool:
    """Raise in the middle of a zeroth-order pass, or when the model has run."""
    module = run.model.model.decoder.layers[1].fc1 if where == "forward" else run.model
    hook = module.register_forward_hook(lambda *_: 1 / 0)
    try:
        run.optimizer.measure(lambda: local_loss(run.model, x), None)
    except ZeroDivisionError:
        return True
    finally:
        hook.remove()
    return False


def examine(case: dict[str, Any], interrupted: bool) -> dict[str, Any]:
    """Take two steps; with ``interrupted``, passes of the second one also raise."""
    model = tiny_opt(**{"dtype": BF16, **case.get("model", {})}).train()
    h = replace(H, alpha=case.get("alpha", H.alpha))
    run = fsdp2(model, h, **case.get("shard", {}))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"seen": [], "plain": [], "g0": [], "unchanged": [], "clean": []}
    found["raised"] = []
    found["end"] = run.weights()
    for step, batch in enumerate(token_batches(2)):
        x, short = (rows.chunk(world_size)[rank] for rows in batch)
        weights, before = found["end"], digests(run)
        seen: list[float] = []

        def closure(x=x, seen=seen) -> Tensor:
            loss = local_loss(model, x)
            seen.append(loss.item())
            return loss

        if interrupted and step > 0:
            found["raised"] += [raises(run, x, "forward"), raises(run, x, "end")]
        found["g0"].append(measured_g0(run.optimizer, closure))
        found["unchanged"].append(digests(run) == before)
        found["training"] = all(module.training for module in model.modules())
        found["seen"].append(seen)
        at = partial(plain_loss, case, weights, step, x=x)
        found["plain"].append([at(sign=1), at(sign=-1)])
        found["clean"].append((unperturbed_loss(model, x), at(sign=0)))
        if h.alpha < 1:
            torch.manual_seed(rank)  # for dropout
            run.backward(local_loss(model, short))
        run.step()
        found["end"] = run.weights()
        updated = plain_loss(case, found["end"], step, 0, x)
        found["clean"].append((unperturbed_loss(model, x), updated))
    found["moved"] = {n for n, w in found["end"].items() if not torch.equal(w, weights[n])}
    run.close()
    return found


def set_up() -> None:
    dist.init_process_group("gloo")


def run_case(name: str) -> dict[str, Any]:
    case = {**CASES, **HYBRID}[name]
    with copies_between_devices():
        found = examine(case, interrupted=True)
        if name in AGAINST_UNINTERRUPTED:
            found["uninterrupted_end"] = examine(case, interrupted=False)["end"]
    return found
