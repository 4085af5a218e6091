"""The report of a step, and the error after too many non-finite ones."""

from dataclasses import dataclass

from addax_ds.utils.errors import UserError

MAX_NON_FINITE_STEPS = 10
"""Training stops after so many steps in a row with something that is NaN or infinite."""

NON_FINITE = "with something that is NaN or infinite"
"""Words of the error of such a training, by which a log tells divergence from other failures."""


@dataclass(frozen=True)
class StepReport:
    """Report of the last step, equal on all ranks.

    Attributes:
        index: number of the step.
        g0: zeroth-order projected gradient, of several directions their root mean square; 0 if that
            part was left out, None if alpha is 0.
        zeroth_order_loss: `Estimate.loss`, the mean over ranks and micro-batches that the estimator
            reports (of two-sided differences the mean over their passes), or None.
        first_order_loss: mean over ranks and micro-batches of the first-order loss; None if
            `Addax.measure` did not compute it.
        zeroth_order_norm: norm of the zeroth-order part of the update, lr * alpha * |g0| * sqrt(d)
            for d trainable elements (those of unread parameters left out), over sqrt(q) for q
            directions; ||z|| is sqrt(d) to a relative 1 / sqrt(2 d), and directions are as good as
            orthogonal (weights narrower than fp32 were perturbed by rounded multiples of z, whose
            norm differs a little).
        first_order_norm: norm of the first-order part, lr * (1 - alpha) * ||g1||, after clipping;
            None unless `Addax.track_norm` was set or the gradient is clipped.
        gradient_norm: ||g1|| over all parameters, before weighting and clipping; None likewise.
        zeroth_order_decrease: first-order prediction of how much the zeroth-order part alone
            lowers the loss of its batch, lr * alpha * g0**2 (with another `Estimator` than that of
            two-sided differences, lr * alpha times the sum of coefficients times projected
            gradients); 0 if that part was left out, None if alpha is 0, or if parameter groups
            differ in lr. docs/choosing.md has its bias.
        first_order_decrease: the same of the first-order part, lr * (1 - alpha) * ||g1||**2, after
            clipping; None unless the norm was taken, or if alpha is 1.
        loss_scale: what the first-order loss was multiplied by; 1 but for fp16 weights.
        has_nonfinite: whether something was NaN or infinite: a loss, whose part was skipped,
            or elements of an update, which kept their weights.
        stop_requested: whether `Addax.stop_requested` was set on any rank.
        projected_gradients: those of all directions; empty where there is none.
    """

    index: int
    g0: float | None
    zeroth_order_loss: float | None
    first_order_loss: float | None
    zeroth_order_norm: float
    first_order_norm: float | None
    gradient_norm: float | None
    zeroth_order_decrease: float | None = None
    first_order_decrease: float | None = None
    loss_scale: float = 1.0
    has_nonfinite: bool = False
    stop_requested: bool = False
    projected_gradients: tuple[float, ...] = ()

    @property
    def zeroth_order_share(self) -> float | None:
        """Share of the zeroth-order part in the squared norm of the update, from 0 to 1.

        That of the first-order part is the rest: z is as good as orthogonal to g1. None if one of
        the norms is not known, or both are 0.
        """
        if self.first_order_norm is None:
            return None
        zeroth, first = self.zeroth_order_norm**2, self.first_order_norm**2
        return zeroth / (zeroth + first) if zeroth + first > 0 else None


class NonFiniteError(UserError, ArithmeticError):
    """Too many steps in a row had something that is NaN or infinite."""


class NonFiniteSteps:
    """Counts consecutive non-finite steps.

    Attributes:
        in_a_row: how many there were up to now.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, index: int, problems: list[str]) -> None:
        """Count a finished step; ``problems`` lists its non-finite values, if any.

        Raises:
            NonFiniteError: if it is the `MAX_NON_FINITE_STEPS`th in a row with a problem.
        """
        self.in_a_row = self.in_a_row + 1 if problems else 0
        if self.in_a_row >= MAX_NON_FINITE_STEPS:
            raise NonFiniteError(
                f"{' and '.join(problems)} at step {index}, the {self.in_a_row}th step in a row "
                f"{NON_FINITE}: lower the learning rate, or look at the data of these steps"
            )
