"""The two operations on slices of a parameter that everything else is made of.

`gaussian` fills a slice with z; `fused` perturbs and updates. `reference` defines them in plain
torch.
"""

import numpy as np
import torch
from torch import Tensor

from addax_ds.kernels import reference
from addax_ds.kernels.operation import Draw


@torch.no_grad()
def gaussian(out: Tensor, draw: Draw, start: int) -> None:
    """Fill a slice with z.

    Args:
        out: flat, contiguous fp32 tensor.
        draw: which z.
        start: flat index of the slice's first element in the unsharded parameter.
    """
    reference.gaussian(out, draw, start)


@torch.no_grad()
def fused(
    out: Tensor,
    weight: Tensor,
    gradient: Tensor | None,
    draw: Draw,
    start: int,
    c0: float,
    c1: float,
    c2: float,
    stochastic: bool,
) -> None:
    """``out = weight * c0 - (gradient * c1 + z * c2)`` over one slice.

    Computed in fp32 in exactly this order without fused multiply-add, with the coefficients rounded
    to fp32 first, and rounded once to the type of the weights. A term whose coefficient is 0 (for
    ``c0``: 1) is left out.

    Args:
        out: flat tensor like ``weight``, and possibly ``weight`` itself.
        weight: flat, contiguous; fp32, bf16 or fp16.
        gradient: flat, as long as ``weight``, fp32 or of the weights' type; None for none. It is
            moved to the weights' device if it is elsewhere.
        draw: which z and rounding bits.
        start: flat index of the slice's first element in the unsharded parameter.
        c0: coefficient of the weight.
        c1: coefficient of the gradient.
        c2: coefficient of z.
        stochastic: round stochastically instead of to nearest; bf16 only.
    """
    c0, c1, c2 = (float(np.float32(c)) for c in (c0, c1, c2))
    if gradient is not None:
        gradient = None if c1 == 0.0 else gradient.to(weight.device)
    reference.fused(out, weight, gradient, draw, start, c0, c1, c2, stochastic)
