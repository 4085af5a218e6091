"""What `AddaxTrainer` has to do, in float64 and one process, written from the equation.

No padding, no dummy rows, no ranks: each example is scored by itself, and the sum of cross-entropy
over the global batch is divided by the batch's number of target tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import addax_ds
from addax_ds.data.examples import Example

Batch = Sequence[Example]


@dataclass(frozen=True)
class Settings:
    alpha: float
    seed: int
    zo_eps: float = 1e-3
    weight_decay: float = 0.0


@dataclass
class Run:
    """One entry a step; None for what a step did not have."""

    g0: list[float | None] = field(default_factory=list)
    zo_loss: list[float | None] = field(default_factory=list)
    fo_loss: list[float | None] = field(default_factory=list)
    grad_norm: list[float | None] = field(default_factory=list)
    zo_update_norm: list[float] = field(default_factory=list)


def linear_schedule(peak: float, steps: int, warmup: int = 0) -> list[float]:
    """Learning rate of each step: up to ``peak`` during the warm-up, then down to 0."""
    return [
        peak * (s / warmup if s < warmup else (steps - s) / (steps - warmup)) for s in range(steps)
    ]


def global_loss(model: nn.Module, batch: Batch) -> Tensor:
    total, targets = torch.zeros((), dtype=torch.float64), 0
    for example in batch:
        ids = torch.tensor(example.input_ids.tolist())
        labels = torch.tensor(example.labels.tolist())[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
        total = total + F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        targets += int((labels != -100).sum())
    return total / targets


def reference_run(
    model: nn.Module,
    zeroth: Sequence[Batch | None],
    first: Sequence[Batch | None],
    lrs: Sequence[float],
    settings: Settings,
) -> Run:
    """Train ``model`` in place, made float64; a batch of None leaves that part of the step out."""
    model.double().eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    run = Run()
    for step, (long, short, lr) in enumerate(zip(zeroth, first, lrs, strict=True)):
        z = {
            n: addax_ds.gaussian(settings.seed, step, n, 0, p.numel()).view(p.shape).double()
            for n, p in parameters.items()
        }
        g0 = _two_point(run, model, parameters, z, long, settings.zo_eps)
        gradients = _first_order(run, model, parameters, short)
        z_norm = sum(v.square().sum().item() for v in z.values()) ** 0.5
        run.zo_update_norm.append(lr * settings.alpha * abs(g0) * z_norm)
        with torch.no_grad():
            for n, p in parameters.items():
                decay = lr * settings.weight_decay if p.ndim >= 2 else 0.0
                direction = settings.alpha * g0 * z[n] + (1 - settings.alpha) * gradients[n]
                p.copy_(p * (1 - decay) - lr * direction)
    return run


@torch.no_grad()
def _two_point(
    run: Run,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    z: dict[str, Tensor],
    batch: Batch | None,
    eps: float,
) -> float:
    if batch is None:
        run.g0.append(None)
        run.zo_loss.append(None)
        return 0.0
    start = {n: p.clone() for n, p in parameters.items()}
    losses = []
    for sign in (1.0, -1.0):
        for n, p in parameters.items():
            p.copy_(start[n] + sign * eps * z[n])
        losses.append(global_loss(model, batch).item())
    for n, p in parameters.items():
        p.copy_(start[n])
    run.g0.append((losses[0] - losses[1]) / (2 * eps))
    run.zo_loss.append(sum(losses) / 2)
    return run.g0[-1] or 0.0


def _first_order(
    run: Run, model: nn.Module, parameters: dict[str, nn.Parameter], batch: Batch | None
) -> dict[str, Tensor]:
    if batch is None:
        run.fo_loss.append(None)
        run.grad_norm.append(None)
        return {n: torch.zeros_like(p) for n, p in parameters.items()}
    loss = global_loss(model, batch)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    run.fo_loss.append(loss.item())
    run.grad_norm.append(sum(g.square().sum().item() for g in gradients) ** 0.5)
    return dict(zip(parameters, gradients, strict=True))
