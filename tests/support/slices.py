"""Kernels and updates of one slice, where a test has no more of them."""

from typing import Any

from torch import Tensor

from addax_ds.kernels.operation import Operation, Slice
from addax_ds.optim import update
from addax_ds.optim.update import Step


def fused(
    module: Any,
    out: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    operation: Operation,
    start: int,
    kept: Tensor | None = None,
) -> None:
    """Compute an operation over one slice, by `addax_ds.kernels` or one of its implementations."""
    slices = [Slice(weight, operation.draw.parameter_id, start)]
    module.fused(slices, operation, out, None if gradient is None else [gradient], kept)


def perturb(
    weight: Tensor, parameter_id: int, start: int, step: Step, sign: int, probe: int = 0
) -> Tensor:
    """Return a perturbed copy of one slice."""
    (copy,) = update.perturb([Slice(weight, parameter_id, start)], step, sign, probe)
    return copy


def apply_update(
    weight: Tensor,
    gradient: Tensor | None,
    parameter_id: int,
    start: int,
    step: Step,
    decayed: bool,
    kept: Tensor | None = None,
) -> None:
    """Apply one step to one slice."""
    gradients = None if gradient is None else [gradient]
    update.apply_update([Slice(weight, parameter_id, start)], gradients, step, decayed, kept)
