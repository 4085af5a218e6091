"""`transformers.Trainer` with Addax: Trainer's loop as it is, another step inside it."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from addax_ds import checkpoint
from addax_ds.arguments import AddaxArguments, AddaxSettings, configure
from addax_ds.data.batches import StepBatches, StepSchedule, train_dataloader
from addax_ds.data.encoding import Example
from addax_ds.data.partition import Partition, partition
from addax_ds.errors import UserError
from addax_ds.evaluation import (
    EvaluationCollator,
    ScoredSet,
    Scores,
    ScoreTable,
    evaluation_dataloader,
    token_scores,
)
from addax_ds.optimizer import Addax, unwrap
from addax_ds.sharding.attach import attach, back_end_of


def plan_steps(
    examples: Sequence[Example], settings: AddaxSettings, args: TrainingArguments
) -> tuple[Partition, StepSchedule]:
    """Divide the examples between the streams and say which of them each step sees.

    Raises:
        UserError: a stream is empty or has fewer examples than its global batch.
    """
    lengths = [example.length for example in examples]
    streams = partition(lengths, settings.method, settings.length_threshold)
    schedule = StepSchedule(
        streams.zeroth_order,
        streams.first_order,
        settings.per_device_zo_batch_size * args.world_size,
        args.per_device_train_batch_size * args.world_size,
        args.seed if args.data_seed is None else args.data_seed,
        args.dataloader_drop_last,
    )
    return streams, schedule


class AddaxTrainer(Trainer):
    """Trainer whose step takes a zeroth-order batch of D0 and a first-order batch of D1.

    It runs under DeepSpeed ZeRO-3 (``args.deepspeed``) and, without it, on a model that is sharded
    by ``fully_shard`` or whole on each rank. Both losses are sums over the global batch divided by
    its global number of target tokens. An epoch is one pass over D1; D0 cycles through its own
    permutations.

    Besides Trainer's own values it reports, every ``logging_steps``, those of the last step:
    ``learning_rate``, ``g0``, ``zo_loss``, ``fo_loss``, ``zo_update_norm`` and ``fo_update_norm``
    (norms of the two parts of the update) and ``grad_norm`` (of the first-order gradient).
    ``scores`` holds what the data set made its last metrics of, a row an example.

    Args:
        model: a causal language model; what it returns has ``logits``. The loss is their
            cross-entropy (`causal_loss`); a loss of the model's own is not used.
        args: Trainer's arguments; `addax_ds.training_arguments` says which fields work.
        addax: the method and its hyperparameters, or what `configure` made of them.
        train_dataset: tokenised examples (`addax_ds.data.encoding.encode`).
        eval_dataset: what ``evaluate`` scores, or a dict of such sets.
        processing_class: the tokenizer; saved with the model.
        **kwargs: passed to Trainer (``callbacks``, ``compute_metrics``, ...).

    Raises:
        UserError: for arguments that do not fit together, before anything is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        addax: AddaxArguments | AddaxSettings,
        train_dataset: Sequence[Example] | None = None,
        eval_dataset: ScoredSet | dict[str, ScoredSet] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        self.settings = addax if isinstance(addax, AddaxSettings) else configure(args, addax)
        self.partition: Partition | None = None
        self._steps: StepBatches | None = None
        self._pad_token_id = _pad_token_id(processing_class)
        if train_dataset is not None:
            self.partition, schedule = plan_steps(train_dataset, self.settings, args)
            self._steps = StepBatches(
                train_dataset, schedule, args.process_index, args.world_size, self._pad_token_id
            )
        kwargs.setdefault("data_collator", EvaluationCollator(self._pad_token_id))
        kwargs.setdefault("compute_loss_func", causal_loss)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if not self.is_deepspeed_enabled:
            # Accelerate would wrap a model on several ranks in DistributedDataParallel.
            model._is_accelerate_prepared = True  # type: ignore[assignment]
        self._learning_rate = args.learning_rate
        self._scores_own_metrics = self.compute_metrics is None
        self._scored: tuple[ScoredSet, ScoreTable] | None = None
        self.scores: Scores | None = None

    # ---- seams of Trainer ----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader with one item a step: this rank's part of both batches."""
        if self._steps is None:
            raise UserError("AddaxTrainer: training needs a train_dataset")
        args = self.args
        return train_dataloader(
            self._steps,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of a plain model; DeepSpeed makes its own from the JSON.

        Raises:
            UserError: if DeepSpeed's engine is there already, as it cannot be made twice.
        """
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            raise UserError(
                "under DeepSpeed a trainer trains once, and before it evaluates: make a new "
                "AddaxTrainer, or set eval_on_start to evaluate before the first step"
            )
        if self.optimizer is None:
            model = model or self.model
            assert model is not None
            has_bf16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
            if has_bf16 != self.args.bf16:
                raise UserError(
                    f"the model has {'' if has_bf16 else 'no '}bf16 weights, but bf16 is "
                    f"{self.args.bf16} in the training arguments: load the model with the dtype "
                    "that they ask for"
                )
            back_end_of(model).free_gathered(model)
            self.optimizer = Addax(
                [p for p in model.parameters() if p.requires_grad],
                lr=self.args.learning_rate,
                alpha=self.settings.alpha,
                zo_eps=self.settings.zo_eps,
                weight_decay=self.args.weight_decay,
                seed=self.settings.seed,
                rounding=self.settings.rounding,
            )
            attach(self.optimizer, model)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One step of Algorithm 1; the weights are updated inside ``backward``."""
        model.train()
        addax = self.addax
        addax.track_norm = self._logs_after_this_step()
        # Before DeepSpeed's engine goes on to the next one, which is what Trainer would report.
        self._learning_rate = float(addax.param_groups[0]["lr"])
        loss = addax.measure(
            lambda: self._batch_loss(model, inputs, "zeroth_order"),
            lambda: self._batch_loss(model, inputs, "first_order"),
        )
        if loss is None:
            addax.sharding.step_without_backward()
        else:
            self.accelerator.backward(loss)
        means = (addax.first_order_loss, addax.zeroth_order_loss)
        return torch.tensor(next(m for m in means if m is not None), device=self.args.device)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Let the data set score a batch; nothing is gathered before all of them are scored."""
        if self._scored is None:
            inputs = {k: v for k, v in inputs.items() if k != "index"}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        dataset, table = self._scored
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            table.add(inputs["index"], dataset.score(model, inputs))
        return None, None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of this rank's share of a data set's batches."""
        if not self._scores_own_metrics:
            return super().get_eval_dataloader(eval_dataset)
        chosen: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            chosen = chosen[eval_dataset]
        elif eval_dataset is not None:
            chosen = eval_dataset
        if chosen is None:
            raise UserError("AddaxTrainer: evaluation needs an eval_dataset")
        args = self.args
        return evaluation_dataloader(
            chosen,
            args.eval_batch_size,
            args.process_index,
            args.world_size,
            self._pad_token_id,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return a loader for ``predict``, the same as for ``evaluate``."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Run Trainer's loop as forward-only passes, with the metrics of the data set."""
        dataset: Any = dataloader.dataset
        if self._scores_own_metrics:
            self._scored = dataset, ScoreTable(dataset)
        prefetching = (
            nullcontext() if self.optimizer is None else self.addax.sharding.forward_only()
        )
        try:
            with prefetching:
                output: Any = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            if self._scored is not None:
                self.scores = self._scored[1].complete()
                for name, value in dataset.metrics(self.scores).items():
                    output.metrics[f"{metric_key_prefix}_{name}"] = value
        finally:
            self._scored = None
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the values of the last step to what Trainer reports while it trains."""
        if "loss" in logs and self.addax.report is not None:
            report = self.addax.report
            values = {
                "learning_rate": self._learning_rate,
                "g0": report.g0,
                "zo_loss": report.zeroth_order_loss,
                "fo_loss": report.first_order_loss,
                "zo_update_norm": report.zeroth_order_norm,
                "fo_update_norm": report.first_order_norm,
                "grad_norm": report.gradient_norm,
            }
            logs.update({key: value for key, value in values.items() if value is not None})
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step: 4 a parameter and token zeroth-order, 6 first-order."""
        weights = {"zeroth_order": 4 * (self.addax.alpha > 0), "first_order": 6}
        tokens = sum(
            weight * inputs[stream]["input_ids"].numel()
            for stream, weight in weights.items()
            if stream in inputs
        )
        return tokens * self.addax.sharding.trainable_elements

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # Shards of FSDP2 are where they belong, which with CPU offload is another device.
        if not isinstance(model, FSDPModule):
            super()._move_model_to_device(model, device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder that ``from_pretrained`` loads; every rank has to call it."""
        folder = output_dir or self.args.output_dir
        assert folder is not None
        assert self.model is not None
        checkpoint.save_model(self.model, Path(folder), self.args, self.processing_class)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            checkpoint.save_state(Path(output_dir), self.addax, self.lr_scheduler, self._run())

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: `_prepare_for_training` fills the shards, once there are any."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            checkpoint.load_state(folder, self.addax, self.lr_scheduler, self._run())
            checkpoint.load_weights(self.addax.sharding, folder)
            self.addax.sharding.resume_at(self.state.global_step)
        return prepared

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        checkpoint.load_weights(self.addax.sharding, Path(self.state.best_model_checkpoint))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """No gradient is left to take the norm of; `log` adds the one that was tracked."""

    # ---- helpers -------------------------------------------------------------------------------

    @property
    def addax(self) -> Addax:
        """The optimizer, out of the wrappers of DeepSpeed and Accelerate."""
        return unwrap(self.optimizer)

    def _run(self) -> checkpoint.Run:
        return checkpoint.Run.of(self.args, self.settings, self.addax.sharding.name)

    def _batch_loss(self, model: nn.Module, inputs: dict[str, Any], stream: str) -> Tensor:
        """Return a loss whose mean over ranks is the mean over the global batch's target tokens.

        ``compute_loss`` divides the rank's sum by the global number and multiplies by the number of
        ranks, to undo the mean that DeepSpeed and `Addax.zeroth_order` take over them.
        """
        batch = self._prepare_inputs(inputs[stream])
        targets = torch.tensor(inputs[f"{stream}_targets"], device=self.args.device)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=targets)
        assert isinstance(loss, Tensor)
        return loss

    def _logs_after_this_step(self) -> bool:
        step, args = self.state.global_step + 1, self.args
        if args.logging_strategy == "steps":
            return step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        return args.logging_strategy == "epoch"


def causal_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """Cross-entropy of the target tokens, in fp32, summed in fp64 and divided by a given number.

    Trainer's ``compute_loss_func``, because not every model heeds ``num_items_in_batch`` in its own
    loss. Logits are widened at target positions alone: prompts cost no fp32 copy.

    Args:
        outputs: of the model; ``logits`` of shape ``(rows, length, vocabulary)``.
        labels: int64 ``(rows, length)``, not shifted.
        num_items_in_batch: number of target tokens in the global batch.

    Returns:
        fp64 scalar.
    """
    return -token_scores(outputs.logits, labels)[:, 0].sum() / num_items_in_batch


def _pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return a token to pad with; masked out, so any will do where the tokenizer names none."""
    if tokenizer is None:
        return 0
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
