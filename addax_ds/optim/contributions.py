"""What the two parts of a step contribute: norms of the update, and predicted decreases.

The numbers of `StepReport`; docs/choosing.md says how far a prediction may be trusted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from addax_ds.optim.estimator import Estimate
from addax_ds.optim.update import Step


@dataclass(frozen=True)
class Contributions:
    """The two parts of a finished step, as numbers that all ranks have.

    Attributes:
        groups: the step's values by parameter group, as they were applied.
        estimate: of the zeroth-order part; None if there is none.
        elements: by parameter group, the number of elements that the zeroth-order part updates.
        gradient_norms: ||g1|| by parameter group, before clipping; empty if it was not taken.
        clip_coefficient: what g1 was multiplied by; 0 if the first-order part was left out.
    """

    groups: Sequence[Step]
    estimate: Estimate | None
    elements: Sequence[int]
    gradient_norms: Sequence[float]
    clip_coefficient: float

    @property
    def g0(self) -> float | None:
        """`StepReport.g0`."""
        if self.groups[0].alpha == 0.0:
            return None
        return self.estimate.g0 if self.estimate else 0.0

    @property
    def gradient_norm(self) -> float | None:
        """`StepReport.gradient_norm`."""
        return math.hypot(*self.gradient_norms) if self.gradient_norms else None

    @property
    def zeroth_order_norm(self) -> float:
        """`StepReport.zeroth_order_norm`."""
        # Independent z are nearly orthogonal, so their coefficients add up in squares.
        weight = self.groups[0].alpha * math.hypot(*self.groups[0].coefficients)
        return weight * math.hypot(*map(mul, self._lrs, map(math.sqrt, self.elements)))

    @property
    def first_order_norm(self) -> float | None:
        """`StepReport.first_order_norm`."""
        if not self.gradient_norms:
            return None
        if self._first_order_weight == 0.0:  # also where the norm is infinite
            return 0.0
        return self._first_order_weight * math.hypot(*map(mul, self._lrs, self.gradient_norms))

    @property
    def zeroth_order_decrease(self) -> float | None:
        """`StepReport.zeroth_order_decrease`: slopes times how far the update goes along them."""
        step = self.groups[0]
        if step.alpha == 0.0 or len(set(self._lrs)) > 1:  # g0 is of all groups together
            return None
        if self.estimate is None:
            return 0.0
        slopes = self.estimate.projected_gradients
        return step.lr * step.alpha * math.fsum(map(mul, self.estimate.coefficients, slopes))

    @property
    def first_order_decrease(self) -> float | None:
        """`StepReport.first_order_decrease`."""
        if not self.gradient_norms or self.groups[0].alpha == 1.0:
            return None
        if self._first_order_weight == 0.0:
            return 0.0
        squares = map(mul, self.gradient_norms, self.gradient_norms)
        return self._first_order_weight * math.fsum(map(mul, self._lrs, squares))

    @property
    def _lrs(self) -> list[float]:
        return [group.lr for group in self.groups]

    @property
    def _first_order_weight(self) -> float:
        """Factor of lr g1 in the update."""
        return (1 - self.groups[0].alpha) * self.clip_coefficient
