"""What all methods share: batches of a step, their loss, and what they cost."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from addax_ds.checkpoint.identity import Run
from addax_ds.config.addax_config import AddaxConfig, global_batches, order_seed
from addax_ds.config.trials import check_steps
from addax_ds.data.batches import StepBatches, StepSchedule, train_dataloader
from addax_ds.data.partition import Lengths, Partition, partition
from addax_ds.data.train_rows import (
    CollatedRows,
    TrainRows,
    check_map_style,
    row_length,
)
from addax_ds.distributed.collectives import check_same_on_all_ranks
from addax_ds.optim.methods import BASELINES, IN_PLACE, Method
from addax_ds.sharding.registry import back_end_of
from addax_ds.training.costs import CostMeter
from addax_ds.training.saving import SavingMixin
from addax_ds.utils.errors import UserError
from addax_ds.utils.generators import generators_kept


def plan_steps(
    lengths: Lengths, args: AddaxConfig, *, drop_last: bool = False
) -> tuple[Partition, StepSchedule]:
    """Divide the rows between the streams and say which of them each step sees.

    Args:
        lengths: tokens of each row.
        args: of the run.
        drop_last: whether an epoch ends before a batch that it cannot fill, whatever ``args`` say.

    Raises:
        UserError: a stream is empty or has fewer rows than its global batch, or the schedule of
            the learning rate does not fit the number of steps.
    """
    streams = partition(lengths, args.settings.method, args.settings.length_threshold)
    schedule = StepSchedule(
        streams.zeroth_order,
        streams.first_order,
        *global_batches(args),
        order_seed(args),
        drop_last or args.dataloader_drop_last,
    )
    check_steps(args, total_steps(args, schedule))
    return streams, schedule


def total_steps(args: TrainingArguments, schedule: StepSchedule) -> int:
    """Return the number of steps of the training, which Trainer computes alike."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * schedule.steps_per_epoch)


class StepMixin(SavingMixin):
    """Makes the items of a Trainer's data whole steps: a zeroth- and a first-order batch, or one.

    An epoch is one pass over D1 (over D0 for mezo); D0 cycles through its own permutations. The
    trainer's collator makes the batches, and its ``compute_loss`` their losses. Every
    ``logging_steps`` it reports what `addax_ds.training.costs` says of the training up to then.

    Attributes:
        costs: of the training up to now.
    """

    methods: ClassVar[tuple[Method, ...]] = ()
    """Methods that this trainer runs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        def own(value: Any) -> Any:
            """Replace the config, wherever a trainer has it among its arguments."""
            if not isinstance(value, AddaxConfig):
                return value
            # A step of Trainer's loop is a whole step here: micro-batches are told apart inside.
            value = copy.copy(value)
            value.gradient_accumulation_steps = 1
            return value

        self._check_arguments(args, kwargs)
        self.partition: Partition | None = None
        self._steps: StepBatches | None = None
        self._divided: Any = None
        self._losses: list[tuple[str, int, Tensor]] = []
        named = {name: own(value) for name, value in kwargs.items()}
        super().__init__(*map(own, args), **named)
        self._divide_if_other()
        self.costs = CostMeter(self.args.device)
        self.add_callback(_Meter(self))

    def _check_arguments(self, positional: tuple[Any, ...], given: dict[str, Any]) -> None:
        name = type(self).__name__
        args = given.get("args")  # or one of the others, not the second for every trainer
        args = next((v for v in positional if isinstance(v, TrainingArguments)), args)
        if not isinstance(args, AddaxConfig):
            raise UserError(
                f"{name} takes an addax_ds.AddaxConfig, which has the fields of "
                f"TrainingArguments and more, not {type(args).__name__}"
            )
        if args.method not in self.methods:
            raise UserError(
                f"{name} trains by {', '.join(self.methods)}, not by --method "
                f"{args.method}: AddaxTrainer is for {', '.join(IN_PLACE)}, "
                f"BaselineTrainer for {' and '.join(BASELINES)}"
            )
        if any(part is not None for part in given.get("optimizers") or ()):
            raise UserError(
                f"{name} takes no optimizers: it makes its own, and the schedule of its "
                "learning rate from lr_scheduler_type"
            )
        for argument, instead in (
            ("model_init", "give it the model"),
            ("optimizer_cls_and_kwargs", "the arguments name a method"),
        ):
            if given.get(argument) is not None:
                raise UserError(f"{name} takes no {argument}: {instead}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train on ``train_dataset``, which may be another one than before; see `Trainer.train`."""
        self._divide_if_other()
        return super().train(*args, **kwargs)

    def _divide_if_other(self) -> None:
        """Divide the training data unless they are divided."""
        if self.train_dataset is not self._divided:
            self._divide_anew()

    def _take_time_of(self, written: Run) -> None:
        before = self.template_time
        super()._take_time_of(written)
        # Few templates write the date: rows are encoded anew if theirs does.
        other_time = before not in (None, self.template_time)
        if other_time and self._steps is not None and self._data_digest != written.data:
            self._divide_anew()

    def _divide_anew(self) -> None:
        """Divide the training data, if there is any, between the streams."""
        self.partition = self._steps = self._divided = None
        dataset: Any = self.train_dataset
        if dataset is None:
            return
        name = f"{type(self).__name__}: the training data"
        check_map_style(dataset, name, "streams by length need")
        rows = self.train_rows(dataset)
        # Ranks with other rows would take another number of steps, and wait for each other.
        check_same_on_all_ranks({"the training data": rows.digest})
        self.partition, schedule = self._plan(rows)
        self._steps = StepBatches(
            rows,
            schedule,
            self.args.process_index,
            self.args.world_size,
            self.settings.gradient_accumulation_steps,
        )
        self._divided = dataset

    def _plan(self, rows: TrainRows) -> tuple[Partition, StepSchedule]:
        return plan_steps(rows.lengths, self.args, drop_last=not rows.has_dummy)

    def train_rows(self, dataset: Any) -> TrainRows:
        """Return the rows of a map-style data set, of which the trainer's collator makes batches.

        An epoch ends before a batch that it cannot fill.
        """
        collator = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return CollatedRows(dataset, collator, self.row_length)

    def row_length(self, row: Any) -> int:
        """Return how many tokens a row has, by which the streams are divided.

        See `addax_ds.data.train_rows.row_length`. A trainer of other data overrides it.
        """
        return row_length(row)

    def repartition(self, threshold: int) -> None:
        """Divide the training data by another L_T, before a loader has been read.

        What Trainer has computed from the length of an epoch, such as the epochs that it logs,
        stays: which examples a step sees does not depend on it.
        """
        assert self._steps is not None
        self.args.settings = replace(self.settings, length_threshold=threshold)
        self.partition, schedule = self._plan(self._steps.rows)
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

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return how many rows an epoch of the training takes, those of D0 included."""
        if self._steps is None or dataloader.dataset is not self._steps:
            return super().num_examples(dataloader)
        schedule = self._steps.schedule
        return schedule.steps_per_epoch * schedule.rows_per_step

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return how many rows a step takes, over all ranks: K0 + K1."""
        if self._steps is None:
            return super().get_total_train_batch_size(args)
        return self._steps.schedule.rows_per_step

    def tokens(self, step: int) -> int:
        """Return the number of tokens in a step's global batches, padding left out."""
        assert self._steps is not None
        return sum(self._steps.tokens(step).values())

    def step_batches(self, step: int) -> dict[str, Any]:
        """Return this rank's part of the batches of a step; see `StepBatches`."""
        if self._steps is None:
            raise UserError(f"{type(self).__name__}: training needs a train_dataset")
        return self._steps[step]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's loop; while it trains, torch's random draws there change none later.

        A loader draws a number when it begins. A run that skipped an evaluation, as one that stops
        does, would go on with other dropout masks.
        """
        with generators_kept(self.args.device) if self.is_in_train else nullcontext():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to what Trainer reports while it trains what the training has cost."""
        if "loss" in logs:
            logs.update(self.costs.report())
        super().log(logs, start_time)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # Shards are where they belong, which with CPU offload is another device.
        if not back_end_of(model).is_placed:
            super()._move_model_to_device(model, device)

    @property
    def _data_digest(self) -> str:
        assert self._steps is not None
        return self._steps.rows.digest

    def loss_closures(
        self, model: nn.Module, inputs: dict[str, Any], stream: str
    ) -> list[Callable[[], Tensor]]:
        """Return, for each micro-batch of a stream, what computes its loss."""
        if stream not in inputs:
            return []
        targets = inputs.get(f"{stream}_targets")
        if targets is None:
            targets = self._count_targets(inputs[stream])

        def noted(number: int, batch: dict[str, Tensor]) -> Tensor:
            # Metrics of perturbed weights are none of the training's.
            with self.metrics_kept() if stream == "zeroth_order" else nullcontext():
                loss = self.micro_batch_loss(model, batch, targets)
            self._losses.append((stream, number, loss.detach()))
            return loss

        batches = map(self.prepare_micro_batch, inputs[stream])
        return [partial(noted, number, batch) for number, batch in enumerate(batches)]

    @contextmanager
    def metrics_kept(self) -> Iterator[None]:
        """Take back what the body adds to the metrics that TRL collects in ``compute_loss``."""
        metrics = getattr(self, "_metrics", None)
        if metrics is None:
            yield
            return
        self._metrics = copy.deepcopy(metrics)
        try:
            yield
        finally:
            self._metrics = metrics

    def computed_loss(self, model: nn.Module, batch: dict[str, Any], targets: Any) -> Tensor:
        """Return what ``compute_loss`` returns; see `micro_batch_loss`."""
        self.current_gradient_accumulation_steps = self.settings.gradient_accumulation_steps
        # The batch is read once more for the other side, and some trainers change their inputs.
        inputs = self._prepare_inputs(dict(batch))
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=targets)
        return loss

    def _count_targets(self, batches: list[dict[str, Any]]) -> Tensor | int | None:
        """Count the targets of all ranks as Trainer does, where the loss divides by them."""
        return self._get_num_items_in_batch(batches, self.args.device)

    def prepare_micro_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what `micro_batch_loss` gets, in every pass of the step, of a collator's batch."""
        return batch

    def micro_batch_loss(self, model: nn.Module, batch: dict[str, Any], targets: Any) -> Tensor:
        """Return a loss whose mean over ranks and micro-batches is that of the step.

        It is what ``compute_loss`` returns.

        Args:
            model: as steps call it; under DeepSpeed the engine.
            batch: what `prepare_micro_batch` returned.
            targets: number of predicted tokens in the global batch, where ``compute_loss`` divides
                by them; or None.

        Raises:
            UserError: the loss is not in fp32 or wider. The zeroth-order part is the difference of
                two, which would be lost.
        """
        loss = self.computed_loss(model, batch, targets)
        if loss.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"{type(self).__name__}: compute_loss returns a loss in {loss.dtype}, in which the "
                "difference of two losses is lost: let it reduce in fp32"
            )
        count = self.settings.gradient_accumulation_steps
        return loss * count if self._loss_is_of_the_step(targets) else loss

    def _loss_is_of_the_step(self, targets: Any) -> bool:
        """Return whether losses of micro-batches are to be added up, and not averaged."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        by_model = self.model_accepts_loss_kwargs and targets is not None
        return by_model or self.compute_loss_func is not None


class _Meter(TrainerCallback):
    """Measures what steps cost, without the evaluations and checkpoints between them."""

    def __init__(self, trainer: StepMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._trainer.costs.reset()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.costs.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.costs.stop(self._trainer.tokens(state.global_step - 1))
