"""Addax as a `torch.optim.Optimizer`.

Li, Zhang, Zhong, Deng, Razaviyayn, Mirrokni: "Addax: Utilizing Zeroth-Order Gradients to Improve
Memory Efficiency and Performance of SGD for Fine-Tuning Language Models", ICLR 2025
(arXiv 2410.06441), Algorithm 1.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import Tensor

from addax_ds.errors import UserError
from addax_ds.sharding.base import Shard, Sharding, evaluation_mode
from addax_ds.update import ROUNDINGS, Rounding, Step, apply_update, perturb

logger = logging.getLogger(__name__)

Closure = Callable[[], Tensor]

MAX_NON_FINITE_STEPS = 10
"""Training stops after so many steps in a row with a loss or g0 that is NaN or infinite."""


SMALLEST_BF16_ZO_EPS = 5e-4
"""Below it bf16 weights cannot follow the perturbation: at 1e-4 the correlation of g0 with
<z, grad L> on SmolLM2-135M was -0.12, at 1e-3 it was 0.97."""


@dataclass(frozen=True)
class StepReport:
    """What the last step did, equal on all ranks.

    Attributes:
        g0: zeroth-order projected gradient; None if alpha is 0.
        zeroth_order_loss: mean of the losses at theta + zo_eps z and theta - zo_eps z, or None.
        first_order_loss: mean over ranks of the first-order loss; None if `Addax.measure` did not
            compute it.
        zeroth_order_norm: norm of the zeroth-order part of the update, lr * alpha * |g0| * sqrt(d)
            for d trainable elements; ||z|| is sqrt(d) to a relative 1 / sqrt(2 d) (bf16 weights
            were perturbed by rounded multiples of z, whose norm differs a little).
        first_order_norm: norm of the first-order part, lr * (1 - alpha) * ||g1||; None unless
            `Addax.track_norm` was set.
        gradient_norm: ||g1|| over all parameters, before weighting; None likewise.
    """

    g0: float | None
    zeroth_order_loss: float | None
    first_order_loss: float | None
    zeroth_order_norm: float
    first_order_norm: float | None
    gradient_norm: float | None


class NonFiniteError(UserError, ArithmeticError):
    """Too many steps in a row had a loss or a g0 that is NaN or infinite."""


class Addax(torch.optim.Optimizer):
    r"""In-place fine-tuning with a mixture of zeroth- and first-order gradients.

    .. math::

        z &\sim \mathcal N(0, I) \\
        g^0 &= \frac{L(\theta + \epsilon z; B^0) - L(\theta - \epsilon z; B^0)}{2 \epsilon} \\
        g^1 &= \nabla L(\theta; B^1) \\
        \theta &\leftarrow \theta (1 - \eta \lambda)
                 - \eta \left( \alpha g^0 z + (1 - \alpha) g^1 \right)

    ==================  =====================  ================================================
    symbol              argument               meaning
    ==================  =====================  ================================================
    :math:`\eta`        ``lr``                 learning rate
    :math:`\alpha`      ``alpha``              weight of the zeroth-order part; 1 is MeZO, 0 is
                                               in-place SGD (IP-SGD)
    :math:`\epsilon`    ``zo_eps``             perturbation scale
    :math:`\lambda`     ``weight_decay``       decoupled; parameters with one dimension (biases,
                                               norm gains) are exempt
    :math:`z`           ``seed``               `addax_ds.gaussian` of (seed, step, parameter)
    ==================  =====================  ================================================

    For bf16 weights the update credits, in place of z, what the passes saw of it after rounding
    (`addax_ds.update`).

    One step is ``zeroth_order(closure)``, then ``loss.backward()``, which updates each parameter as
    soon as its gradient exists, then ``step()``, which updates what got no gradient. The weights
    are all the state there is.

    Attributes:
        index: number of the next step.
        track_norm: whether steps measure the norm of the first-order gradient, which costs one more
            read of it and one all-reduce.
        zeroth_order_loss: mean over ranks of the two losses that `measure` computed last.
        first_order_loss: mean over ranks of the first-order loss that `measure` computed last.
        report: what the last step did.

    A first-order loss that is NaN or infinite must not reach ``backward()``, which would write it
    into the weights. ``measure(zeroth_order, first_order)`` computes both losses, averages them
    with one all-reduce, and returns the first-order loss only if all ranks may go backward from it.

    Args:
        params: parameters or parameter groups, as for any optimizer; a group may have its own
            ``lr`` and ``weight_decay``.
        lr: learning rate, >= 0.
        alpha: weight of the zeroth-order part, in [0, 1].
        zo_eps: perturbation scale, > 0. It is not called ``eps`` because Trainer compares that name
            with Adam's.
        weight_decay: decoupled weight decay, >= 0.
        seed: 64-bit seed of z and of stochastic rounding.
        rounding: ``"stochastic"`` or ``"nearest"``; concerns updates of bf16 weights only.

    Raises:
        UserError: for a value outside its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        alpha: float = 1e-3,
        zo_eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        rounding: Rounding = "stochastic",
    ) -> None:
        _check("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        _check("zo_eps", zo_eps, zo_eps > 0, "> 0")
        _check("seed", seed, 0 <= seed < 1 << 64, "in [0, 2**64)")
        _check("rounding", rounding, rounding in ROUNDINGS, f"one of {', '.join(ROUNDINGS)}")
        self._sharding: Sharding | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.alpha = alpha
        self.zo_eps = zo_eps
        self.seed = seed
        self.rounding: Rounding = rounding
        self.index = 0
        self.track_norm = False
        self.report: StepReport | None = None
        self.zeroth_order_loss: float | None = None
        self.first_order_loss: float | None = None
        self._steps: list[Step] = []
        self._updated: set[int] = set()
        self._norms: list[tuple[int, Tensor]] = []
        self._non_finite_in_a_row = 0
        self._non_finite = False

    # ---- the step ------------------------------------------------------------------------------

    def zeroth_order(self, closure: Closure) -> float:
        """Measure g0 with two forward passes; the update itself follows during backward and step.

        For training loops that compute the first-order loss themselves; see `measure` for the
        passes, the errors and a step that is also safe from a first-order loss that is NaN.

        Returns:
            g0, the same number on every rank; 0 if alpha is 0 (the closure is then not called) or
            if a loss was NaN or infinite (the step then has no zeroth-order part).
        """
        self.measure(closure, None)
        return self._steps[0].g0 if self._steps else 0.0

    def measure(self, zeroth_order: Closure | None, first_order: Closure | None) -> Tensor | None:
        """Run the forward passes of a step and average their losses with one all-reduce.

        The two zeroth-order passes run in eval mode (as in MeZO), so that both see the same
        randomness, and without autograd. The stored weights are bit-identical before and after,
        also if a closure raises.

        Args:
            zeroth_order: returns this rank's loss of the zeroth-order batch; not called if alpha
                is 0.
            first_order: returns this rank's loss of the first-order batch; not called if alpha is
                1, and None if the caller computes that loss.

        Both losses are scalars of fp32 or wider. They are averaged over ranks, so a rank's loss
        should be a mean over as many examples as every other rank's, or be scaled accordingly
        (`AddaxTrainer` scales by the global number of target tokens).

        Returns:
            The first-order loss of this rank, to call ``backward()`` on. None if there is none, or
            if its mean over ranks is NaN or infinite: the step is then completed without it.

        Raises:
            RuntimeError: if called twice in a step or after a backward of the same step.
            TypeError: if a loss is of a type narrower than fp32, in which the difference of two
                losses is lost.
            NonFiniteError: after `MAX_NON_FINITE_STEPS` steps in a row with such a loss.
        """
        if self._steps:
            raise RuntimeError(
                "the zeroth-order passes have to come first in a step and once: call step() after "
                "the backward, and zeroth_order() before the next first-order forward"
            )
        if self.alpha > 0.0 and self.sharding.awaiting_backward:
            self.sharding.awaiting_backward = False
            raise RuntimeError(
                "a forward with autograd ran since the last step, and the zeroth-order passes come "
                "before it: its backward would see other weights. Call zeroth_order() first, and "
                "put forwards that train nothing under torch.no_grad(). If that forward is not to "
                "be trained on, call again"
            )
        steps = self._new_steps()
        losses: list[Tensor] = []
        if self.alpha > 0.0 and zeroth_order is not None:
            losses += self._perturbed_losses(zeroth_order, steps[0])
        loss = None
        if self.alpha < 1.0 and first_order is not None:
            try:
                loss = first_order()
                losses.append(_checked_loss(loss))
            except Exception:
                self.sharding.awaiting_backward = False  # its backward will not come
                raise
        means = self._mean_over_ranks(losses) if losses else []
        self.first_order_loss = means.pop() if loss is not None else None
        if means:
            g0 = self._projected_gradient(*means)
            self._steps = [replace(step, g0=g0) for step in steps]
        if self.first_order_loss is not None and not math.isfinite(self.first_order_loss):
            self._skip_non_finite(f"first-order loss {self.first_order_loss}")
            return None
        return loss

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Finish the step: update what got no gradient, then go on to the next z.

        Args:
            closure: not supported; `zeroth_order` takes one.

        Raises:
            ValueError: if a closure is given.
        """
        if closure is not None:
            raise ValueError("Addax.step takes no closure; zeroth_order() does")
        self._begin_step()
        self._check_all_applied()
        for shard in self.sharding.shards():
            if shard.parameter_id not in self._updated:
                self._update(shard, None)
        self.sharding.finish_step()
        self.sharding.awaiting_backward = False
        self.report = self._make_report()
        self.index += 1
        self._steps = []
        self._updated.clear()
        self._norms.clear()
        if not self._non_finite:
            self._non_finite_in_a_row = 0
        self._non_finite = False

    @torch.no_grad()
    def _perturbed_losses(self, closure: Closure, step: Step) -> list[Tensor]:
        """Return this rank's losses at theta + zo_eps z and at theta - zo_eps z."""

        def perturbed(sign: int, shard: Shard) -> Tensor:
            return perturb(shard.data, shard.parameter_id, shard.start, step, sign)

        losses = []
        with evaluation_mode(self.sharding.model), self.sharding.forward_only():
            for sign in (+1, -1):
                with self.sharding.perturbed(partial(perturbed, sign)):
                    losses.append(_checked_loss(closure()))
        return losses

    def _projected_gradient(self, loss_plus: float, loss_minus: float) -> float:
        """Return g0; 0, with a note that this part is left out, where it is NaN or infinite."""
        self.zeroth_order_loss = (loss_plus + loss_minus) / 2
        g0 = (loss_plus - loss_minus) / (2 * self.zo_eps)
        if math.isfinite(g0):
            return g0
        self._skip_non_finite(f"zeroth-order losses {loss_plus} and {loss_minus}")
        return 0.0

    def _on_gradient(self, shard: Shard, gradient: Tensor) -> None:
        """Apply the step to a shard whose averaged gradient has just arrived."""
        self._begin_step()
        gradient = gradient[: shard.data.numel()]
        if self.track_norm:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            self._norms.append((shard.group, norm))
        self._update(shard, gradient)

    @torch.no_grad()
    def _update(self, shard: Shard, gradient: Tensor | None) -> None:
        if shard.parameter_id in self._updated:
            raise RuntimeError(
                f"{shard.name} got a second gradient in one step: with updates in place each step "
                "is one backward followed by step(); gradient accumulation is not supported"
            )
        step = self._steps[shard.group]
        apply_update(
            shard.data, gradient, shard.parameter_id, shard.start, step, decayed=shard.decayed
        )
        self._updated.add(shard.parameter_id)

    def _check_all_applied(self) -> None:
        name = self.sharding.unapplied_gradient()
        if name is not None:
            raise RuntimeError(
                f"{name} has a gradient that was not applied, because it was not reduced (no_sync, "
                "set_requires_gradient_sync, set_requires_all_reduce): each step is one backward "
                "with reduction"
            )

    def _begin_step(self) -> None:
        """Fix the values of this step, unless `zeroth_order` did."""
        if self._steps:
            return
        if self.alpha > 0.0:
            raise RuntimeError(
                f"alpha is {self.alpha}, but zeroth_order() was not called in this step, so it "
                "has no g0: call it before the first-order forward, or set alpha to 0"
            )
        self._steps = self._new_steps()

    def _new_steps(self) -> list[Step]:
        """One value per parameter group; the groups differ in lr and weight decay alone."""
        self.sharding.check_unchanged()
        return [
            Step(
                seed=self.seed,
                index=self.index,
                lr=float(group["lr"]),
                alpha=self.alpha,
                zo_eps=self.zo_eps,
                weight_decay=float(group["weight_decay"]),
                rounding=self.rounding,
            )
            for group in self.param_groups
        ]

    # ---- what all ranks agree on ---------------------------------------------------------------

    def _mean_over_ranks(self, values: list[Tensor]) -> list[float]:
        """Average scalars over ranks in fp64 with one all-reduce; the same on all ranks."""
        device = self.sharding.device
        total = torch.stack([value.detach().to(device, torch.float64) for value in values])
        self.sharding.sum_over_ranks(total)
        return (total / self.sharding.world_size).tolist()

    def _skip_non_finite(self, what: str) -> None:
        """Note that a part of this step is left out because its loss is NaN or infinite.

        Raises:
            NonFiniteError: after `MAX_NON_FINITE_STEPS` such steps in a row.
        """
        if not self._non_finite:
            self._non_finite = True
            self._non_finite_in_a_row += 1
        logger.warning("step %d: %s: that part of the step is skipped", self.index, what)
        if self._non_finite_in_a_row >= MAX_NON_FINITE_STEPS:
            raise NonFiniteError(
                f"{what} at step {self.index}, the {self._non_finite_in_a_row}th step in a row "
                "with a loss that is NaN or infinite: lower the learning rate, or look at the data "
                "of these steps"
            )

    def _make_report(self) -> StepReport:
        step, norms = self._steps[0], self._gradient_norms()
        lrs = [group.lr for group in self._steps]
        sizes = [math.sqrt(elements) for elements in self.sharding.group_elements]
        return StepReport(
            g0=step.g0 if step.alpha > 0 else None,
            zeroth_order_loss=self.zeroth_order_loss if step.alpha > 0 else None,
            first_order_loss=self.first_order_loss,
            zeroth_order_norm=step.alpha * abs(step.g0) * math.hypot(*map(mul, lrs, sizes)),
            first_order_norm=(1 - step.alpha) * math.hypot(*map(mul, lrs, norms))
            if norms
            else None,
            gradient_norm=math.hypot(*norms) if norms else None,
        )

    def _gradient_norms(self) -> list[float]:
        """Norm of this step's first-order gradient over all ranks' shards, by parameter group."""
        if not self.track_norm:
            return []
        device = self.sharding.device
        squares = torch.zeros(len(self.param_groups), dtype=torch.float64, device=device)
        for group, norm in self._norms:
            squares[group] += norm.to(device, torch.float64).square()
        self.sharding.sum_over_ranks(squares)
        return (squares / self.sharding.replicas).sqrt().tolist()

    # ---- binding and state ---------------------------------------------------------------------

    @property
    def sharding(self) -> Sharding:
        """The back end that holds the weights."""
        if self._sharding is None:
            raise RuntimeError(
                "Addax is not attached to a model: call addax_ds.attach(optimizer, model), or give "
                'DeepSpeed the optimizer by "type": "Addax"'
            )
        return self._sharding

    def bind(self, sharding: Sharding) -> None:
        """Work on the shards of ``sharding`` from now on; `addax_ds.attach` calls this.

        Raises:
            UserError: for weights that are neither fp32 nor bf16; fp16 gradients need loss scaling.
        """
        dtypes = {info.parameter.dtype for info in sharding.infos}
        if dtypes - {torch.float32, torch.bfloat16}:
            raise UserError(
                "Addax trains fp32 and bf16 weights, and these are "
                f"{', '.join(sorted(map(str, dtypes)))}. fp16 gradients need loss scaling, and an "
                "update applied during backward cannot be undone after an overflow: use bf16"
            )
        if torch.bfloat16 in dtypes and self.alpha > 0 and self.zo_eps < SMALLEST_BF16_ZO_EPS:
            logger.warning(
                "zo_eps %g is below %g with bf16 weights: the loss difference drowns in rounding "
                "and g0 is noise. Use a larger zo_eps or fp32.",
                self.zo_eps,
                SMALLEST_BF16_ZO_EPS,
            )
        name = sharding.unapplied_gradient()
        if name is not None:
            raise UserError(
                f"{name} has a gradient from before the optimizer was attached, which would be "
                "added to that of the first step: call model.zero_grad() first"
            )
        if self._sharding is not None:
            self._sharding.detach()
        sharding.attach(self._on_gradient)
        self._sharding = sharding

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own ``lr`` and ``weight_decay``, before the optimizer is attached.

        Raises:
            UserError: if it is attached, or a value lies outside its range.
        """
        if self._sharding is not None:
            raise UserError("Addax: add parameter groups before the optimizer is attached")
        super().add_param_group(param_group)
        for name in ("lr", "weight_decay"):
            value = self.param_groups[-1][name]
            _check(name, value, value >= 0, ">= 0")

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups, the step index and the seed; there is nothing else."""
        return {**super().state_dict(), "addax": {"index": self.index, "seed": self.seed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a `state_dict` was taken.

        Raises:
            UserError: if the state was saved with another seed, whose z this run would not
                reproduce.
        """
        own = state_dict["addax"]
        if own["seed"] != self.seed:
            raise UserError(
                f"the checkpoint was written with seed {own['seed']}, this run has seed "
                f"{self.seed}: resume with --seed {own['seed']}"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "addax"})
        self.index = own["index"]


def unwrap(optimizer: Any) -> Addax:
    """Return the `Addax` inside the wrappers of DeepSpeed and Accelerate."""
    while not isinstance(optimizer, Addax):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"expected an Addax optimizer, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _checked_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("the closure of zeroth_order() has to return the loss as a scalar tensor")
    if not loss.is_floating_point() or torch.finfo(loss.dtype).bits < 32:
        raise TypeError(
            f"a pass returned a loss of type {loss.dtype}: g0 is a small difference of two losses "
            "and would be lost. Compute the loss in fp32 (logits.float()); under FSDP2 set "
            "MixedPrecisionPolicy(output_dtype=torch.float32), which Accelerate takes as "
            "mixed_precision_policy of FullyShardedDataParallelPlugin and whose default is bf16"
        )
    return loss.detach().reshape(())


def _check(name: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"Addax: {name} has to be {wanted}, got {value!r}")
