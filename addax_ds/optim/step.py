"""One step of Addax in progress: its losses, its gradients, and what ranks agree on."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from addax_ds.distributed.collectives import all_gather_object
from addax_ds.optim.contributions import Contributions
from addax_ds.optim.estimator import Estimate, Estimator, Pass
from addax_ds.optim.gradients import FirstOrder, Pairs, SkippedUpdates, Use
from addax_ds.optim.hyperparameters import runs_twice_to_clip
from addax_ds.optim.passes import IsolatedPasses, forget_casts
from addax_ds.optim.report import StepReport
from addax_ds.optim.update import Step, apply_update, perturb
from addax_ds.sharding.base import ParameterInfo, Shard, Sharding
from addax_ds.utils.generators import generators_kept

logger = logging.getLogger(__name__)

Closure = Callable[[], Tensor]


class RunningStep:
    """A step from its first pass to its report; the next step is another object.

    Args:
        sharding: the back end.
        passes: the zeroth-order passes over its model.
        by_group: the values of the step, by parameter group, without the coefficients.
        estimator: the zeroth-order part.
        first_order: the first-order part, without gradients yet.
        skipped: flags of updates that were skipped, which are unset here.

    Attributes:
        zeroth_order_loss: mean over ranks, as the estimator has it, once it is known.
        first_order_loss: mean over ranks and micro-batches, once it is known.
        unread: trainable parameters that no zeroth-order pass of any rank read, by index: the loss
            does not depend on them, and they get no zeroth-order part.
        is_measuring: whether closures are running, which may not call `Addax.step`.
        problems: what was NaN or infinite, in words.
        overflow: what of the first-order part was not finite and may be with a smaller loss scale,
            in words; at most one entry.
    """

    def __init__(
        self,
        *,
        sharding: Sharding,
        passes: IsolatedPasses,
        by_group: list[Step],
        estimator: Estimator,
        first_order: FirstOrder,
        skipped: SkippedUpdates,
    ) -> None:
        self.zeroth_order_loss: float | None = None
        self.first_order_loss: float | None = None
        self.problems: list[str] = []
        self.overflow: list[str] = []
        self.is_measuring = False
        self.unread: dict[int, ParameterInfo] = {}
        self._sharding = sharding
        self._passes = passes
        self._by_group = by_group
        self._estimator = estimator
        self._estimate: Estimate | None = None
        self._first_order = first_order
        self._updated: set[int] = set()
        self._skipped = skipped
        skipped.clear()

    @property
    def g0(self) -> float:
        """The projected gradient (`Estimate.g0`); 0 if there is none."""
        return self._estimate.g0 if self._estimate else 0.0

    @property
    def _has_first_order(self) -> bool:
        return self._by_group[0].alpha < 1.0 and not self._first_order.is_dropped

    # ---- forward passes ------------------------------------------------------------------------

    def measure(self, zeroth_order: list[Closure], first_order: list[Closure]) -> Tensor | None:
        """See `Addax.measure`; an empty list is a part that this step does not have."""
        passes = self._estimator.passes
        losses = self._perturbed_losses(zeroth_order, passes) if zeroth_order else []
        forget_casts()  # one that was made without autograd has no gradient
        if not first_order:
            self._agree(losses, None)
            return None
        if runs_twice_to_clip(self._first_order.max_grad_norm, len(first_order)):
            return self._measure_to_clip(losses, first_order[0])
        loss, mean = self._run_micro_batches(first_order)
        if not self._agree(losses, mean):
            return None
        if self._first_order.max_grad_norm > 0.0:
            self._first_order.defer()  # finish() clips and applies the sum
        return loss

    def _measure_to_clip(self, losses: list[Tensor], closure: Closure) -> Tensor | None:
        """Find the norm of g1 by a backward of its own; return the loss of a second forward."""
        with generators_kept(self._sharding.device):
            loss, mean = self._run_micro_batches([closure])
            if not self._agree(losses, mean):
                return None
            with self._sharding.other_gradients_kept():
                self._backward(loss, Use.TAKE_NORM)
        return self._scaled(closure(), 1) if self._clip() else None

    def rehearse(self, zeroth_order: list[Closure], first_order: list[Closure]) -> None:
        """Run a step's passes, two zeroth-order ones, and apply nothing; discard this object then.

        Gradients take as much memory as in a step: they are summed if there are several.
        """
        use = Use.ACCUMULATE if len(first_order) > 1 else Use.TAKE_NORM
        with generators_kept(self._sharding.device), self._sharding.other_gradients_kept():
            if zeroth_order:
                # The others hold what these hold.
                self._perturbed_losses(zeroth_order, self._estimator.passes[:2])
            if first_order:
                loss, _ = self._run_micro_batches(first_order)
                self._backward(loss, use)

    def _perturbed_losses(self, closures: list[Closure], passes: Sequence[Pass]) -> list[Tensor]:
        """Return this rank's mean loss of each pass."""
        means = []
        # A gradient would be of perturbed weights.
        with self._first_order.used_to(Use.REFUSE), self._passes.of_step():
            for number, each in enumerate(passes, start=1):
                shown = partial(perturb, step=self._by_group[0], sign=each.sign, probe=each.probe)
                # Noise or masks that closures draw have to be the same in all passes: g0 is the
                # difference of two.
                is_last = number == len(passes)
                draws = nullcontext() if is_last else generators_kept(self._sharding.device)
                with draws, self._passes.perturbed(shown):
                    losses = [_checked(closure()) for closure in closures]
                means.append(torch.stack(losses).mean())
        return means

    def _run_micro_batches(self, closures: list[Closure]) -> tuple[Tensor, Tensor]:
        """Run all forwards, and all backwards but the last; return its loss and their mean."""
        means = []
        for closure in closures[:-1]:
            loss = closure()
            means.append(_checked(loss))
            self._backward(self._scaled(loss, len(closures)), Use.ACCUMULATE)
        loss = closures[-1]()
        means.append(_checked(loss))
        return self._scaled(loss, len(closures)), torch.stack(means).mean()

    def _scaled(self, loss: Tensor, micro_batches: int) -> Tensor:
        return loss * (self._first_order.loss_scale / micro_batches)

    def _backward(self, loss: Tensor, use: Use) -> None:
        with self._first_order.used_to(use):
            self._sharding.backward(loss)

    # ---- gradients -----------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, shards: Sequence[Shard], gradients: Sequence[Tensor]) -> None:
        """Use averaged gradients of shards as soon as they are reduced."""
        self._update(self._first_order.take(shards, gradients))

    def _update(self, pairs: Pairs) -> None:
        """Update shards by their gradients, those that are alike in one call."""
        alike: dict[tuple, Pairs] = {}
        for shard, gradient in pairs:
            if shard.index in self._updated:
                raise RuntimeError(
                    f"{shard.name} got a second gradient in one step: with updates in place each "
                    "step is one backward followed by step(). To accumulate gradients, give "
                    "measure() one closure for each micro-batch"
                )
            self._updated.add(shard.index)
            weight, decays = shard.data, self._by_group[shard.group].weight_decay != 0.0
            types = weight.dtype, None if gradient is None else gradient.dtype
            key = (*types, weight.device, shard.group, shard.decayed and decays, self._reads(shard))
            alike.setdefault(key, []).append((shard, gradient))
        for (*_, device, group, decayed, is_read), members in alike.items():
            step = (
                self._by_group[group]
                if is_read
                else replace(self._by_group[group], coefficients=())
            )
            shards = [shard for shard, _ in members]
            gradients = [gradient for _, gradient in members if gradient is not None] or None
            apply_update(shards, gradients, step, decayed, self._skipped.flags(device))

    def _reads(self, shard: Shard) -> bool:
        """Return whether a zeroth-order pass of any rank has read a parameter."""
        return shard.index not in self.unread

    def _clip(self) -> bool:
        """Scale the step by the norm of g1; return whether that is finite."""
        scale = self._first_order.clip()
        if scale is None:
            norm = self._first_order.norm
            self._leave_out(f"norm {norm} of the first-order gradient", self.overflow)
            return False
        self._by_group = [replace(step, gradient_scale=scale) for step in self._by_group]
        return True

    # ---- what all ranks agree on ---------------------------------------------------------------

    def _agree(self, zeroth_order: list[Tensor], first_order: Tensor | None) -> bool:
        """Average the losses over ranks, in fp64 and with one all-reduce, and fix the estimate.

        Returns:
            Whether the first-order loss, if there is one, is finite.
        """
        values = zeroth_order if first_order is None else [*zeroth_order, first_order]
        if zeroth_order:
            values = [*values, torch.tensor(self._sharding.reads.by_parameter().count(False))]
        device = self._sharding.device
        # fp64, as g0 is a small difference of two of these sums.
        total = torch.stack([value.to(device, torch.float64) for value in values])
        self._sharding.sum_over_ranks(total)
        means = (total / self._sharding.world_size).tolist()
        if zeroth_order and means.pop():
            self._agree_on_unread()
        if first_order is not None:
            self.first_order_loss = means.pop()
        if means:
            self._take_estimate(means)
        if self.first_order_loss is None or math.isfinite(self.first_order_loss):
            return True
        self._leave_out(f"first-order loss {self.first_order_loss}", self.problems)
        self._first_order.drop()
        return False

    def _agree_on_unread(self) -> None:
        """Find what no rank has read; a collective of its own, which others do without."""
        read = torch.tensor(self._sharding.reads.by_parameter(), dtype=torch.float64)
        read = read.to(self._sharding.device)
        self._sharding.sum_over_ranks(read)
        infos = zip(self._sharding.infos, read.tolist(), strict=True)
        self.unread = {info.index: info for info, ranks in infos if not ranks}
        if len(self.unread) == len(self._sharding.infos):
            raise RuntimeError(
                "the zeroth-order passes read no trainable parameter: their closures have to call "
                "the model that the optimizer is attached to, and not in a compiled function"
            )

    def _take_estimate(self, losses: list[float]) -> None:
        """Complete the step by its coefficients, or leave that part out if they are not finite."""
        estimate = self._estimator.estimate(losses, self._by_group[0].zo_eps)
        self.zeroth_order_loss = estimate.loss
        if not all(map(math.isfinite, estimate.coefficients)):
            causes = [loss for loss in losses if not math.isfinite(loss)] or losses
            said = " and ".join(map(str, losses if len(losses) <= 2 else causes))
            self._leave_out(f"zeroth-order losses {said}", self.problems)
            return
        self._estimate = estimate
        self._by_group = [
            replace(step, coefficients=estimate.coefficients) for step in self._by_group
        ]

    def finish(self, stop_requested: bool) -> StepReport:
        """Update what got no gradient, and report, with one all-reduce.

        Args:
            stop_requested: this rank's wish, which all ranks will find in the report.
        """
        self._sharding.hand_over()
        if self._first_order.is_deferred:
            self._clip()
        self._update(self._first_order.rest(self._sharding.shards(without=self._updated)))
        self._sharding.weights_changed()
        forget_casts()
        device = self._sharding.device
        values = torch.zeros(2 + len(self._by_group), dtype=torch.float64, device=device)
        values[0] = self._skipped.any()
        values[1] = float(stop_requested)
        values[2:] = self._first_order.squares()
        self._sharding.sum_over_ranks(values)
        skipped, stop, *squares = values.tolist()
        self._first_order.end_tracking(squares)
        if skipped:
            self._note_skipped_updates()
        return self._report(stop_requested=stop > 0)

    def _leave_out(self, what: str, problems: list[str]) -> None:
        problems.append(what)
        logger.warning(
            "step %d: %s: that part of the step is skipped", self._by_group[0].index, what
        )

    def _note_skipped_updates(self) -> None:
        """Log the parameters with skipped updates; collective, and rare."""
        names = sorted(
            {name for names in all_gather_object(self._skipped.names()) for name in names}
        )
        others = f" and {len(names) - 1} other parameter(s)" if len(names) > 1 else ""
        problem = f"an update of {names[0]}{others} that is not finite"
        # Without a first-order part there was nothing scaled in it.
        (self.overflow if self._has_first_order else self.problems).append(problem)
        logger.warning(
            "step %d: %s: the elements concerned keep their weights",
            self._by_group[0].index,
            problem,
        )

    def _report(self, stop_requested: bool) -> StepReport:
        elements = list(self._sharding.group_elements)
        for info in self.unread.values():
            elements[info.group] -= self._sharding.full_shape(info.parameter).numel()
        first, estimate = self._by_group[0], self._estimate
        loss_scale = self._first_order.loss_scale
        clip_coefficient = first.gradient_scale * loss_scale
        parts = Contributions(
            groups=self._by_group,
            estimate=estimate,
            elements=elements,
            gradient_norms=self._first_order.norms,
            clip_coefficient=clip_coefficient if self._has_first_order else 0.0,
        )
        return StepReport(
            index=first.index,
            g0=parts.g0,
            zeroth_order_loss=self.zeroth_order_loss,
            first_order_loss=self.first_order_loss,
            zeroth_order_norm=parts.zeroth_order_norm,
            first_order_norm=parts.first_order_norm,
            gradient_norm=parts.gradient_norm,
            zeroth_order_decrease=parts.zeroth_order_decrease,
            first_order_decrease=parts.first_order_decrease,
            loss_scale=loss_scale,
            has_nonfinite=bool(self.problems or self.overflow),
            stop_requested=stop_requested,
            projected_gradients=estimate.projected_gradients if estimate else (),
        )


def _checked(loss: Tensor) -> Tensor:
    """Return a loss without its graph, fp32 or wider.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("a closure has to return the loss as a scalar tensor")
    if not loss.is_floating_point() or torch.finfo(loss.dtype).bits < 32:
        raise TypeError(
            f"a pass returned a loss of type {loss.dtype}: g0 is a small difference of two losses "
            "and would be lost. Compute the loss in fp32 (logits.float()); under FSDP2 set "
            "MixedPrecisionPolicy(output_dtype=torch.float32), which Accelerate takes as "
            "mixed_precision_policy of FullyShardedDataParallelPlugin and whose default is bf16"
        )
    return loss.detach().reshape(())
