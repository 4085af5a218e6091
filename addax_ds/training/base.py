"""The trainer that all methods share: batches of a step, their loss, costs and evaluation."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.settings import AddaxSettings
from addax_ds.config.trials import check_steps
from addax_ds.data.batches import StepBatches, StepSchedule, train_dataloader
from addax_ds.data.encoding import Example, embeddings_of, padding_token
from addax_ds.data.partition import Partition, partition
from addax_ds.evaluation.likelihood import (
    scores_of_logits,
    target_scores,
    target_tensors,
    targets_of,
)
from addax_ds.evaluation.scored_set import EvaluationCollator, ScoredSet
from addax_ds.optim.methods import BASELINES, IN_PLACE, Method
from addax_ds.sharding.registry import back_end_of
from addax_ds.training.costs import CostMeter
from addax_ds.training.evaluating import ScoringTrainer, check_evaluations
from addax_ds.training.saving import SavingTrainer
from addax_ds.utils.errors import UserError


def plan_steps(
    examples: Sequence[Example], settings: AddaxSettings, args: AddaxConfig
) -> tuple[Partition, StepSchedule]:
    """Divide the examples between the streams and say which of them each step sees.

    Raises:
        UserError: a stream is empty or has fewer examples than its global batch, or the schedule
            of the learning rate does not fit the number of steps.
    """
    lengths = [example.length for example in examples]
    streams = partition(lengths, settings.method, settings.length_threshold)
    shares = args.world_size * settings.gradient_accumulation_steps
    schedule = StepSchedule(
        streams.zeroth_order,
        streams.first_order,
        settings.per_device_zo_batch_size * shares,
        args.per_device_train_batch_size * shares,
        args.seed if args.data_seed is None else args.data_seed,
        args.dataloader_drop_last,
    )
    check_steps(args, total_steps(args, schedule))
    return streams, schedule


def total_steps(args: TrainingArguments, schedule: StepSchedule) -> int:
    """Return the number of steps of the training, which Trainer computes alike."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * schedule.steps_per_epoch)


class StepTrainer(ScoringTrainer, SavingTrainer):
    """Trainer whose items of data are whole steps: a zeroth- and a first-order batch, or one.

    Losses are sums over the global batch divided by its global number of target tokens. An epoch is
    one pass over D1 (over D0 for mezo); D0 cycles through its own permutations. ``scores`` holds
    what the data set made its last metrics of, a row an example. Every ``logging_steps`` it reports
    what `addax_ds.training.costs` says of the training up to then.

    Args:
        model: a causal language model; what it returns has ``logits``. The loss is their
            cross-entropy (`addax_ds.evaluation.likelihood`); a loss of the model's own is not used.
        args: Trainer's arguments and Addax's own.
        train_dataset: tokenised examples (`addax_ds.data.encoding.encode`).
        eval_dataset: what ``evaluate`` scores, or a dict of such sets.
        processing_class: the tokenizer; saved with the model.
        **kwargs: passed to Trainer (``callbacks``, ``compute_metrics``, ...).

    Raises:
        UserError: for arguments that do not fit together, before anything is trained.
    """

    methods: ClassVar[tuple[Method, ...]] = ()
    """Methods that this trainer runs."""

    def __init__(
        self,
        model: nn.Module,
        args: AddaxConfig,
        train_dataset: Sequence[Example] | None = None,
        eval_dataset: ScoredSet | dict[str, ScoredSet] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, AddaxConfig):
            raise UserError(
                f"{type(self).__name__} takes an addax_ds.AddaxConfig, which has the fields of "
                f"TrainingArguments and more, not {type(args).__name__}"
            )
        if args.method not in self.methods:
            raise UserError(
                f"{type(self).__name__} trains by {', '.join(self.methods)}, not by --method "
                f"{args.method}: AddaxTrainer is for {', '.join(IN_PLACE)}, "
                f"BaselineTrainer for {' and '.join(BASELINES)}"
            )
        self.settings = args.settings
        # A step of Trainer's loop is a whole step here: micro-batches are told apart inside.
        args = copy.copy(args)
        args.gradient_accumulation_steps = 1
        self.partition: Partition | None = None
        self._steps: StepBatches | None = None
        vocabulary = embeddings_of(getattr(model, "config", None))
        self._pad_token_id = padding_token(processing_class, vocabulary)
        if kwargs.get("compute_metrics") is None:
            check_evaluations(args, eval_dataset)
        if train_dataset is not None:
            self.partition, schedule = plan_steps(train_dataset, self.settings, args)
            self._steps = StepBatches(
                train_dataset,
                schedule,
                args.process_index,
                args.world_size,
                self._pad_token_id,
                self.settings.gradient_accumulation_steps,
            )
        kwargs.setdefault("data_collator", EvaluationCollator(self._pad_token_id))
        if "compute_loss_func" in kwargs:
            raise UserError(
                f"{type(self).__name__} takes no compute_loss_func: the loss is the likelihood of "
                "the target tokens"
            )
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=causal_loss,
            **kwargs,
        )
        self.costs = CostMeter(self.args.device)
        self.add_callback(_Meter(self))
        self._losses: list[tuple[str, int, Tensor]] = []

    def repartition(self, threshold: int) -> None:
        """Divide the training data by another L_T, before a loader has been read.

        What Trainer has computed from the length of an epoch, such as the epochs that it logs,
        stays: which examples a step sees does not depend on it.
        """
        assert self._steps is not None
        examples: Any = self.train_dataset
        self.settings = replace(self.settings, length_threshold=threshold)
        self.partition, schedule = plan_steps(examples, self.settings, self.args)
        self._steps.reschedule(schedule)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader with one item a step: this rank's part of both batches."""
        if self._steps is None:
            raise UserError(f"{type(self).__name__}: training needs a train_dataset")
        args = self.args
        return train_dataloader(
            self._steps,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def tokens(self, step: int) -> int:
        """Return the number of tokens in a step's global batches, padding left out."""
        assert self._steps is not None
        return self._steps.tokens(step)

    @property
    def stopped(self) -> bool:
        """True if ``train`` ended early on request."""
        return False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to what Trainer reports while it trains what the training has cost."""
        if "loss" in logs:
            logs.update(self.costs.report())
        super().log(logs, start_time)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # Shards are where they belong, which with CPU offload is another device.
        if not back_end_of(model).is_placed:
            super()._move_model_to_device(model, device)

    def _micro_batches(
        self, model: nn.Module, inputs: dict[str, Any], stream: str
    ) -> list[Callable[[], Tensor]]:
        """Return, for each micro-batch of a stream, what computes its loss."""
        if stream not in inputs:
            return []

        def noted(number: int, batch: dict[str, Tensor]) -> Tensor:
            loss = self.micro_batch_loss(model, batch, inputs[f"{stream}_targets"])
            self._losses.append((stream, number, loss.detach()))
            return loss

        return [partial(noted, number, batch) for number, batch in enumerate(inputs[stream])]

    def micro_batch_loss(self, model: nn.Module, batch: dict[str, Tensor], targets: int) -> Tensor:
        """Return a loss whose mean over ranks and micro-batches is that over all target tokens.

        In fp64. The sum is divided by the global number of targets, and multiplied by the number of
        ranks and micro-batches: whoever takes the step takes a mean over them.
        """
        inputs = self._prepare_inputs({**batch, **target_tensors(batch["labels"])})
        with self.compute_loss_context_manager():
            scores = target_scores(model, inputs, inputs["targets"], inputs["positions"])
        parts = self.args.world_size * self.settings.gradient_accumulation_steps
        return -scores[:, 0].sum() * (parts / targets)


class _Meter(TrainerCallback):
    """Measures what steps cost, without the evaluations and checkpoints between them."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._trainer.costs.reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.costs.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.costs.stop(self._trainer.tokens(state.global_step - 1))


def causal_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross-entropy of the target tokens, in fp32, summed in fp64 and divided by a given number.

    Trainer's ``compute_loss_func``, for evaluations by Trainer itself (with ``compute_metrics``):
    not every model heeds ``num_items_in_batch`` in its own loss.

    Args:
        outputs: of the model; ``logits`` of shape ``(rows, length, vocabulary)``.
        labels: int64 ``(rows, length)``, not shifted.
        num_items_in_batch: number of target tokens in the global batch.

    Returns:
        fp64 scalar.
    """
    scores = scores_of_logits(outputs.logits, targets_of(labels))
    return -scores[:, 0].sum() / num_items_in_batch
