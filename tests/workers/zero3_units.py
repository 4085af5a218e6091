"""First-order steps under ZeRO-3 of a model whose layers are called in different ways."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    iter_params,
)
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

import addax_ds  # noqa: F401  (registers the optimizer)
from addax_ds.utils.errors import UserError
from tests.support.models import token_batches

LEARNING_RATE = 0.1
LAYERS, HIDDEN = 6, 64
STEPS = 4  # DeepSpeed follows its recorded order of modules from the third on

Call = Callable[..., Tensor]


def _by_keyword(layer: nn.Module, hidden_states: Tensor, **more: Any) -> Tensor:
    return layer(hidden_states=hidden_states, **more)


def _bypassed(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Run the modules of a layer without its own call, and its hooks."""
    return layer.forward(*args, **kwargs)


@dataclass
class Record:
    """A result of which DeepSpeed does not find the tensor."""

    states: Tensor


def _of_record(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    usual = layer.forward
    layer.forward = lambda *args, **kwargs: Record(usual(*args, **kwargs))
    try:
        return layer(*args, **kwargs).states
    finally:
        layer.forward = usual


class Layers(nn.ModuleList):
    """Decoder layers that their model calls in another way."""

    call: Call | None = None

    def __iter__(self) -> Iterator[Any]:
        layers = super().__iter__()
        return layers if self.call is None else (partial(self.call, layer) for layer in layers)


CASES: dict[str, dict[str, Any]] = {
    "as ever": {},
    "no prefetch": {"zero": {"stage3_prefetch_bucket_size": 0}},
    "by keyword": {"call": _by_keyword},
    "bypassed": {"call": _bypassed},
    "in two lists": {"twice": True},
    "recomputed": {"checkpointing": {"use_reentrant": False}},
    "recomputed, reentrant": {"checkpointing": {"use_reentrant": True}},
    "frozen inputs": {"frozen": "embed"},
    "frozen matrices": {"frozen": "fc1"},
    "frozen matrices, recomputed": {"frozen": "fc1", "checkpointing": {"use_reentrant": False}},
    "module by module": {"zero": {"stage3_max_live_parameters": 60_000}},
}
REFUSED = "records"
PREFETCHED: dict[str, dict[str, Any]] = {
    "few stay": {},
    "all stay": {"zero": {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9}},
    "large embedding": {"vocabulary": 5000, "zero": {"stage3_max_live_parameters": 10**9}},
    "large tied embedding": {
        "vocabulary": 5000,
        "tied": True,
        "zero": {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 10**9},
    },
}


def make_model(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(7)
    config = OPTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=4,
        vocab_size=case.get("vocabulary", 1003),
        max_position_embeddings=66,
        word_embed_proj_dim=HIDDEN,
        dropout=0.0,
        activation_function="gelu",
        tie_word_embeddings=case.get("tied", False),
    )
    model: Any = AutoModelForCausalLM.from_config(config).float().train()
    decoder = model.model.decoder
    decoder.layers = Layers(decoder.layers)
    decoder.layers.call = case.get("call")
    if case.get("twice"):
        decoder.same_layers = nn.ModuleList(decoder.layers._modules.values())
    if "checkpointing" in case:
        model.gradient_checkpointing_enable(case["checkpointing"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.get("frozen", "none") not in name)
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def make_engine(case: dict[str, Any], alpha: float = 0.0) -> tuple[Any, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Addax", "params": {"lr": LEARNING_RATE, "alpha": alpha}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": 1000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 200_000,
            "stage3_max_reuse_distance": 0,
            **case.get("zero", {}),
        },
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=make_model(case), config=config)
    return engine, optimizer


def run_case(name: str) -> dict[str, Any]:
    if name == REFUSED:
        return run_refused()
    return run_prefetched(name) if name in PREFETCHED else run_units(name)


def run_units(name: str) -> dict[str, Any]:
    case = CASES[name]
    engine, optimizer = make_engine(case)
    model = engine.module
    layers = model.model.decoder.layers
    rank, world_size = comm.get_rank(), comm.get_world_size()
    whole = [0]  # layers of which something is gathered, whenever a bucket is reduced

    def note() -> None:
        gathered = [
            any(p.ds_status is not ZeroParamStatus.NOT_AVAILABLE for p in layer.parameters())
            for layer in layers._modules.values()
        ]
        whole[0] = max(whole[0], sum(gathered))

    deliver = optimizer.sharding.deliver
    optimizer.sharding.deliver = lambda *args: (note(), deliver(*args))
    for _, tokens in token_batches(STEPS):
        part = tokens.chunk(world_size)[rank]
        engine.backward(optimizer.measure(None, partial(loss_of, engine, part)))
        engine.step()
    left = sum(p.ds_status is not ZeroParamStatus.NOT_AVAILABLE for p in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.sharding.detach()
    detached = loss_of(engine, tokens).item()
    engine.destroy()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reference = _reference(case)
    expected = {n: p.detach() for n, p in reference.named_parameters()}
    return {
        "errors": {n: float((weights[n] - w).abs().max()) for n, w in expected.items()},
        "moved": {n for n, p in make_model(case).named_parameters() if not p.equal(weights[n])},
        "trained": trained,
        "layers": whole[0],
        "left": left,
        "losses": (detached, loss_of(reference, tokens).item()),
    }


def run_refused() -> dict[str, Any]:
    engine, optimizer = make_engine({"call": _of_record})
    _, tokens = token_batches(1)[0]
    try:
        optimizer.measure(None, partial(loss_of, engine, tokens))
    except UserError as error:
        return {"message": str(error)}
    finally:
        engine.destroy()
    return {"message": "none"}


def run_prefetched(name: str) -> dict[str, Any]:
    """Return the elements of a step that a module had to ask for, and those of the model."""
    engine, optimizer = make_engine(PREFETCHED[name], alpha=0.1)
    asked = [0]
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def watched(coordinator: Any, current_submodule: nn.Module, forward: bool) -> None:
        leaf = z3_leaf_module(current_submodule)
        asked[0] += sum(
            p.ds_numel
            for p in iter_params(current_submodule, recurse=leaf)
            if p.ds_status is ZeroParamStatus.NOT_AVAILABLE
        )
        fetch(coordinator, current_submodule, forward)

    rank, world_size = comm.get_rank(), comm.get_world_size()
    with mock.patch.object(PartitionedParameterCoordinator, "fetch_sub_module", watched):
        for long, short in token_batches(STEPS):
            asked[0] = 0
            closures = [
                partial(loss_of, engine, tokens.chunk(world_size)[rank]) for tokens in (long, short)
            ]
            engine.backward(optimizer.measure(*closures))
            engine.step()
    elements = sum(p.ds_numel for p in engine.module.parameters())
    engine.destroy()
    return {"asked": asked[0], "elements": elements}


def _reference(case: dict[str, Any]) -> nn.Module:
    """Train the model by itself, in float64, whose layers are called as ever."""
    model = make_model({name: value for name, value in case.items() if name == "frozen"}).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LEARNING_RATE)
    for _, tokens in token_batches(STEPS):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
    return model


def set_up() -> None:
    deepspeed.init_distributed()
