"""The arithmetic of one step on a slice of one parameter, in one place for every back end.

    theta <- theta (1 - lr lambda) - lr ((1 - alpha) g1 + alpha g0 z)          (Addax, Algorithm 1)

Perturbing (``theta + c z``) and updating are the same fused operation

    out = in * c0 - (g * c1 + z * c2)

computed in fp32 in exactly this order, without fused multiply-add, and rounded once to the type of
the weights. Everything it needs besides the tensors stands in an immutable `Step`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from addax_ds import noise

Rounding = Literal["stochastic", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest")


@dataclass(frozen=True)
class Step:
    """Everything that one optimizer step needs, equal on all ranks.

    Attributes:
        seed: seed of the run; part of the key of z.
        index: number of the step, counted from 0.
        lr: learning rate (paper: eta).
        alpha: weight of the zeroth-order part, in [0, 1].
        zo_eps: perturbation scale (paper: epsilon).
        weight_decay: decoupled weight decay (lambda), applied to parameters of two or more
            dimensions.
        rounding: how bf16 weights are rounded after an update.
        g0: zeroth-order projected gradient, the scalar (L(theta + eps z) - L(theta - eps z)) /
            (2 eps); 0 until it has been measured.
    """

    seed: int
    index: int
    lr: float
    alpha: float
    zo_eps: float
    weight_decay: float = 0.0
    rounding: Rounding = "stochastic"
    g0: float = 0.0


def perturb(weight: Tensor, parameter_id: int, start: int, step: Step, sign: int) -> Tensor:
    """Return ``weight + sign * zo_eps * z`` as a new tensor; ``weight`` is not written.

    Args:
        weight: flat slice of a parameter.
        parameter_id: id of the parameter (`noise.parameter_id`).
        start: flat index of the slice's first element in the unsharded parameter.
        step: the step; ``seed``, ``index`` and ``zo_eps`` are used.
        sign: +1 or -1.

    Returns:
        Tensor like ``weight``, rounded to nearest.
    """
    out = torch.empty_like(weight)
    _fused(out, weight, None, parameter_id, start, step, 1.0, 0.0, -sign * step.zo_eps, False)
    return out


def apply_update(
    weight: Tensor, gradient: Tensor | None, parameter_id: int, start: int, step: Step, decayed: bool
) -> None:
    """Apply one step to a slice in place.

    Args:
        weight: flat slice of a parameter, fp32, bf16 or fp16; overwritten.
        gradient: the averaged first-order gradient g1 of the slice, any floating type, or None for
            a parameter without one.
        parameter_id: id of the parameter.
        start: flat index of the slice's first element in the unsharded parameter.
        step: the step with its measured ``g0``.
        decayed: whether weight decay applies to this parameter.
    """
    c0 = 1.0 - step.lr * step.weight_decay if decayed else 1.0
    c1 = step.lr * (1.0 - step.alpha)
    c2 = step.lr * step.alpha * step.g0
    if c1 == 0.0:
        gradient = None
    stochastic = step.rounding == "stochastic" and weight.dtype == torch.bfloat16
    _fused(weight, weight, gradient, parameter_id, start, step, c0, c1, c2, stochastic)


@torch.no_grad()
def _fused(
    out: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    parameter_id: int,
    start: int,
    step: Step,
    c0: float,
    c1: float,
    c2: float,
    stochastic: bool,
) -> None:
    """``out = weight * c0 - (gradient * c1 + z * c2)`` over one slice; see the module docstring."""
    c0, c1, c2 = (float(np.float32(c)) for c in (c0, c1, c2))
    device = weight.device

    def words(first: int, count: int, stream: int) -> Tensor:
        return noise.random_words(
            step.seed, step.index, parameter_id, first, count, stream, 0, device
        )

    for low, high, first in noise.chunks(start, weight.numel(), device):
        count = high - low
        decrement = None
        if c2 != 0.0:
            decrement = noise.normals(words(first, count, noise.STREAM_Z), first, count).mul_(c2)
        if gradient is not None:
            part = gradient[low:high].to(device, torch.float32, copy=True).mul_(c1)
            decrement = part if decrement is None else part.add_(decrement)
        value = weight[low:high].to(torch.float32, copy=True)
        if c0 != 1.0:
            value.mul_(c0)
        if decrement is not None:
            value.sub_(decrement)
        if stochastic:
            bits = noise.rounding_bits(words(first, count, noise.STREAM_ROUNDING), first, count)
            value = _round_stochastically(value, bits)
        out[low:high] = value


def _round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up with the probability that the dropped bits stand for.

    Args:
        value: fp32 tensor.
        bits: int32 tensor of the same shape, uniform in [0, 2**16).
    """
    # Adding to the 16 bits about to be dropped carries with just that probability. A NaN stays one.
    rounded = (value.view(torch.int32) + bits).bitwise_right_shift_(16).to(torch.int16)
    return torch.where(value.isnan(), value.to(torch.bfloat16), rounded.view(torch.bfloat16))
