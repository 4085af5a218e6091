"""Trains under what remembers something of the weights, and without it.

Each kind has a twin that does the same arithmetic and remembers nothing from one pass to the next.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

import addax_ds
from tests.support.layouts import LAYOUTS
from tests.support.reference import Hyperparameters

STEPS = 3
SIZE = 16
H = Hyperparameters(lr=0.05, alpha=0.5, zo_eps=5e-2, seed=3)
Context = Callable[[], AbstractContextManager[Any]]


class Layer(nn.Module):
    """Multiplies by tanh of its weight, and stores nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE) / 4)

    def used(self) -> Tensor:
        return self.weight.tanh()

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.used())


class InAttribute(Layer):
    """Stores what it computes in eval mode, until it is trained on: LeViT, EfficientFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: Tensor | None = None

    def used(self) -> Tensor:
        if self.training:
            return super().used()
        if self.stored is None:
            self.stored = super().used()
        return self.stored

    def train(self, mode: bool = True) -> "InAttribute":
        self.stored = None
        return super().train(mode)


class InDict(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, Tensor] = {}

    def used(self) -> Tensor:
        if self.training:
            return super().used()
        if "cpu" not in self.stored:
            self.stored["cpu"] = super().used()
        return self.stored["cpu"]


class InBuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stored", torch.zeros(SIZE, SIZE))
        self.is_stored = False

    def used(self) -> Tensor:
        if self.training:
            return super().used()
        if not self.is_stored:
            self.stored.copy_(super().used())
            self.is_stored = True
        return self.stored


class Merging(Layer):
    """Merges an adapter into its weight when it goes to eval mode, as loralib does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, SIZE) / 4)
        self.b = nn.Parameter(torch.randn(SIZE, 2) / 4)
        self.is_merged = False

    def used(self) -> Tensor:
        return self.weight if self.is_merged else self.weight + self.b @ self.a


class MergingInEval(Merging):
    def train(self, mode: bool = True) -> "MergingInEval":
        if self.is_merged is mode:
            self.weight.data += (self.b @ self.a).data * (-1 if mode else 1)
            self.is_merged = not mode
        return super().train(mode)


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def parametrized() -> nn.Module:
    layer = nn.Linear(SIZE, SIZE)
    return parametrize.register_parametrization(layer, "weight", Tanh())


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = layer()
        self.layers = nn.ModuleList([layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def warmed(model: nn.Module, call: Any) -> Any:
    """Call the model compiled in both modes, before it is trained."""
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode)
            call(torch.ones(4, SIZE))
    return call


def compiled(model: nn.Module) -> Any:
    return warmed(model, torch.compile(model, backend="eager"))


def compiled_in_place(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return warmed(model, model)


def compiled_forwards(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = torch.compile(module.forward, backend="eager")
    return warmed(model, model)


class Compiled(Layer):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Kind(NamedTuple):
    """What remembers, and what does not: a layer, and a context around the run or each pass."""

    layer: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    context: Context = nullcontext
    wrap: Callable[[Any], Any] = lambda model: model


LINEAR = partial(nn.Linear, SIZE, SIZE)
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
KINDS = {
    "autocast": Kind(LINEAR, LINEAR, AUTOCAST),
    "parametrizations": Kind(parametrized, parametrized, parametrize.cached),
    "attribute": Kind(InAttribute, Layer),
    "dict": Kind(InDict, Layer),
    "buffer": Kind(InBuffer, Layer),
    "merged": Kind(MergingInEval, Merging),
    "compiled": Kind(LINEAR, LINEAR, wrap=compiled),
    "compiled forwards": Kind(LINEAR, LINEAR, wrap=compiled_forwards),
    "compiled methods": Kind(Compiled, Layer, wrap=lambda model: warmed(model, model)),
    "compiled in place": Kind(LINEAR, LINEAR, wrap=compiled_in_place),
}


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the two batches of a step."""
    generator = torch.Generator().manual_seed(step)
    long, short = torch.randn(2, 4, SIZE, generator=generator)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return long.chunk(world_size)[rank], short.chunk(world_size)[rank]


def train(
    layout: str,
    layer: Callable[[], nn.Module],
    outer: Context = nullcontext,
    inner: Context = nullcontext,
    wrap: Callable[[Any], Any] = lambda model: model,
) -> dict[str, Any]:
    run = LAYOUTS[layout].run(Model(layer).train(), H)
    model = wrap(run.model)
    seen: list[float] = []

    def loss_of(x: Tensor) -> Tensor:
        with inner():
            loss = model(x)
        seen.append(loss.item())
        return loss

    with outer():
        for long, short in map(rows_of, range(STEPS)):
            loss = run.optimizer.measure(partial(loss_of, long), partial(loss_of, short))
            run.backward(loss)
            run.step()
    result = {"seen": seen, "weights": run.weights()}
    run.close()
    return result


@torch.no_grad()
def explicit_losses(layer: Callable[[], nn.Module], inner: Context) -> list[float]:
    """Losses of the first two passes, of plain models at theta + eps z and theta - eps z."""
    losses = []
    for sign in (1, -1):
        model = Model(layer).eval()
        for name, p in model.named_parameters():
            if p.requires_grad:
                z = addax_ds.gaussian(H.seed, 0, name, 0, p.numel()).view(p.shape)
                p.add_(z, alpha=sign * H.zo_eps)
        with inner():
            losses.append(model(rows_of(0)[0]).item())
    return losses


def run_case(layout: str, kind: str) -> dict[str, Any]:
    layer, twin, context, wrap = KINDS[kind]
    return {
        "remembering": train(layout, layer, outer=context, wrap=wrap),
        "twin": train(layout, twin, inner=context),
        "explicit": explicit_losses(twin, context),
    }


def set_up() -> None:
    dist.init_process_group("gloo")
