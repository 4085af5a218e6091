"""What the kernels compute, apart from how."""

from dataclasses import dataclass

import numpy as np

STREAM_Z = 0
STREAM_ROUNDING = 1


@dataclass(frozen=True)
class Draw:
    """Which random numbers: everything that goes into a counter besides the element.

    Attributes:
        seed: 64-bit key.
        step: index of the step, 32 bits.
        parameter_id: 32 bits.
        probe: index of the direction within the step, 31 bits; Addax uses number 0 alone.
    """

    seed: int
    step: int
    parameter_id: int
    probe: int = 0


@dataclass(frozen=True)
class Operation:
    """The one operation, which perturbs and updates, besides its tensors and the place of a slice.

        out = weight * c0 - (gradient * c1 + d * c2)

        d = z                                                          if zo_eps is 0, else
        d = round(weight + z * zo_eps) - round(weight - z * zo_eps)    the realised difference

    The realised difference is what two forward passes saw of z: ``round`` is to the nearest number
    of the weights' type, as when weights are perturbed. It is not divided by 2 ``zo_eps``; that
    belongs into ``c2``.

    Computed in fp32 in exactly this order without fused multiply-add, and rounded once to the
    weights' type. A term whose coefficient is 0 (for ``c0``: 1) is left out. Every NaN comes out as
    the same one, positive, quiet and without payload.

    Attributes:
        draw: which z and rounding bits.
        c0: coefficient of the weight.
        c1: coefficient of the gradient.
        c2: coefficient of d.
        zo_eps: scale of the perturbations whose difference d is; 0 if d is z.
        stochastic: round the result stochastically instead of to nearest; bf16 only.

    The four numbers are rounded to fp32 when an operation is made.
    """

    draw: Draw
    c0: float = 1.0
    c1: float = 0.0
    c2: float = 0.0
    zo_eps: float = 0.0
    stochastic: bool = False

    def __post_init__(self) -> None:
        for name in ("c0", "c1", "c2", "zo_eps"):
            object.__setattr__(self, name, float(np.float32(getattr(self, name))))
