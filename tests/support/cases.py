"""Configurations that every back end trains, each held against the float64 loop."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import tiny_opt, token_batches
from tests.support.reference import Hyperparameters, float64_loop

STEPS = 10


@dataclass(frozen=True)
class Case:
    model: dict[str, Any] = field(default_factory=dict)
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    zero_optimization: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    steps: int = STEPS

    def build(self) -> nn.Module:
        model = tiny_opt(**self.model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()


FROZEN = {"frozen": True}

CASES = {
    "tied": Case(),
    "persistence-0": Case(zero_optimization={"stage3_param_persistence_threshold": 0}),
    "offload": Case(zero_optimization={"offload_param": {"device": "cpu"}}),
    "checkpointing": Case(gradient_checkpointing=True),
    "untied": Case(model={"tied": False}),
    "frozen": Case(model=FROZEN),
    "frozen-persistence-0": Case(
        model=FROZEN, zero_optimization={"stage3_param_persistence_threshold": 0}
    ),
    "unused": Case(model={"unused": True}),
    "shared-by-layers": Case(model={"shared": True}),
    "weight-decay": Case(hyperparameters=Hyperparameters(weight_decay=0.3)),
    "ip-sgd": Case(hyperparameters=Hyperparameters(alpha=0.0)),
    "mezo": Case(hyperparameters=Hyperparameters(alpha=1.0, lr=1e-4)),
}
"""Back ends other than ZeRO-3 ignore ``zero_optimization``."""


def batches() -> list[tuple[Tensor, Tensor]]:
    return token_batches(STEPS)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def float64_outcome(case: Case, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Trainable weights before and after the float64 loop, and each g0."""
    model = case.build().eval()
    start = trainable(model)
    g0 = float64_loop(model, data, case.hyperparameters)
    return {"start": start, "g0": g0, "end": trainable(model)}


def mean_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, labels=x).loss


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
