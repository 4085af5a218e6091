"""A Trainer with Addax: its loop as it is, another step inside it."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from addax_ds.data.batches import STREAMS
from addax_ds.distributed.collectives import all_gather_object
from addax_ds.optim.addax import Addax, unwrap
from addax_ds.optim.attach import attach
from addax_ds.optim.hyperparameters import runs_twice_to_clip
from addax_ds.optim.methods import IN_PLACE
from addax_ds.optim.passes import isolated, replaced
from addax_ds.planner.constants import FORWARD, first_order_units
from addax_ds.sharding.registry import back_end_of
from addax_ds.training.desync import DesyncCheck
from addax_ds.training.learning_rate import Sweep, find_learning_rate
from addax_ds.training.resuming import ResumingMixin
from addax_ds.training.steps import StepMixin
from addax_ds.training.worth import Worth
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.errors import UserError
from addax_ds.utils.generators import generators_kept

logger = logging.getLogger(__name__)

MAX_NAMED_EXAMPLES = 20
"""Largest number of examples of a non-finite step in the log."""


# Trainers of TRL whose own training_step is Trainer's within activation offloading.
_CARRIED = ("SFTTrainer", "DPOTrainer", "RewardTrainer")
# What of a trainer an Addax step replaces.
_REPLACED = ("training_step", "get_train_dataloader", "create_optimizer")


class AddaxMixin(ResumingMixin, StepMixin):
    """Gives a `transformers.Trainer` an Addax step; it comes first among the base classes.

    ``class AddaxSFTTrainer(AddaxMixin, trl.SFTTrainer)`` is TRL's trainer with a step that takes a
    zeroth-order batch of D0 and a first-order batch of D1. The trainer's own collator makes both
    batches, its ``compute_loss`` both losses, and its evaluation is its own. Arguments are the
    trainer's, with an `AddaxConfig` as ``args``; for a trainer with a config of its own::

        @dataclass
        class AddaxSFTConfig(AddaxConfig, trl.SFTConfig): ...

    It runs under DeepSpeed ZeRO-3 (``args.deepspeed``) and, without it, on a model that is sharded
    by `fully_shard` or whole on each rank.

    Besides the values of Trainer and `StepMixin` it reports, every ``logging_steps``, those of the
    last step: ``learning_rate``, ``g0``, ``zo_loss``, ``fo_loss``, ``zo_update_norm`` and
    ``fo_update_norm`` (norms of the two parts of the update), ``zo_update_share`` (of its squared
    norm), ``zo_decrease`` and ``fo_decrease`` (of the losses by each part, as the first order
    predicts it) and ``grad_norm`` (of the first-order gradient); see `StepReport`. If a part takes
    half of the computation for less than 1 % of the decrease, it says so once.

    Attributes:
        worth: what each part has cost and bought in the logged steps since ``train`` began.

    Raises:
        UserError: for arguments that do not fit together, or a trainer with a step of its own,
            before anything is trained.
    """

    methods = IN_PLACE
    _is_loss_settled = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__:
            _check_bases(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "activation_offloading", False):
            raise UserError(
                f"{type(self).__name__} takes no activation_offloading: zeroth-order passes keep "
                "no activations; --activation_checkpointing saves those of the first-order one"
            )
        self.add_callback(_EndOfStep(self))
        self.worth = Worth()
        self.desync = DesyncCheck(self.args.desync_check_steps)
        self._stop_requested = False
        self._learning_rate = self.args.learning_rate

    # ---- seams of Trainer ----------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Attach the optimizer to a plain model, at each training; DeepSpeed makes its own.

        Raises:
            UserError: if DeepSpeed's engine is there already, as it cannot be made twice; if
                nothing is trainable; for what `attach` refuses.
        """
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            raise UserError(
                "under DeepSpeed a trainer trains once, and before it evaluates: make a new "
                f"{type(self).__name__}, or set eval_on_start to evaluate before the first step"
            )
        if self.is_deepspeed_enabled:
            return super().create_optimizer(model)
        model = model or self.model
        assert model is not None
        back_end_of(model).free_gathered(model)
        optimizer = self.optimizer
        if optimizer is None:
            _check_dtype(model, self.args)
            trained = [p for p in model.parameters() if p.requires_grad]
            if not trained:
                raise UserError(
                    "the model has no trainable parameter: set requires_grad of those to train, "
                    "which PEFT has unset where it merged its adapters into the weights"
                )
            optimizer = Addax(trained, **asdict(self.settings.hyperparameters))
        attach(unwrap(optimizer), model)
        self.optimizer = optimizer
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `SavingMixin.train`, and `releasing_model` for what comes afterwards."""
        with self.releasing_model():
            return super().train(*args, **kwargs)

    @contextmanager
    def releasing_model(self) -> Iterator[None]:
        """Detach the optimizer afterwards: a backward of others would update the weights.

        Under DeepSpeed the engine keeps its optimizer.
        """
        try:
            with self._as_prepared():
                yield
        except BaseException:
            # Other ranks may be elsewhere, and the process is about to end; a notebook goes on.
            if self._holds_model() and self.args.world_size == 1:
                self.addax.abandon()
            raise
        finally:
            if self._holds_model():
                self.addax.sharding.detach()

    def _as_prepared(self) -> AbstractContextManager[None]:
        """Keep Accelerate from wrapping the model: on several ranks, in DistributedDataParallel.

        The mark is removed afterwards, as another trainer may want the wrapping.
        """
        assert self.model is not None
        if self.is_deepspeed_enabled:
            return nullcontext()
        return replaced(self.model, "_is_accelerate_prepared", True)

    def _holds_model(self) -> bool:
        return (
            not self.is_deepspeed_enabled and self.optimizer is not None and self.addax.is_attached
        )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One step of Algorithm 1; the weights are updated inside ``backward``."""
        self.settle_loss(model, inputs)
        model.train()
        addax = self.addax
        self.desync.before_step(addax)
        addax.track_norm = self._logs_after_this_step()
        addax.stop_requested = self._stop_requested
        self._losses.clear()
        # Before DeepSpeed's engine goes on to the next one, which is what Trainer would report.
        self._learning_rate = float(addax.param_groups[0]["lr"])
        loss = addax.measure(
            self.loss_closures(model, inputs, "zeroth_order"),
            self.loss_closures(model, inputs, "first_order"),
        )
        if loss is None:
            addax.sharding.step_without_backward()
        else:
            self.accelerator.backward(loss)
        means = (addax.first_order_loss, addax.zeroth_order_loss)
        return torch.tensor(next(m for m in means if m is not None), device=self.args.device)

    def settle_loss(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out, once, whether the model's loss divides by the targets of the global batch.

        Trainer assumes it of a model whose ``forward`` takes any keyword, and multiplies the loss
        by the ranks. The loss of a classifier, or of T5, is a mean over its own batch. Multiplied,
        it would be too large by that factor. So the losses of a batch for two numbers of targets
        are compared, in the first step with a loss that is finite and not 0. Every rank has to call
        it, between two steps.

        Args:
            model: see `micro_batch_loss`.
            inputs: the batches of a step.
        """
        if self._is_loss_settled:
            return
        parts = self.args.world_size * self.settings.gradient_accumulation_steps
        if parts == 1 or not self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            self._is_loss_settled = True
            return
        batches = next(inputs[stream] for stream in STREAMS if stream in inputs)
        targets: Any = self._count_targets(batches)
        if targets is None:
            return
        batch = self.prepare_micro_batch(batches[0])
        sharding = self.addax.sharding
        losses = []
        with sharding.forward_only(), isolated(sharding.model), self.metrics_kept():
            for number in (targets, 2 * targets):
                with generators_kept(self.args.device):
                    losses.append(float(self.computed_loss(model, batch, number)))
        says = all(map(math.isfinite, losses)) and losses[0] != 0.0
        found = all_gather_object(math.isclose(*losses, rel_tol=1e-3) if says else None)
        means = [is_mean for is_mean in found if is_mean is not None]
        self._is_loss_settled = bool(means)
        if means and all(means):
            self.model_accepts_loss_kwargs = False
            logger.info("The model's loss is a mean over its batch: losses are averaged")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's loop as passes without a backward."""
        passes = self.addax.sharding.forward_only() if self.optimizer is not None else nullcontext()
        with self._as_prepared(), passes:
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the values of the last step to what Trainer reports while it trains."""
        if "loss" in logs and self.optimizer is not None and self.addax.report is not None:
            # The optimizer has freed all gradients, so Trainer reports a norm of 0.
            logs.pop("grad_norm", None)
            report = self.addax.report
            values = {
                "learning_rate": self._learning_rate,
                "g0": report.g0,
                "zo_loss": report.zeroth_order_loss,
                "fo_loss": report.first_order_loss,
                "zo_update_norm": report.zeroth_order_norm,
                "fo_update_norm": report.first_order_norm,
                "zo_update_share": report.zeroth_order_share if 0 < self.addax.alpha < 1 else None,
                "zo_decrease": report.zeroth_order_decrease,
                "fo_decrease": report.first_order_decrease,
                "grad_norm": report.gradient_norm,
                "loss_scale": report.loss_scale if self.args.fp16 else None,
            }
            logs.update({key: value for key, value in values.items() if value is not None})
            assert self._steps is not None
            tokens = self._steps.tokens(self.state.global_step - 1)
            self.worth.add(report, *self._units(tokens))
            if advice := self.worth.advice():
                logger.warning("%s", advice)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step on this rank: 2 a weight, token and unit of `_units`.

        As they are computed: with what is recomputed, and what runs twice to clip.
        """
        tokens = {
            stream: sum(b["input_ids"].numel() for b in inputs.get(stream, []) if "input_ids" in b)
            for stream in STREAMS
        }
        return 2 * sum(self._units(tokens)) * self.addax.sharding.trainable_elements

    def _units(self, tokens: Mapping[str, int]) -> tuple[int, int]:
        """Return the forward passes of tokens that each part of a step costs; see `Worth`."""
        addax, args = self.addax, self.args
        of_token = first_order_units(
            bool(args.activation_checkpointing or args.gradient_checkpointing)
        )
        if runs_twice_to_clip(addax.max_grad_norm, self.settings.gradient_accumulation_steps):
            of_token *= 2
        passes = len(addax.estimator.passes) if addax.alpha > 0 else 0
        return FORWARD * passes * tokens["zeroth_order"], of_token * tokens["first_order"]

    def find_learning_rate(self) -> Sweep:
        """Try learning rates; see `addax_ds.training.learning_rate.find_learning_rate`.

        It is for a trainer whose ``args`` have ``find_learning_rate`` set, and no learning rate.
        """
        self._divide_if_other()
        return find_learning_rate(self)

    # ---- stopping ------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Request that all ranks save a checkpoint after the current step and end ``train``.

        One rank is enough. May be called from a signal handler.
        """
        self._stop_requested = True

    @property
    def stopped(self) -> bool:
        """True if ``train`` ended because of `request_stop`, on this or another rank."""
        report = self.addax.report
        return report is not None and report.stop_requested

    def _name_examples(self, step: int) -> None:
        """Log the examples of a non-finite step; collective.

        Those of micro-batches with a loss that is not finite; if all are, those whose gradient was
        taken.
        """
        assert self._steps is not None
        batches = {(s, i) for s, i, loss in self._losses if not loss.isfinite()}
        if not any(all_gather_object(bool(batches))):
            batches = {(s, i) for s, i, _ in self._losses if s == "first_order"}
        own = [row for batch in sorted(batches) for row in self._steps.indices(step, *batch)]
        named = [self._steps.rows.origin(row) for row in own]
        origins = [origin for of_rank in all_gather_object(named) for origin in of_rank]
        if len(origins) > MAX_NAMED_EXAMPLES:
            others = len(origins) - MAX_NAMED_EXAMPLES
            origins[MAX_NAMED_EXAMPLES:] = [f"and {others} more"]
        logger.warning("step %d: its examples: %s", step, "; ".join(origins))

    # ---- helpers -------------------------------------------------------------------------------

    def _logs_after_this_step(self) -> bool:
        step, args = self.state.global_step + 1, self.args
        if args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        return args.logging_strategy == "epoch"


class _EndOfStep(TrainerCallback):
    """Acts on the report of each step, which is the same on all ranks."""

    def __init__(self, trainer: AddaxMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Other weights may have been loaded since the last training.
        self._trainer.desync = DesyncCheck(self._trainer.args.desync_check_steps)
        self._trainer.worth = Worth()
        self._trainer.resume_logging()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._stop_requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        addax = self._trainer.addax
        report = addax.report
        assert report is not None
        self._trainer.desync.after_step(addax)
        if report.has_nonfinite:
            self._trainer._name_examples(state.global_step - 1)
        if report.stop_requested:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False


def _check_dtype(model: nn.Module, args: TrainingArguments) -> None:
    wanted = weights_dtype(args)
    dtypes = {p.dtype for p in model.parameters()}
    if any((dtype in dtypes) != (dtype is wanted) for dtype in (torch.bfloat16, torch.float16)):
        raise UserError(
            f"the model has weights of {', '.join(sorted(map(str, dtypes)))}, and the training "
            f"arguments (bf16 {args.bf16}, fp16 {args.fp16}) ask for {wanted}: load the model with "
            "the dtype that they ask for"
        )


def _check_bases(trainer: type) -> None:
    """Raise `UserError` if a base class does in its step what an Addax step would leave out."""
    after = trainer.__mro__[trainer.__mro__.index(AddaxMixin) + 1 :]
    if Trainer not in after:
        raise UserError(
            f"{trainer.__name__}: AddaxMixin comes first among the base classes, as in "
            "class AddaxSFTTrainer(AddaxMixin, trl.SFTTrainer)"
        )
    others = [base for base in after[: after.index(Trainer)] if not issubclass(AddaxMixin, base)]
    for base in others:
        if base.__name__ in _CARRIED and base.__module__.startswith("trl."):
            continue
        for method in _REPLACED:
            if method in vars(base):
                raise UserError(
                    f"{base.__name__} has a {method} of its own, which an Addax step cannot "
                    "carry: give AddaxMixin a trainer whose data and compute_loss are all that it "
                    "changes"
                )
