"""What the zeroth-order passes see under ZeRO-3, and what they leave behind."""

import gc
import hashlib
import weakref
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor, nn

import addax_ds
from tests.support.models import tiny_opt, token_batches
from tests.support.passes import measured_g0

EPS = 1e-2
SEED = 5

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "persistence-0": {"zero": {"stage3_param_persistence_threshold": 0}},
    "all-persistent": {"zero": {"stage3_param_persistence_threshold": 10**9}},
    "offload": {"zero": {"offload_param": {"device": "cpu"}}},
    "untied": {"model": {"tied": False}},
    "frozen": {"model": {"frozen": True}},
    "frozen-persistence-0": {
        "model": {"frozen": True},
        "zero": {"stage3_param_persistence_threshold": 0},
    },
    "dropout": {"model": {"dropout": 0.3}},
    "fp32": {"model": {"dtype": torch.float32}},
    "bypassed": {"bypass": True, "zero": {"stage3_param_persistence_threshold": 0}},
}


class Layers(nn.ModuleList):
    """Decoder layers whose modules the model may run without their own call, and its hooks."""

    bypassed = False

    def __iter__(self) -> Any:
        layers = super().__iter__()
        return (layer.forward for layer in layers) if self.bypassed else layers


def config(zero: dict, dtype: torch.dtype) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {
            "type": "Addax",
            "params": {"lr": 0.1, "alpha": 1.0, "zo_eps": EPS, "seed": SEED},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100_000,
            "stage3_prefetch_bucket_size": 100_000,
            **zero,
        },
    }


def digests(model: nn.Module) -> dict[str, str]:
    """Of the stored shards, padding included."""
    return {
        n: hashlib.sha256(p.ds_tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for n, p in model.named_parameters()
    }


def gathered(model: nn.Module) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {n: p.detach().clone() for n, p in model.named_parameters()}


def local_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss.float()


def explicit_losses(options: dict, weights: dict[str, Tensor], step: int, x: Tensor) -> list[float]:
    """Losses of a plain model whose weights are set to theta +- eps z."""
    losses = []
    for sign in (1, -1):
        model = tiny_opt(**options).eval()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(weights[n])
                if p.requires_grad:
                    z = addax_ds.gaussian(SEED, step, n, 0, p.numel()).view(p.shape)
                    p.copy_(weights[n].float() + sign * EPS * z)
            losses.append(local_loss(model, x).item())
    return losses


class CopyWatch:
    """Follows the perturbed copies of partitions: how many there were, bytes as modules run."""

    def __init__(self, engine: Any, sharding: Any) -> None:
        self.in_modules = 0
        self._copies: list[weakref.ref[Tensor]] = []
        self._perturb = sharding._perturbed_partitions
        sharding._perturbed_partitions = self._watched
        for module in engine.module.modules():
            module.register_forward_hook(self._look)

    def _watched(self, parameters: Any) -> list[tuple[Any, Tensor]]:
        copies = self._perturb(parameters)
        self._copies += [weakref.ref(copy) for _, copy in copies]
        return copies

    def _look(self, *_: Any) -> None:
        self.in_modules = max(self.in_modules, self.alive())

    @property
    def made(self) -> int:
        return len(self._copies)

    def alive(self) -> int:
        alive = [copy for copy in (ref() for ref in self._copies) if copy is not None]
        return sum(copy.numel() * copy.element_size() for copy in alive)


def run_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    options = {"dtype": torch.bfloat16, **case.get("model", {})}
    model = tiny_opt(**options).train()
    decoder = model.model.decoder
    decoder.layers = Layers(decoder.layers)
    setup = config(case.get("zero", {}), options["dtype"])
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=setup)
    rank, world_size = comm.get_rank(), comm.get_world_size()
    watch = CopyWatch(engine, optimizer.sharding)
    found: dict[str, Any] = {"seen": [], "explicit": [], "g0": [], "unchanged": []}
    for step, (x, _) in enumerate(token_batches(3)):
        x = x.chunk(world_size)[rank]
        weights, before = gathered(model), digests(model)
        seen: list[float] = []
        decoder.layers.bypassed = case.get("bypass", False) and step > 0  # blocks are expected then

        def closure(x=x, seen=seen) -> Tensor:
            loss = local_loss(engine, x)
            seen.append(loss.item())
            return loss

        if step == 1:
            found["raised"] = raises_inside(engine, optimizer, closure)
            gc.collect()  # what was on its way in the abandoned pass hangs in cycles
        seen.clear()
        found["g0"].append(measured_g0(optimizer, closure))
        found["unchanged"].append(digests(model) == before)
        found["training"] = all(module.training for module in model.modules())
        found["seen"].append(seen)
        found["explicit"].append(explicit_losses(options, weights, step, x))
        engine.eval()  # persistent parameters are gathered again, unperturbed
        with torch.no_grad():
            plain = tiny_opt(**options).eval()
            plain.load_state_dict(weights, strict=False)
            found["clean"] = (local_loss(engine, x).item(), local_loss(plain, x).item())
        engine.train()
        engine.step()
    shards = [p.ds_tensor for p in model.parameters()]
    found["copies"] = (watch.made, watch.in_modules, watch.alive())
    found["largest"] = max(shard.numel() * shard.element_size() for shard in shards)
    found["stored"] = sum(shard.numel() * shard.element_size() for shard in shards)
    found["moved"] = any(not torch.equal(w, weights[n]) for n, w in gathered(model).items())
    engine.destroy()
    return found


def raises_inside(engine: Any, optimizer: Any, closure: Any) -> bool:
    """Raise in the middle of a forward pass, while parameters are gathered and in flight."""
    layer = engine.module.model.decoder.layers[1].fc1
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    try:
        optimizer.measure(closure, None)
    except ZeroDivisionError:
        return True
    finally:
        hook.remove()
    return False


def set_up() -> None:
    deepspeed.init_distributed()
