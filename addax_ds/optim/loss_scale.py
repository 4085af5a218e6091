"""The factor that keeps fp16 gradients in range.

Micikevicius et al., "Mixed Precision Training" (ICLR 2018, arXiv 1710.03740), section 3.2, with the
factor adjusted as in section 3.2's last paragraph. An update in place cannot be undone, so a step
with an overflow is not skipped as a whole: elements whose update is not finite keep their weights.
"""

from dataclasses import dataclass, replace

from addax_ds.utils.errors import UserError


@dataclass(frozen=True)
class LossScale:
    """Factor of the first-order loss before backward; gradients are divided by it.

    Attributes:
        value: the factor, > 0.
        growth_interval: number of steps without an overflow after which it doubles; 0 never changes
            it.
        minimum: it is halved at an overflow, down to this.
        clean_steps: number of steps since the last change.

    Raises:
        UserError: for a value out of range.
    """

    value: float = 2.0**16
    growth_interval: int = 1000
    minimum: float = 1.0
    clean_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.value < float("inf"):
            raise UserError(
                f"a loss scale has to be finite and at least its minimum, which is above 0: got "
                f"{self.value:g} with a minimum of {self.minimum:g}"
            )
        if self.growth_interval < 0 or self.clean_steps < 0:
            raise UserError("the steps of a loss scale cannot be negative")

    def resumed(self, saved: "LossScale") -> "LossScale":
        """Return where a saved scale was, under this one's rules; a fixed one stays as it is."""
        if self.growth_interval == 0 or saved.growth_interval == 0:
            return self
        return replace(self, value=max(saved.value, self.minimum), clean_steps=saved.clean_steps)

    @property
    def can_shrink(self) -> bool:
        """True if the scale can be lowered after an overflow."""
        return self.growth_interval > 0 and self.value > self.minimum

    def after(self, overflow: bool) -> "LossScale":
        """Return the scale of the next step."""
        if self.growth_interval == 0:
            return self
        if overflow:
            return replace(self, value=max(self.value / 2, self.minimum), clean_steps=0)
        if self.clean_steps + 1 >= self.growth_interval:
            return replace(self, value=min(self.value * 2, 2.0**126), clean_steps=0)
        return replace(self, clean_steps=self.clean_steps + 1)


UNSCALED = LossScale(1.0, growth_interval=0)
