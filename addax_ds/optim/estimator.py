"""Zeroth-order estimators: the passes of a step, and the gradient that their losses stand for.

    gradient  ~  sum over k of coefficients[k] * d[k]

d[k] is the direction of probe k: its z, or what weights narrower than fp32 show of it
(`addax_ds.optim.update`). An estimator sees losses and returns numbers. It knows nothing of
weights, ranks and micro-batches: `addax_ds.optim.step` runs the passes and averages their losses
over ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override


@dataclass(frozen=True)
class Pass:
    """A forward pass at ``theta + sign * zo_eps * z``.

    Attributes:
        probe: number of the direction z within the step, counted from 0.
        sign: +1 or -1; 0 for the weights as they are.
    """

    probe: int
    sign: int


@dataclass(frozen=True)
class Estimate:
    """Numbers that the losses of a step give, equal on all ranks.

    Attributes:
        loss: the zeroth-order loss to report.
        projected_gradients: estimated derivative of the loss along each direction.
        coefficients: factor of each direction in the estimated gradient, by probe number.
    """

    loss: float
    projected_gradients: tuple[float, ...]
    coefficients: tuple[float, ...]

    @property
    def g0(self) -> float:
        """The projected gradient; of several directions the root mean square.

        Their mean would say nothing, as their signs are those of random directions. Their mean
        square estimates the squared norm of the gradient.
        """
        if len(self.projected_gradients) == 1:
            return self.projected_gradients[0]
        return math.hypot(*self.projected_gradients) / math.sqrt(len(self.projected_gradients))


class Estimator(ABC):
    """The zeroth-order part of a step.

    Attributes:
        passes: the passes in the order in which they run.
    """

    passes: tuple[Pass, ...]

    @abstractmethod
    def estimate(self, losses: Sequence[float], zo_eps: float) -> Estimate:
        """Turn losses into coefficients.

        Args:
            losses: mean over ranks and micro-batches, fp64, by `passes`; NaN and infinity occur.
            zo_eps: perturbation scale of the passes.

        Returns:
            The estimate. If one of its coefficients is NaN or infinite, the step has no
            zeroth-order part.
        """


class TwoSidedDifference(Estimator):
    """The mean of two-sided differences along independent directions; with one, that of the paper.

        g[k] = (L(theta + eps z[k]) - L(theta - eps z[k])) / (2 eps)
        gradient ~ 1/q * sum over k of g[k] d[k]

    One direction whose losses are not finite spoils the estimate. All see the same batch and the
    same weights, so others are seldom sound, and their mean would be that of fewer directions.

    Args:
        directions: their number q; each costs two passes and no memory.
    """

    def __init__(self, directions: int = 1) -> None:
        self.passes = tuple(Pass(probe, sign) for probe in range(directions) for sign in (+1, -1))

    @override
    def estimate(self, losses: Sequence[float], zo_eps: float) -> Estimate:
        pairs = zip(losses[::2], losses[1::2], strict=True)
        projected = tuple((plus - minus) / (2 * zo_eps) for plus, minus in pairs)
        return Estimate(
            loss=sum(losses) / len(losses),
            projected_gradients=projected,
            coefficients=tuple(g0 / len(projected) for g0 in projected),
        )
