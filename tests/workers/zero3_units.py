"""First-order steps under ZeRO-3 of a model whose layers are called in different ways."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

import addax_ds  # noqa: F401  (registers the optimizer)
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
    "recomputed": {"checkpointing": {"use_reentrant": False}},
    "recomputed, reentrant": {"checkpointing": {"use_reentrant": True}},
    "frozen inputs": {"frozen": "embed"},
    "frozen matrices": {"frozen": "fc1"},
    "module by module": {"zero": {"stage3_max_live_parameters": 60_000}},
}


def make_model(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(7)
    config = OPTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        ffn_dim=4 * HIDDEN,
        num_attention_heads=4,
        vocab_size=1003,
        max_position_embeddings=66,
        word_embed_proj_dim=HIDDEN,
        dropout=0.0,
        activation_function="gelu",
        tie_word_embeddings=False,
    )
    model: Any = AutoModelForCausalLM.from_config(config).float().train()
    decoder = model.model.decoder
    decoder.layers = Layers(decoder.layers)
    decoder.layers.call = case.get("call")
    if "checkpointing" in case:
        model.gradient_checkpointing_enable(case["checkpointing"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.get("frozen", "none") not in name)
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def run_case(name: str) -> dict[str, Any]:
    case = CASES[name]
    model: Any = make_model(case)
    layers = model.model.decoder.layers
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Addax", "params": {"lr": LEARNING_RATE, "alpha": 0.0}},
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
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
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
    engine.destroy()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {
        "errors": {n: float((weights[n] - w).abs().max()) for n, w in _reference(case).items()},
        "moved": {n for n, p in make_model(case).named_parameters() if not p.equal(weights[n])},
        "trained": trained,
        "layers": whole[0],
        "left": left,
    }


def _reference(case: dict[str, Any]) -> dict[str, Tensor]:
    """Train the model by itself, in float64, whose layers are called as ever."""
    model = make_model({name: value for name, value in case.items() if name == "frozen"}).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, LEARNING_RATE)
    for _, tokens in token_batches(STEPS):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


def set_up() -> None:
    deepspeed.init_distributed()
