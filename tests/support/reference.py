"""An independent single-process implementation of Addax in float64, written from the equation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import addax_ds


@dataclass(frozen=True)
class Hyperparameters:
    lr: float = 0.02
    alpha: float = 0.001
    zo_eps: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 1234
    max_grad_norm: float = 0.0
    zo_directions: int = 1


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over target tokens in the type of the logits (no cast to fp32)."""
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )


def float64_loop(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], h: Hyperparameters
) -> list[float]:
    """Train ``model`` (made float64 in place); return g0 of each step."""
    model.double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(x: Tensor) -> Tensor:
        return causal_loss(model(input_ids=x).logits, x)

    history = []
    for step, (long, short) in enumerate(batches):
        directions = [directions_of(h, step, probe, parameters) for probe in range(h.zo_directions)]
        projected = [two_point(loss, parameters, z, long, h.zo_eps) for z in directions]
        if h.alpha == 0:
            projected = [0.0] * h.zo_directions
        read = depends_on(loss(long), parameters) if h.alpha > 0 else set()
        gradients = dict.fromkeys(parameters)
        if h.alpha < 1:
            grads = torch.autograd.grad(loss(short), list(parameters.values()), allow_unused=True)
            gradients = dict(zip(parameters, clipped(grads, h.max_grad_norm), strict=True))
        with torch.no_grad():
            for n, p in parameters.items():
                decay = h.lr * h.weight_decay if p.ndim >= 2 else 0.0
                g1 = gradients[n] if gradients[n] is not None else torch.zeros_like(p)
                pairs = zip(projected, directions, strict=True) if n in read else ()
                g0_z = sum(g0 * z[n] for g0, z in pairs)
                gradient = h.alpha * g0_z / h.zo_directions + (1 - h.alpha) * g1
                p.copy_(p * (1 - decay) - h.lr * gradient)
        history.append(summary(projected))
    return history


def directions_of(
    h: Hyperparameters, step: int, probe: int, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One z for all parameters."""
    return {
        n: addax_ds.gaussian(h.seed, step, n, 0, p.numel(), probe=probe).view(p.shape).double()
        for n, p in parameters.items()
    }


def depends_on(loss: Tensor, parameters: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that a loss depends on, by autograd."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n for n, gradient in zip(parameters, grads, strict=True) if gradient is not None}


def summary(projected: list[float]) -> float:
    """The g0 of a step: of several directions the root mean square."""
    if len(projected) == 1:
        return projected[0]
    return (sum(g0**2 for g0 in projected) / len(projected)) ** 0.5


def clipped(gradients: tuple[Tensor | None, ...], max_norm: float) -> list[Tensor | None]:
    norm = sum(g.square().sum().item() for g in gradients if g is not None) ** 0.5
    factor = min(1.0, max_norm / norm) if max_norm else 1.0
    return [None if g is None else g * factor for g in gradients]


@torch.no_grad()
def two_point(
    loss: Callable[[Tensor], Tensor],
    parameters: dict[str, Tensor],
    z: dict[str, Tensor],
    batch: Tensor,
    eps: float,
) -> float:
    start = {n: p.clone() for n, p in parameters.items()}
    values = []
    for sign in (1.0, -1.0):
        for n, p in parameters.items():
            p.copy_(start[n] + sign * eps * z[n])
        values.append(loss(batch).item())
    for n, p in parameters.items():
        p.copy_(start[n])
    return (values[0] - values[1]) / (2 * eps)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Euclidean distance over all parameters together."""
    assert a.keys() == b.keys()
    return sum((a[n].double() - b[n].double()).square().sum().item() for n in a) ** 0.5


def norm(a: dict[str, Tensor]) -> float:
    return sum(v.double().square().sum().item() for v in a.values()) ** 0.5
