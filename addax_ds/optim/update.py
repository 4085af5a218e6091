"""The arithmetic of one step on a slice of one parameter, in one place for every back end.

    theta <- theta (1 - lr lambda) - lr ((1 - alpha) g1 + alpha sum over k of coefficients[k] d[k])

With one direction, its coefficient g0 and d = z this is Algorithm 1 of Addax. For weights narrower
than fp32 d is what the passes at +eps and -eps see of z, the realised difference

    d = (round(theta + eps z) - round(theta - eps z)) / (2 eps)

Perturbing (``theta + c z``) and updating are the same operation, `addax_ds.kernels.fused`.
Everything that it needs besides the tensors stands in an immutable `Step`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels.operation import Draw, Operation

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
        rounding: how weights narrower than fp32 are rounded after an update.
        coefficients: of the directions in the zeroth-order gradient (`Estimate`), that of probe 0
            first; empty until they have been measured.
        gradient_scale: what the gradient that arrives is multiplied by to be g1: the coefficient
            of clipping over the loss scale.
    """

    seed: int
    index: int
    lr: float
    alpha: float
    zo_eps: float
    weight_decay: float = 0.0
    rounding: Rounding = "stochastic"
    coefficients: tuple[float, ...] = ()
    gradient_scale: float = 1.0


def perturb(
    weight: Tensor, parameter_id: int, start: int, step: Step, sign: int, probe: int = 0
) -> Tensor:
    """Return ``weight + sign * zo_eps * z`` as a new tensor; ``weight`` is not written.

    Args:
        weight: flat slice of a parameter.
        parameter_id: id of the parameter (`noise.parameter_id`).
        start: flat index of the slice's first element in the unsharded parameter.
        step: the step; ``seed``, ``index`` and ``zo_eps`` are used.
        sign: +1 or -1; 0 for a copy.
        probe: number of the direction z within the step.

    Returns:
        Tensor like ``weight``, rounded to nearest; an element that would become NaN or infinite is
        the weight itself.
    """
    out = torch.empty_like(weight)
    draw = Draw(step.seed, step.index, parameter_id, probe)
    operation = Operation(draw, c2=(-sign * step.zo_eps,))
    kernels.fused(out, weight, None, operation, start)
    return out


def apply_update(
    weight: Tensor,
    gradient: Tensor | None,
    parameter_id: int,
    start: int,
    step: Step,
    decayed: bool,
    kept: Tensor | None = None,
) -> None:
    """Apply one step to a slice in place; an element that it would make NaN or infinite stays.

    Args:
        weight: flat slice of a parameter, fp32, bf16 or fp16, as it was when `perturb` was called;
            overwritten.
        gradient: the averaged first-order gradient g1 of the slice, any floating type, or None for
            a parameter without one.
        parameter_id: id of the parameter.
        start: flat index of the slice's first element in the unsharded parameter.
        step: the step with its measured ``coefficients``.
        decayed: whether weight decay applies to this parameter.
        kept: int32 tensor of one element on the weights' device, set to 1 if an element stayed for
            that reason and left alone otherwise; None if nobody asks.
    """
    c0 = 1.0 - step.lr * step.weight_decay if decayed else 1.0
    c1 = step.lr * (1.0 - step.alpha) * step.gradient_scale
    c2 = tuple(step.lr * step.alpha * coefficient for coefficient in step.coefficients)
    zo_eps = 0.0
    # In fp32 the realised difference is z to within 1e-4 for weights around 1 and an eps of 1e-3.
    if weight.dtype != torch.float32:
        c2, zo_eps = tuple(c / (2 * step.zo_eps) for c in c2), step.zo_eps
    stochastic = step.rounding == "stochastic" and weight.dtype != torch.float32
    draw = Draw(step.seed, step.index, parameter_id)
    operation = Operation(draw, c0, c1, c2, zo_eps, stochastic)
    kernels.fused(weight, weight, gradient, operation, start, kept)
