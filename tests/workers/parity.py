"""Trains on a layout of this world size; returns what each step saw and left.

Live runs train a tiny OPT in fp32. Replayed runs train a model whose loss is linear in the weights:
its gradient is a recorded one, with so few bits that no order of summation rounds it, and its
zeroth-order losses are recorded too. Ranks get different gradients and losses, whose mean alone is
what was recorded.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.cases import STEPS, Case
from tests.support.layouts import LAYOUTS, Layout
from tests.support.reference import Hyperparameters
from tests.workers.attached_cases import train

METHODS = {
    "addax": Hyperparameters(weight_decay=0.1),
    "mezo": Hyperparameters(alpha=1.0, lr=1e-4),
    "ip-sgd": Hyperparameters(alpha=0.0),
    "addax, q = 2": Hyperparameters(weight_decay=0.1, zo_directions=2),
    "mezo, q = 4": Hyperparameters(alpha=1.0, lr=4e-4, zo_directions=4),
}
LIVE = {
    name: Case(
        hyperparameters=hyperparameters,
        steps=STEPS if hyperparameters.zo_directions == 1 else 3,
    )
    for name, hyperparameters in METHODS.items()
}
REPLAYED = {
    "addax": Hyperparameters(lr=0.05, alpha=0.01, zo_eps=2.0**-7, weight_decay=0.1),
    "mezo": Hyperparameters(lr=0.05, alpha=1.0, zo_eps=2.0**-7, weight_decay=0.1),
    "ip-sgd": Hyperparameters(lr=0.05, alpha=0.0, weight_decay=0.1),
}
REPLAYED["addax, q = 4"] = replace(REPLAYED["addax"], zo_directions=4)
REPLAYED_STEPS = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED = "bf16 with fp32 biases"


class Leaf(nn.Module):
    """Adds <recorded gradient, weights> to its input, and notes which weights it saw."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[:1]))
        self.recorded: dict[str, Tensor] = {}
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        for name, parameter in self.named_parameters(recurse=False):
            self.seen.append(digest(parameter))
            x = x + (parameter * self.recorded[name]).sum()
        return x


class Linear(nn.Module):
    """A loss linear in the weights: uneven and empty shards, a tied, a frozen, an unused one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = Leaf(101, 24)
        self.layers = nn.ModuleList([nn.Sequential(Leaf(24, 31), Leaf(1, 7)) for _ in range(3)])
        self.head = Leaf(101, 24)
        self.head.weight = self.embedding.weight
        self.unused = Leaf(5, 17)
        self.layers[1][0].weight.requires_grad_(False)
        self.to(dtype)

    def forward(self) -> Tensor:
        x = self.embedding(torch.zeros(()))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def leaves(self) -> Iterator[Leaf]:
        return (module for module in self.modules() if isinstance(module, Leaf))

    def replay(self, shapes: list[dict[str, torch.Size]], step: int) -> None:
        """Let the next backward give this rank's part of the step's recorded gradients."""
        generator = torch.Generator().manual_seed(step)
        for leaf, of_leaf in zip(self.leaves(), shapes, strict=True):
            for name, shape in of_leaf.items():
                draws = torch.randint(-8, 9, (3, *shape), generator=generator)
                leaf.recorded[name] = (part_of(draws) / 64).to(getattr(leaf, name).dtype)


def digest(tensor: Tensor) -> str:
    copy = tensor.detach().clone()  # FSDP2 resizes the storage, which numpy would forbid
    return hashlib.sha256(copy.view(torch.uint8).numpy().tobytes()).hexdigest()


def part_of(draws: Tensor) -> Tensor:
    """This rank's part, different on every rank, of what has ``draws[0]`` as mean over ranks."""
    mean, first, second = draws
    parts = {
        1: [mean],
        2: [mean + first, mean - first],
        4: [mean + first, mean + second, mean - first, mean - second],
    }
    return parts[dist.get_world_size()][dist.get_rank()]


def recorded_losses(step: int, passes: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    for draws in torch.randint(1, 200, (passes, 3), generator=generator):
        yield part_of(draws) / 1024


def replay(layout: Layout, dtype: str, h: Hyperparameters) -> dict[str, Any]:
    model = Linear(DTYPES.get(dtype, torch.bfloat16))
    if dtype == MIXED:
        for leaf in model.leaves():
            leaf.bias.data = leaf.bias.data.float()
    shapes = [{n: p.shape for n, p in leaf.named_parameters()} for leaf in model.leaves()]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = layout.run(model, h)
    g0 = []
    for step in range(REPLAYED_STEPS):
        model.replay(shapes, step)
        losses = recorded_losses(step, 2 * h.zo_directions)

        def zeroth_order(losses=losses) -> Tensor:
            run.model()
            return next(losses)

        g0.append(run.train(zeroth_order, run.model if h.alpha < 1 else None))
    seen = [leaf.seen for leaf in model.leaves()]
    result = {"g0": g0, "seen": seen, "start": start, "weights": run.weights()}
    run.close()
    return result


RUNS = [
    *(("live", method, "fp32") for method in LIVE),
    *(("replayed", method, dtype) for dtype in DTYPES for method in REPLAYED),
    ("replayed", "addax", MIXED),
]


def set_up() -> None:
    dist.init_process_group("gloo")


def run_case(layout: str, run: tuple[str, str, str]) -> dict[str, Any]:
    kind, method, dtype = run
    if kind == "live":
        return train(LAYOUTS[layout], LIVE[method])
    return replay(LAYOUTS[layout], dtype, REPLAYED[method])
