"""The arithmetic of one step on a slice of one parameter, in one place for every back end.

    theta <- theta (1 - lr lambda) - lr ((1 - alpha) g1 + alpha sum over k of coefficients[k] d[k])

With one direction, its coefficient g0 and d = z this is Algorithm 1 of Addax. For weights narrower
than fp32 d is what the passes at +eps and -eps see of z, the realised difference

    d = (round(theta + eps z) - round(theta - eps z)) / (2 eps)

Perturbing (``theta + c z``) and updating are the same operation, `addax_ds.kernels.fused`.
Everything that it needs besides the tensors stands in an immutable `Step`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels.operation import Draw, Operation, Slice

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


def perturb(slices: Sequence[Slice], step: Step, sign: int, probe: int = 0) -> list[Tensor]:
    """Return ``weight + sign * zo_eps * z`` of each slice, which is not written.

    Args:
        slices: of any parameters.
        step: the step; ``seed``, ``index`` and ``zo_eps`` are used.
        sign: +1 or -1; 0 for a copy.
        probe: number of the direction z within the step.

    Returns:
        A new tensor like the data of each slice, rounded to nearest; an element that would become
        NaN or infinite is the weight itself. Those of one dtype share a buffer.
    """
    operation = Operation(Draw(step.seed, step.index, 0, probe), c2=(-sign * step.zo_eps,))
    alike: dict[tuple[torch.dtype, torch.device], list[Slice]] = {}
    for each in slices:
        alike.setdefault((each.data.dtype, each.data.device), []).append(each)
    copies: dict[Slice, Tensor] = {}
    for group in alike.values():
        buffer, parts = kernels.room_for(group)
        kernels.fused(group, operation, buffer)
        copies.update(zip(group, parts, strict=True))
    return [copies[each] for each in slices]


def apply_update(
    slices: Sequence[Slice],
    gradients: Sequence[Tensor] | None,
    step: Step,
    decayed: bool,
    kept: Tensor | None = None,
) -> None:
    """Apply one step to slices in place; an element that it would make NaN or infinite stays.

    Args:
        slices: fp32, bf16 or fp16, as they were when `perturb` was called, all of one dtype and on
            one device; overwritten.
        gradients: the averaged first-order gradient g1 of each slice, flat, all of any one floating
            type; None for parameters without one.
        step: the step with its measured ``coefficients``.
        decayed: whether weight decay applies to these parameters.
        kept: int32 tensor on the weights' device, whose element `Slice.index` is set to 1 if an
            update in that slice was not finite and was skipped; None to record nothing.
    """
    narrow = slices[0].data.dtype != torch.float32
    c0 = 1.0 - step.lr * step.weight_decay if decayed else 1.0
    c1 = step.lr * (1.0 - step.alpha) * step.gradient_scale
    c2 = tuple(step.lr * step.alpha * coefficient for coefficient in step.coefficients)
    zo_eps = 0.0
    # In fp32 the realised difference is z to within 1e-4 for weights around 1 and an eps of 1e-3.
    if narrow:
        c2, zo_eps = tuple(c / (2 * step.zo_eps) for c in c2), step.zo_eps
    stochastic = narrow and step.rounding == "stochastic"
    operation = Operation(Draw(step.seed, step.index, 0), c0, c1, c2, zo_eps, stochastic)
    kernels.fused(slices, operation, None, gradients, kept)
