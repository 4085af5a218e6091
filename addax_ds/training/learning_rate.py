"""``--find_learning_rate``: a short training at each of several rates, of which nothing is kept."""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from addax_ds.data.batches import STREAMS
from addax_ds.optim.methods import Method
from addax_ds.utils.generators import generators_kept

if TYPE_CHECKING:
    from addax_ds.training.mixin import AddaxMixin

logger = logging.getLogger(__name__)

STEPS = 8
"""Steps of the training at each rate."""

HELD_STEPS = 4
"""Steps after these, whose batches are not trained on but scored."""

_USUAL = tuple(digit * 10.0**power for power in range(-5, 0) for digit in (1, 3))


def rates(method: Method) -> tuple[float, ...]:
    """Return the rates that are tried, ascending: two a decade, 1e-5 to 0.3; mezo 1e-8 to 3e-4.

    Of MeZO's update the norm is some sqrt(d) times that of a gradient, d being the number of
    weights.
    """
    return tuple(float(f"{rate * (1e-3 if method == 'mezo' else 1):.0e}") for rate in _USUAL)


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep, equal on all ranks.

    Attributes:
        before: loss of the held batches with the weights as they are.
        losses: the same after `STEPS` steps, by learning rate, ascending; NaN and infinity stand
            for what they say. It ends with the first of these, or the first rate that has not
            lowered the loss after one that has.
    """

    before: float
    losses: dict[float, float]

    @property
    def proposal(self) -> float | None:
        """The rate with the lowest loss; None if none has lowered it."""
        lower = {rate: loss for rate, loss in self.losses.items() if loss < self.before}
        return min(lower, key=lambda rate: lower[rate]) if lower else None

    def __str__(self) -> str:
        lines = [
            f"Loss of {HELD_STEPS} steps' batches after {STEPS} other steps at a constant rate"
        ]
        lines += [f"  before: {self.before:.4f}"]
        lines += [f"  {rate:>7g}: {loss:.4f}" for rate, loss in self.losses.items()]
        tried = list(self.losses)
        if self.proposal is None:
            lines += [f"No rate from {tried[0]:g} to {tried[-1]:g} has lowered the loss."]
        else:
            lines += [f"The lowest loss: --learning_rate {self.proposal:g}"]
            if self.proposal in (tried[0], tried[-1]):
                lines[-1] += ", at the edge of what was tried"
            lines[-1] += ". A schedule that decays has it as its highest rate."
        return "\n".join(lines)


def find_learning_rate(trainer: "AddaxMixin") -> Sweep:
    """Train for a few steps at each rate, from the same weights; every rank has to call it.

    The first `STEPS` steps of the training are taken, with its batches, seed and method; the
    batches of the next `HELD_STEPS` are scored, the mean of both streams. Weights, buffers, random
    states and the step number are put back after each rate. A rank keeps a copy of its shards in
    host memory for that. Nothing is written or reported.

    Args:
        trainer: has not trained yet; under DeepSpeed it cannot train afterwards.

    Raises:
        UserError: what `Trainer.train` raises for its arguments.
    """
    callbacks, strategy = trainer.callback_handler.callbacks, trainer.args.save_strategy
    saves_at_end = trainer.saves_at_end
    trainer.callback_handler.callbacks = [_Sweeping(trainer)]
    # Not even a rehearsal: another run may be at work in the folder.
    trainer.args.save_strategy, trainer.saves_at_end = SaveStrategy.NO, False
    try:
        with trainer.releasing_model():
            Trainer.train(trainer)
    except _SweepFinished as done:
        return done.sweep
    finally:
        trainer.callback_handler.callbacks = callbacks
        trainer.args.save_strategy, trainer.saves_at_end = strategy, saves_at_end
    raise AssertionError("a training has begun without a word")


class _SweepFinished(BaseException):
    """Ends `Trainer.train` before its first step: DeepSpeed's engine exists only within."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.sweep = sweep


class _Sweeping(TrainerCallback):
    """Sweeps when the engine, the optimizer and the steps are there."""

    def __init__(self, trainer: "AddaxMixin") -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise _SweepFinished(self._sweep())

    def _sweep(self) -> Sweep:
        trainer = self._trainer
        trainer.settle_loss(trainer.model_wrapped, trainer.step_batches(0))
        with _put_back(trainer):
            before = self._loss()
        logger.info("Before: loss %.4f", before)
        losses: dict[float, float] = {}
        for rate in rates(trainer.settings.method):
            with _put_back(trainer):
                self._train(rate)
                losses[rate] = self._loss()
            logger.info("Learning rate %g: loss %.4f", rate, losses[rate])
            lowered = any(loss < before for loss in losses.values())
            if not math.isfinite(losses[rate]) or (lowered and losses[rate] >= before):
                break
        return Sweep(before, losses)

    def _train(self, rate: float) -> None:
        trainer, model = self._trainer, self._trainer.model_wrapped
        for step in range(STEPS):
            for group in trainer.addax.param_groups:  # also what a schedule in an engine has set
                group["lr"] = rate
            trainer.training_step(model, trainer.step_batches(step))
            optimizer = trainer.optimizer  # in an engine it has been called
            assert optimizer is not None
            optimizer.step()

    def _loss(self) -> float:
        """Return the mean loss of the held batches, over ranks, streams and steps."""
        trainer, model = self._trainer, self._trainer.model_wrapped
        sharding = trainer.addax.sharding
        model.eval()
        losses: list[Tensor] = []
        with torch.no_grad(), sharding.forward_only():
            for step in range(STEPS, STEPS + HELD_STEPS):
                batches = trainer.step_batches(step)
                for stream in STREAMS:
                    parts = [loss() for loss in trainer.loss_closures(model, batches, stream)]
                    if parts:
                        losses.append(torch.stack(parts).double().mean())
        total = torch.stack(losses).mean().to(sharding.device)
        sharding.sum_over_ranks(total)
        return float(total) / sharding.world_size


@contextmanager
def _put_back(trainer: "AddaxMixin") -> Iterator[None]:
    """Put back, afterwards, all that steps change."""
    addax, model = trainer.addax, trainer.model
    assert model is not None

    def held() -> list[Tensor]:
        return [*(shard.data for shard in addax.sharding.shards()), *model.buffers()]

    copies = [data.detach().to("cpu", copy=True) for data in held()]
    state = copy.deepcopy(addax.state_dict())
    try:
        with generators_kept(trainer.args.device):
            yield
    finally:
        with torch.no_grad():
            for data, value in zip(held(), copies, strict=True):
                data.copy_(value)
        addax.load_state_dict(state)
        addax.sharding.resume_at(addax.index)
        addax.sharding.weights_changed()
