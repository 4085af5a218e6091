"""Order of the calls of a step: each check raises what to call instead.

Updates happen in place while backward runs, so a call that comes too early, too late or not at all
would train on other weights, in silence.
"""

from addax_ds.optim.loss_scale import UNSCALED, LossScale
from addax_ds.sharding.base import Sharding
from addax_ds.sharding.calls import Calls


def check_passes_come_first(alpha: float, has_begun: bool, calls: Calls) -> None:
    """Check, before the passes of a step, that nothing of the step has run.

    Args:
        alpha: that of the step.
        has_begun: whether a step has begun that is not finished.
        calls: those since the last step, which are forgotten on an error.

    Raises:
        RuntimeError: if something has.
    """
    if has_begun:
        raise RuntimeError(
            "the passes of a step have to come first in it and once: call step() after the "
            "backward, and measure() before the next first-order forward. If an exception has "
            "ended the step: abandon()"
        )
    if alpha > 0.0 and calls.forward_ran:
        calls.clear()  # whoever calls again, as the message says, means it
        raise RuntimeError(
            "a forward with autograd ran since the last step, and the zeroth-order passes come "
            "before it: its backward would see other weights. Call measure() first, and "
            "put forwards that train nothing under torch.no_grad(). If that forward is not to "
            "be trained on, call again"
        )


def check_loss_of_caller(alpha: float, max_grad_norm: float, loss_scale: LossScale) -> None:
    """Check that a step whose first-order loss the caller computes has nothing to do to it.

    Raises:
        RuntimeError: if it has to be clipped or scaled.
    """
    if alpha < 1.0 and (max_grad_norm > 0.0 or loss_scale != UNSCALED):
        raise RuntimeError(
            "clipping (max_grad_norm; gradient_clipping of a DeepSpeed JSON, into which "
            "Accelerate writes 1 if it says nothing) and the loss scale of fp16 weights need "
            "the first-order loss: call measure(zeroth_order, first_order) with a closure that "
            "returns it"
        )


def check_all_applied(sharding: Sharding) -> None:
    """Check, before a step is finished, that every gradient has come to the optimizer.

    Raises:
        RuntimeError: if one has not.
    """
    name = sharding.unapplied_gradient()
    if name is not None:
        raise RuntimeError(
            f"{name} has a gradient that was not applied, because it was not reduced (no_sync, "
            "set_requires_gradient_sync, set_requires_all_reduce): each step is one backward "
            "with reduction. Or torch.distributed.checkpoint (get_optimizer_state_dict) has set it "
            "to make optimizer state, of which Addax has none: save optimizer.state_dict()"
        )


def check_backward_ran(alpha: float, has_begun: bool, calls: Calls) -> None:
    """Check, before a step is finished, that the backward of its first-order loss ran.

    Args:
        alpha: that of the step.
        has_begun: whether the step has run passes, or taken a gradient; if neither, it is a
            backward alone.
        calls: those since the last step.

    Raises:
        RuntimeError: if it has not.
    """
    is_expected = calls.forward_ran or not has_begun
    if alpha < 1.0 and is_expected and not calls.gradient_arrived:
        raise RuntimeError(
            "no backward ran in this step: call backward() on what measure() returned, or on a "
            "first-order loss of your own, before step(). If an exception has ended it: "
            "abandon() instead of step()"
        )
