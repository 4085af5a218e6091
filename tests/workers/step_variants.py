"""Accumulation, clipping, fp16 and numbers that are not finite, on a layout of this world size."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from addax_ds.optim.addax import unwrap
from tests.support.cases import Case, mean_loss
from tests.support.layouts import LAYOUTS, Layout, Run
from tests.support.models import token_batches
from tests.support.reference import Hyperparameters
from tests.workers.parity import Linear

ROWS = 8


@dataclass(frozen=True)
class Variant:
    """``dropout`` and ``dtype`` are of the model."""

    micro_batches: int = 1
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    dropout: float = 0.0
    steps: int = 6

    @property
    def case(self) -> Case:
        model = {"dropout": self.dropout}
        return Case(model=model, hyperparameters=self.hyperparameters)


CLIPPING = Hyperparameters(max_grad_norm=0.4, lr=0.05)
EXACT = {
    "accumulated": Variant(2),
    "mezo, accumulated": Variant(2, Hyperparameters(alpha=1.0, lr=1e-4)),
    "clipped": Variant(1, CLIPPING),
    "ip-sgd, clipped": Variant(1, Hyperparameters(alpha=0.0, max_grad_norm=0.4, lr=0.05)),
    "clipped, accumulated": Variant(2, CLIPPING),
}
"""Held against the float64 loop."""

DROPOUT = {
    "dropout": Variant(dropout=0.2, steps=2),
    "dropout, norm taken": Variant(1, Hyperparameters(max_grad_norm=1e9), 0.2, steps=2),
}
"""Equal, if the second forward draws the same masks."""


def global_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    return token_batches(steps, rows=ROWS)


def shares(batch: Tensor, micro_batches: int) -> list[Tensor]:
    """This rank's rows of each micro-batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = batch.chunk(world_size * micro_batches)
    return [parts[i * world_size + rank] for i in range(micro_batches)]


def closures(run: Run, batch: Tensor, micro_batches: int) -> list[Callable[[], Tensor]]:
    return [lambda x=x: mean_loss(run.model, x) for x in shares(batch, micro_batches)]


def finish(run: Run, loss: Tensor | None) -> None:
    if loss is not None:
        run.backward(loss)
    run.step()


def train(layout: Layout, variant: Variant) -> dict[str, Any]:
    torch.manual_seed(dist.get_rank())
    run = layout.run(variant.case.build(), variant.hyperparameters)
    addax = unwrap(run.optimizer)
    reports = []
    for long, short in global_batches(variant.steps):
        batches = (closures(run, batch, variant.micro_batches) for batch in (long, short))
        finish(run, run.optimizer.measure(*batches))
        reports.append(vars(addax.report))
    result = {"reports": reports, "weights": run.weights()}
    run.close()
    return result


def early_nan(layout: Layout, h: Hyperparameters) -> dict[str, Any]:
    """One step; the first of two first-order micro-batches of the last rank has a loss of NaN."""
    run = layout.run(Case().build(), h)
    before = run.weights()
    ((long, short),) = global_batches(1)
    first_order = closures(run, short, 2)
    if dist.get_rank() == dist.get_world_size() - 1:
        spoilt = first_order[0]
        first_order[0] = lambda: spoilt() * torch.nan
    finish(run, run.optimizer.measure(closures(run, long, 2), first_order))
    result = {
        "report": vars(unwrap(run.optimizer).report),
        "before": before,
        "after": run.weights(),
    }
    run.close()
    return result


# ---- recorded gradients, some of which are not finite -------------------------------------------

NARROW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POISONED = "layers.2.0.weight"
POISON_ROW = 5
REPLAYED = Hyperparameters(lr=0.05, alpha=0.01, zo_eps=2.0**-7, weight_decay=0.1)


class _Poison(torch.autograd.Function):
    """Adds nothing to the loss, and a row that is not finite to the gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: float) -> Tensor:
        ctx.like, ctx.value = parameter, value
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        poison = torch.zeros_like(ctx.like)
        poison[POISON_ROW] = ctx.value
        return poison, None


def replay(layout: Layout, dtype: torch.dtype, poison: float | None) -> dict[str, Any]:
    """Three steps with recorded gradients; in the second the last rank's are poisoned."""
    model = Linear(dtype)
    shapes = [{n: p.shape for n, p in leaf.named_parameters()} for leaf in model.leaves()]
    poisons = dist.get_rank() == dist.get_world_size() - 1
    leaf = model.layers[2][0]
    add = leaf.forward
    step = 0

    def forward(x: Tensor) -> Tensor:
        x = add(x)
        if poison is not None and poisons and step == 1 and torch.is_grad_enabled():
            x = x + _Poison.apply(leaf.weight, poison)
        return x

    leaf.forward = forward
    run = layout.run(model, REPLAYED)
    addax = unwrap(run.optimizer)
    addax.loss_scale = type(addax.loss_scale)(256.0) if dtype == torch.float16 else addax.loss_scale
    reports, weights = [], [run.weights()]
    for step in range(3):
        model.replay(shapes, step)
        losses = iter([torch.tensor(0.5), torch.tensor(0.25)])

        def zeroth_order(losses=losses) -> Tensor:
            run.model()
            return next(losses)

        finish(run, run.optimizer.measure(zeroth_order, lambda: run.model().float()))
        reports.append(vars(addax.report))
        weights.append(run.weights())
    result = {"reports": reports, "weights": weights, "state": addax.state_dict()["addax"]}
    run.close()
    return result


# ---- parameters that a step does not read -------------------------------------------------------

ROUTED = Hyperparameters(lr=0.05, alpha=1.0, zo_eps=2.0**-7)
EXPERTS = 4


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(EXPERTS)])
        self.expert = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.expert](x)


class Routed(nn.Module):
    """Sends a batch to one expert, and multiplies by a weight of a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([Experts()])
        self.borrowed = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers[0](x) @ self.borrowed.weight).square().mean()


def expert_of(rank: int, step: int) -> int:
    return rank % 2 + step


def routed(layout: Layout) -> dict[str, Any]:
    """Two steps, in which each rank sends its batch to one expert, and all of them to few."""
    model = Routed()
    experts = model.layers[0]
    # ZeRO-3 gathers all experts together; it could not follow a rank to one of them.
    set_z3_leaf_modules(model, [Experts])
    run = layout.run(model, ROUTED)
    found: dict[str, Any] = {"start": run.weights(), "g0": [], "norms": []}
    for step in range(2):
        experts.expert = expert_of(dist.get_rank(), step)
        found["g0"].append(run.train(lambda: run.model(torch.ones(3, 6)), None))
        found["norms"].append(unwrap(run.optimizer).report.zeroth_order_norm)
    found["end"] = run.weights()
    run.close()
    return found


POISONS = {"None": None, "nan": float("nan"), "inf": float("inf")}
RUNS: list[Any] = [
    *EXACT,
    *DROPOUT,
    *(("early NaN", clip) for clip in (0.0, 0.5)),
    ("routed", None),
    *((dtype, poison) for dtype in NARROW for poison in POISONS),
]


def set_up() -> None:
    dist.init_process_group("gloo")
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for fast fp16 alone


def run_case(layout: str, run: Any) -> dict[str, Any]:
    if run in EXACT or run in DROPOUT:
        return train(LAYOUTS[layout], {**EXACT, **DROPOUT}[run])
    kind, value = run
    if kind == "early NaN":
        return early_nan(LAYOUTS[layout], Hyperparameters(alpha=0.0, max_grad_norm=value))
    if kind == "routed":
        return routed(LAYOUTS[layout])
    return replay(LAYOUTS[layout], NARROW[kind], POISONS[value])
