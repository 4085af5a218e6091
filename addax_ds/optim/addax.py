"""Addax as a `torch.optim.Optimizer`.

Li, Zhang, Zhong, Deng, Razaviyayn, Mirrokni: "Addax: Utilizing Zeroth-Order Gradients to Improve
Memory Efficiency and Performance of SGD for Fine-Tuning Language Models", ICLR 2025
(arXiv 2410.06441), Algorithm 1.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Unpack

import torch
from torch import Tensor

from addax_ds.optim.call_order import (
    check_all_applied,
    check_backward_ran,
    check_loss_of_caller,
    check_passes_come_first,
)
from addax_ds.optim.estimator import Estimator, TwoSidedDifference
from addax_ds.optim.gradients import FirstOrder, SkippedUpdates
from addax_ds.optim.hyperparameters import (
    HYPERPARAMETERS,
    HyperparameterKwargs,
    Hyperparameters,
    problems,
)
from addax_ds.optim.loss_scale import UNSCALED, LossScale
from addax_ds.optim.passes import IsolatedPasses, not_compiled
from addax_ds.optim.report import NonFiniteSteps, StepReport
from addax_ds.optim.step import Closure, RunningStep
from addax_ds.optim.update import Rounding, Step
from addax_ds.sharding.base import Shard, Sharding
from addax_ds.sharding.reads import outermost
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)

SMALLEST_BF16_ZO_EPS = 5e-4
"""Below it bf16 weights cannot follow the perturbation: at 1e-4 the correlation of g0 with
<z, grad L> on SmolLM2-135M was -0.12, at 1e-3 it was 0.97."""

_BY_GROUP = tuple(known for known in HYPERPARAMETERS if known.by_group)
_FOR_ALL_GROUPS = tuple(known for known in HYPERPARAMETERS if not known.by_group)
_FIXED = tuple(known for known in _FOR_ALL_GROUPS if known.on_resume == "fixed")


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
    :math:`q`           ``zo_directions``      number of independent z in a step
    ==================  =====================  ================================================

    With several directions :math:`g^0 z` is the mean of :math:`g^0_k z_k`, each measured like the
    one of the paper on the same batch: its variance falls with q, and a step takes 2 q
    zeroth-order passes (`addax_ds.optim.estimator`).

    Parameters that no zeroth-order pass of a step reads, on any rank, get no zeroth-order part in
    it (`addax_ds.sharding.reads`).

    For bf16 and fp16 weights the update credits, in place of z, what the passes at +eps and -eps
    see of it after rounding (`addax_ds.optim.update`).

    One step is ``loss = measure(zeroth_order, first_order)``, which takes two closures and runs
    their forwards; then ``loss.backward()``, which updates each parameter as soon as its gradient
    exists; then ``step()``, which updates what got no gradient. The weights are all the state there
    is.

    No update that is NaN or infinite reaches a weight: an element whose new value would not be
    finite keeps its old one, and all ranks learn of it at the end of the step
    (``report.has_nonfinite``).

    Attributes:
        index: number of the next step.
        track_norm: whether steps measure the norm of the first-order gradient, which costs one more
            read of it.
        zeroth_order_loss: mean over ranks of `Estimate.loss` that `measure` computed last; of
            two-sided differences the mean over their passes.
        first_order_loss: mean over ranks of the first-order loss that `measure` computed last.
        loss_scale: factor of the first-order loss in this step; constant 1 but for fp16 weights.
        stop_requested: set it, on any rank, and `report` says so on all ranks after the same step.
        report: what the last step did.

    Args:
        params: parameters or parameter groups, as for any optimizer; a group may have its own
            ``lr`` and ``weight_decay``.
        lr: learning rate, >= 0.
        loss_scale: for fp16 weights (default: `LossScale`'s own, which adjusts itself).
        **hyperparameters: those of `Hyperparameters`, which says their defaults and ranges.

            - ``alpha``: weight of the zeroth-order part, in [0, 1] (default 1e-3).
            - ``zo_eps``: perturbation scale, > 0 (default 1e-3). It is not called ``eps`` because
              Trainer compares that name with Adam's.
            - ``weight_decay``: decoupled weight decay, >= 0 (default 0).
            - ``seed``: 64-bit seed of z and of stochastic rounding (default 0).
            - ``rounding``: ``"stochastic"`` (default) or ``"nearest"``; concerns updates of bf16
              and fp16 weights.
            - ``max_grad_norm``: the first-order gradient g1 is scaled down to this 2-norm over all
              parameters; 0, the default, never does. With one micro-batch the norm is found by a
              backward of its own, so a step runs its first-order forward and backward twice; with
              several, the step is applied from their sum.
            - ``zo_directions``: number of independent directions z in a step, from 1 to 1024
              (default 1). Each costs two zeroth-order passes, and no memory.

    Raises:
        UserError: for a value outside its range.
    """

    alpha: float
    zo_eps: float
    seed: int
    rounding: Rounding
    max_grad_norm: float
    zo_directions: int

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        loss_scale: LossScale | None = None,
        **hyperparameters: Unpack[HyperparameterKwargs],
    ) -> None:
        values = asdict(Hyperparameters(lr=lr, **hyperparameters))
        self._sharding: Sharding | None = None
        super().__init__(params, {known.name: values.pop(known.name) for known in _BY_GROUP})
        for name, value in values.items():
            setattr(self, name, value)
        self._estimator: Estimator | None = None
        self.loss_scale = loss_scale or UNSCALED
        self._loaded_scale = UNSCALED
        self.index = 0
        self.track_norm = False
        self.stop_requested = False
        self.report: StepReport | None = None
        self.zeroth_order_loss: float | None = None
        self.first_order_loss: float | None = None
        self._running: RunningStep | None = None
        self._non_finite = NonFiniteSteps()
        self._skipped: SkippedUpdates | None = None
        self._passes: IsolatedPasses | None = None
        self._told_of_unread = False

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Values of the hyperparameters that hold for all parameter groups, by name."""
        return {known.name: getattr(self, known.name) for known in _FOR_ALL_GROUPS}

    @property
    def estimator(self) -> Estimator:
        """The zeroth-order part of steps: that of ``zo_directions``, or one that was assigned.

        Both may be assigned between two steps.
        """
        return self._estimator or TwoSidedDifference(self.zo_directions)

    @estimator.setter
    def estimator(self, estimator: Estimator) -> None:
        self._estimator = estimator

    # ---- the step ------------------------------------------------------------------------------

    def measure(
        self,
        zeroth_order: Closure | Sequence[Closure] | None,
        first_order: Closure | Sequence[Closure] | None,
    ) -> Tensor | None:
        """Run the forward passes of a step and average their losses with one all-reduce.

        The zeroth-order passes run in eval mode (as in MeZO), without autograd, and what closures
        draw of torch's default random generators is the same in all of them. The stored weights are
        bit-identical before and after, also if a closure raises.

        Several closures are micro-batches of one step. Zeroth-order ones cost passes alone. Of
        first-order ones all but the last are run backward here, and their gradients are summed in
        fp32, 4 bytes for each element of this rank's shards.

        Args:
            zeroth_order: each returns this rank's loss of a zeroth-order micro-batch, in every
                pass of `estimator`; not called if alpha is 0.
            first_order: each returns this rank's loss of a first-order micro-batch; not called if
                alpha is 1. To clip a single micro-batch its closure is called twice, with the same
                state of torch's random generators. None if the caller computes that loss: a NaN in
                it is not caught, and clipping or a loss scale is refused.

        Losses are scalars of fp32 or wider. They are averaged over ranks and micro-batches, so each
        should be a mean over as many examples as every other, or be scaled accordingly
        (`AddaxTrainer` scales by the global number of target tokens).

        Returns:
            What to call ``backward()`` on: the first-order loss of this rank's last micro-batch,
            divided by their number and multiplied by the loss scale. None if there is none, or if
            the mean loss or the norm to clip by is NaN or infinite: the step is then completed
            without it.

        Raises:
            RuntimeError: if called twice in a step or after a backward of the same step; without
                ``first_order`` if there is something to clip or to scale; if the zeroth-order
                passes read no trainable parameter.
            TypeError: if a loss is of a type narrower than fp32, in which the difference of two
                losses is lost.
        """
        check_passes_come_first(self.alpha, self._running is not None, self.sharding.calls)
        zeroth, first = self._parts(zeroth_order, first_order)
        if not first:
            check_loss_of_caller(self.alpha, self.max_grad_norm, self.loss_scale)
        if not zeroth and not first:
            return None
        with self._measuring() as running:
            loss = running.measure(zeroth, first)
        self.sharding.calls.gradient_arrived = False  # backwards of passes are not the last one
        if loss is None:
            self.sharding.calls.clear()  # no backward is to come
        if zeroth:
            self._tell_of_unread({info.name for info in running.unread.values()})
        self.zeroth_order_loss = running.zeroth_order_loss
        self.first_order_loss = running.first_order_loss
        return loss

    def abandon(self) -> None:
        """Drop the step that has begun, as after an exception in its backward.

        `measure` and `rehearse` do it themselves. Weights that the backward has updated by then
        keep their updates. All ranks have to call it at the same point; see `Sharding.abandon`.
        """
        self.sharding.abandon()
        self._running = None

    def rehearse(
        self,
        zeroth_order: Closure | Sequence[Closure] | None,
        first_order: Closure | Sequence[Closure] | None,
    ) -> None:
        """Run the passes of a step, backward too, for the memory that they need.

        Nothing that a later step reads is changed: weights, step number, random generators, loss
        scale. If a pass raises, such as for want of memory, it is abandoned, and the next step or
        rehearsal is as if it had not been; see `Sharding.abandon`.

        Args:
            zeroth_order: see `measure`; one micro-batch needs as much memory as several.
            first_order: see `measure`; two need as much as more.

        Raises:
            RuntimeError: within a step.
        """
        check_passes_come_first(self.alpha, self._running is not None, self.sharding.calls)
        zeroth, first = self._parts(zeroth_order, first_order)
        with self._measuring() as running:
            running.rehearse(zeroth, first)
            self.sharding.weights_changed()  # they have not, but what is gathered has to go
        self._running = None
        self.sharding.calls.clear()

    @contextmanager
    def _measuring(self) -> Iterator[RunningStep]:
        """Begin a step whose closures run in the body, and abandon it if one raises."""
        running = self._running = self._new_step()
        running.is_measuring = True
        try:
            yield running
        except BaseException:
            self.abandon()
            raise
        running.is_measuring = False

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Finish the step: update what got no gradient, then go on to the next z.

        Args:
            closure: not supported; `measure` takes some.

        Raises:
            ValueError: if a closure is given.
            RuntimeError: within `measure`, or if a first-order forward ran and no backward.
            NonFiniteError: after `MAX_NON_FINITE_STEPS` steps in a row in which a loss, or the
                update of some weights, was NaN or infinite. (Overflows of fp16 gradients count only
                once the loss scale cannot be lowered.)
        """
        if closure is not None:
            raise ValueError("Addax.step takes no closure; measure() does")
        if self._running is not None and self._running.is_measuring:
            raise RuntimeError("step() was called within a closure: call it after measure()")
        self.sharding.check_unchanged()
        check_all_applied(self.sharding)
        has_begun = self._running is not None
        if has_begun or self.alpha == 0.0:
            check_backward_ran(self.alpha, has_begun, self.sharding.calls)
        running = self._begun_step()
        self.report = running.finish(self.stop_requested)
        self.sharding.calls.clear()
        self._running = None
        self.index += 1
        problems = running.problems
        if not (running.overflow and self.loss_scale.can_shrink):
            problems = [*problems, *running.overflow]
        self.loss_scale = self.loss_scale.after(bool(running.overflow))
        self._non_finite.count(self.report.index, problems)

    def _on_gradients(self, shards: Sequence[Shard], gradients: Sequence[Tensor]) -> None:
        self.sharding.calls.gradient_arrived = True  # not every back end notes it itself
        self._begun_step().take(shards, gradients)

    def _begun_step(self) -> RunningStep:
        """Return the running step; at alpha 0 a caller's own backward may begin one without passes.

        Raises:
            RuntimeError: if the step should have begun with passes.
        """
        if self._running is None:
            if self.alpha > 0.0:
                raise RuntimeError(
                    f"alpha is {self.alpha}, but measure() was not called in this step, so it has "
                    "no g0: call it before the first-order forward, or set alpha to 0"
                )
            check_loss_of_caller(self.alpha, self.max_grad_norm, self.loss_scale)
            self._running = self._new_step()
        return self._running

    def _new_step(self) -> RunningStep:
        """Fix the values of a step, by parameter group: these differ in lr and weight decay."""
        self.sharding.check_unchanged()
        assert self._skipped is not None
        assert self._passes is not None
        by_group = [
            Step(
                seed=self.seed,
                index=self.index,
                lr=float(group["lr"]),
                alpha=self.alpha,
                zo_eps=self.zo_eps,
                weight_decay=float(group["weight_decay"]),
                rounding=self.rounding,
                gradient_scale=1.0 / self.loss_scale.value,
            )
            for group in self.param_groups
        ]
        return RunningStep(
            sharding=self.sharding,
            passes=self._passes,
            by_group=by_group,
            estimator=self.estimator,
            first_order=FirstOrder(
                self.sharding,
                loss_scale=self.loss_scale.value,
                max_grad_norm=self.max_grad_norm,
                track_norm=self.track_norm,
            ),
            skipped=self._skipped,
        )

    def _tell_of_unread(self, unread: set[str]) -> None:
        names = [info.name for info in self.sharding.infos]
        if unread and not self._told_of_unread:
            logger.warning(
                "step %d: its zeroth-order passes read %d of %d trainable parameters. The others "
                "get no zeroth-order part while no pass reads them: %s",
                self.index,
                len(names) - len(unread),
                len(names),
                ", ".join(outermost(sorted(unread), [n for n in names if n not in unread])),
            )
        self._told_of_unread = True

    def _parts(
        self,
        zeroth_order: Closure | Sequence[Closure] | None,
        first_order: Closure | Sequence[Closure] | None,
    ) -> tuple[list[Closure], list[Closure]]:
        """Return the closures of both parts; a part without weight has none."""
        zeroth = [*map(not_compiled, _listed(zeroth_order))] if self.alpha > 0.0 else []
        return zeroth, _listed(first_order) if self.alpha < 1.0 else []

    # ---- binding and state ---------------------------------------------------------------------

    @property
    def sharding(self) -> Sharding:
        """The back end that holds the weights."""
        if self._sharding is None:
            raise RuntimeError(
                "Addax is not attached to a model: call addax_ds.attach(optimizer, model), or give "
                'DeepSpeed the optimizer by "type": "Addax" with ZeRO stage 3'
            )
        return self._sharding

    @property
    def is_attached(self) -> bool:
        """Whether it gets the gradients of a model."""
        return self._sharding is not None and self._sharding.is_attached

    def bind(self, sharding: Sharding) -> None:
        """Work on the shards of ``sharding`` from now on; `addax_ds.attach` calls this.

        Raises:
            UserError: for weights of another type than fp32, bf16 and fp16.
        """
        dtypes = {info.parameter.dtype for info in sharding.infos}
        if dtypes - {torch.float32, torch.bfloat16, torch.float16}:
            raise UserError(
                "Addax trains fp32, bf16 and fp16 weights, and these are "
                f"{', '.join(sorted(map(str, dtypes)))}"
            )
        if not sharding.infos:
            raise UserError("Addax: none of the parameters it was given is trainable")
        if torch.float16 in dtypes and self.loss_scale is UNSCALED:  # nobody gave one
            self.loss_scale = LossScale().resumed(self._loaded_scale)
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
        self._running = None
        sharding.attach(self._on_gradients)
        self._sharding = sharding
        self._skipped = SkippedUpdates([info.name for info in sharding.infos])
        self._passes = IsolatedPasses(sharding)
        self._told_of_unread = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own ``lr`` and ``weight_decay``, before the optimizer is attached.

        Raises:
            UserError: if it is attached, a value lies outside its range, or a group cannot have it.
        """
        if self._sharding is not None:
            raise UserError("Addax: add parameter groups before the optimizer is attached")
        for known in _FOR_ALL_GROUPS:
            if known.name in param_group:
                raise UserError(
                    f"Addax: {known.name} holds for all groups: give it to Addax, not to one"
                )
        super().add_param_group(param_group)
        values = {known.name: self.param_groups[-1][known.name] for known in _BY_GROUP}
        raise_problems("Addax: a parameter group cannot have:", list(problems(values)))

    def state_dict(self) -> dict[str, Any]:
        """Return the parameter groups and a few numbers; there is nothing else."""
        own = {
            "index": self.index,
            **{known.name: getattr(self, known.name) for known in _FIXED},
            "loss_scale": asdict(self.loss_scale),
            "non_finite_in_a_row": self._non_finite.in_a_row,
        }
        return {**super().state_dict(), "addax": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a `state_dict` was taken.

        Raises:
            UserError: if the state is that of another optimizer, or was saved with another seed,
                whose z this run would not reproduce.
        """
        if "addax" not in state_dict:
            raise UserError("this is the state of another optimizer, and not of Addax")
        own = state_dict["addax"]
        for known in _FIXED:
            saved, value = own[known.name], getattr(self, known.name)
            if saved != value:
                raise UserError(
                    f"the checkpoint was written with {known.name} {saved}, this run has "
                    f"{known.name} {value}: resume with --{known.flag} {saved}"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "addax"})
        self.index = own["index"]
        self._loaded_scale = LossScale(**own["loss_scale"])  # for weights of a type not known yet
        self.loss_scale = self.loss_scale.resumed(self._loaded_scale)
        self._non_finite.in_a_row = own["non_finite_in_a_row"]


def unwrap(optimizer: Any) -> Addax:
    """Return the `Addax` inside the wrappers of DeepSpeed and Accelerate."""
    while not isinstance(optimizer, Addax):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(f"expected an Addax optimizer, got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _listed(closures: Closure | Sequence[Closure] | None) -> list[Closure]:
    if closures is None:
        return []
    return [closures] if callable(closures) else list(closures)
