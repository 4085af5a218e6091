"""What each part of the steps costs and buys, over the steps that are logged."""

import math
from dataclasses import dataclass

from addax_ds.optim.report import StepReport

ENOUGH_STEPS = 10
"""Logged steps from which a judgement is made: the mean of so many g0**2 is off by 45 %."""
LITTLE = 0.01
"""Share of the predicted decrease below which a part is said to buy little."""

_INSTEAD = {
    "zeroth-order": (
        "If all rows fit first-order (addax-plan --recommend), --method ip-sgd is simpler, with "
        "--activation_checkpointing where memory is short. --method ip-sgd --length_threshold L "
        "leaves the rows longer than L out. To learn more from them: a larger L_T. (A "
        "larger --alpha diverges where alpha x the learning rate is more than --method mezo bears)"
    ),
    "first-order": "Try a smaller --alpha, or --method mezo",
}


@dataclass
class Worth:
    """Sums over logged steps; a step counts that has both parts, and finite numbers.

    Attributes:
        steps: number of steps.
        zeroth_order_units: forward passes of tokens that the zeroth-order part took; a forward
            counts 1 a token, a backward 2, a recomputed forward 1.
        first_order_units: the same of the first-order part.
        zeroth_order_decrease: sum of `StepReport.zeroth_order_decrease`.
        first_order_decrease: sum of `StepReport.first_order_decrease`.
        told: whether `advice` has said something.
    """

    steps: int = 0
    zeroth_order_units: float = 0.0
    first_order_units: float = 0.0
    zeroth_order_decrease: float = 0.0
    first_order_decrease: float = 0.0
    told: bool = False

    def add(self, report: StepReport, zeroth_order_units: float, first_order_units: float) -> None:
        """Add a step."""
        zeroth, first = report.zeroth_order_decrease, report.first_order_decrease
        if zeroth is None or first is None or not math.isfinite(zeroth + first):
            return
        if not zeroth_order_units or not first_order_units:
            return
        self.steps += 1
        self.zeroth_order_units += zeroth_order_units
        self.first_order_units += first_order_units
        self.zeroth_order_decrease += zeroth
        self.first_order_decrease += first

    def shares(self) -> tuple[float, float] | None:
        """Return the zeroth-order part's shares of the units and of the decrease, from 0 to 1."""
        decrease = self.zeroth_order_decrease + self.first_order_decrease
        if self.steps < ENOUGH_STEPS or not decrease > 0:
            return None
        units = self.zeroth_order_units + self.first_order_units
        return self.zeroth_order_units / units, self.zeroth_order_decrease / decrease

    def describe(self) -> str | None:
        """Return both shares in words; None before there are `ENOUGH_STEPS`."""
        if (shares := self.shares()) is None:
            return None
        units, decrease = shares
        return (
            f"The zeroth-order part took {units:.0%} of the computation and, as far as the first "
            f"order predicts, gave {decrease:.2%} of the decrease of the losses ({self.steps} "
            "logged steps)"
        )

    def advice(self) -> str | None:
        """Return, once, that a part takes half of the computation and buys little."""
        if self.told or (shares := self.shares()) is None:
            return None
        units, decrease = shares
        for part, cost, gain in (
            ("zeroth-order", units, decrease),
            ("first-order", 1 - units, 1 - decrease),
        ):
            if cost >= 0.5 and gain < LITTLE:
                self.told = True
                return (
                    f"The {part} part takes {cost:.0%} of the computation and, as far as the first "
                    f"order predicts, gives {gain:.2%} of the decrease of the losses "
                    f"(docs/choosing.md). {_INSTEAD[part]}."
                )
        return None
