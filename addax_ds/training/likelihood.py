"""Loss and evaluation by the likelihood of target tokens, as causal language models have them."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from addax_ds.data.datasets import as_examples
from addax_ds.data.encoding import padding_token
from addax_ds.data.examples import NO_LOSS, Example, turn_ends_of
from addax_ds.data.train_rows import EncodedRows, TrainRows, check_map_style
from addax_ds.distributed.collectives import all_gather_object
from addax_ds.evaluation.likelihood import (
    model_inputs,
    scores_of_logits,
    target_scores,
    target_tensors,
    targets_of,
)
from addax_ds.evaluation.scored_set import (
    EvaluationCollator,
    EvaluationSet,
    ScoredSet,
    Scores,
    ScoreTable,
    evaluation_dataloader,
)
from addax_ds.models.stopping import stop_at
from addax_ds.training.steps import StepMixin
from addax_ds.utils.errors import UserError
from addax_ds.utils.model_config import max_positions, vocabulary_size

if TYPE_CHECKING:
    _Steps = StepMixin
else:
    _Steps = object  # comes before the step and the trainer


def check_evaluations(args: TrainingArguments, dataset: Any) -> None:
    """Check that evaluations have data, and make the metric by which the best weights are chosen.

    Raises:
        UserError: they have none, or do not make it; it lists what they make.
    """
    chosen = args.metric_for_best_model
    if dataset is None:
        if args.eval_on_start or args.eval_strategy != "no":
            raise UserError("--eval_strategy and --eval_on_start need data to evaluate on")
        return
    if chosen is None or args.eval_strategy == "no":
        return
    made = [
        f"{name}_{metric}" if name else metric
        for name, scored in _by_name(dataset).items()
        for metric in _metrics_of(scored)
    ]
    if chosen.removeprefix("eval_") not in made:
        raise UserError(
            f"--metric_for_best_model {chosen}: no evaluation here makes it; it must be of "
            f"{', '.join(made)}"
        )


# Models by what they are for; Transformers has them by name, without importing them.
_OTHER_MODELS = (
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
)


def _check_predicts_next_token(model: Any, trainer: str) -> None:
    """Raise `UserError` for a model of Transformers that does not predict the next token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    name = type(base).__name__
    if not type(base).__module__.startswith("transformers."):
        return
    # Some multimodal models are what their configuration stands for, and predict text.
    causal = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith(
        "ForConditionalGeneration"
    )
    other = any(name in names.values() for names in _OTHER_MODELS) and not causal
    if other or getattr(base.config, "is_encoder_decoder", False):
        raise UserError(
            f"{trainer} trains causal language models, and {name} is none: AddaxMixin gives an "
            "Addax step to the Trainer of any model, class Mine(AddaxMixin, Trainer)"
        )


def _by_name(dataset: Any) -> Mapping[str, Any]:
    """Return the data sets of an evaluation; one without a name has none."""
    return dataset if isinstance(dataset, Mapping) else {"": dataset}


def _metrics_of(dataset: Any) -> Iterable[str]:
    """Return the names of what an evaluation measures."""
    if not isinstance(dataset, ScoredSet):
        return ("loss",)
    return dataset.metrics(np.full((len(dataset), dataset.width), -1.0))


class LikelihoodMixin(_Steps):
    """Loss and evaluation of `AddaxTrainer` and `BaselineTrainer`.

    The loss is the cross-entropy of target tokens (`addax_ds.evaluation.likelihood`), summed over
    the global batch in fp64 and divided by its number of targets; a loss of the model's own is not
    used. ``train_dataset`` and ``eval_dataset`` are examples (`addax_ds.data.encoding.encode`), or
    what `as_examples` makes some of: any map-style data set with ``input_ids``, or of text. With a
    ``data_collator`` of the user's, it makes the batches, ``labels`` among them. A subclass with a
    ``compute_loss`` of its own is refused, as nothing would call it.

    What is evaluated scores its own batches (`ScoredSet`), shared out over the ranks. With a
    ``compute_metrics`` or a ``data_collator`` of the user's, Trainer's evaluation runs instead.

    Attributes:
        scores: what the data set made its last metrics of, a row an example; or None.
    """

    scores: Scores | None = None
    _scored: tuple[ScoredSet, ScoreTable] | None = None

    def __init__(self, model: Any, args: Any = None, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise UserError(
                f"{type(self).__name__} takes no compute_loss_func: the loss is the likelihood of "
                "the target tokens; AddaxMixin takes that of any trainer"
            )
        if type(self).compute_loss is not Trainer.compute_loss:
            raise UserError(
                f"{type(self).__name__} has a compute_loss of its own, which nothing calls: the "
                "loss is the likelihood of the target tokens. Give compute_loss to a "
                "transformers.Trainer, and the step to that: class Mine(AddaxMixin, MyTrainer)"
            )
        _check_predicts_next_token(model, type(self).__name__)
        vocabulary = vocabulary_size(getattr(model, "config", None))
        self._pad_token_id = padding_token(kwargs.get("processing_class"), vocabulary)
        self._collates = kwargs.get("data_collator") is not None
        if not self._collates:
            kwargs["data_collator"] = EvaluationCollator(self._pad_token_id)
        self._evaluated: list[tuple[Any, str | None, ScoredSet]] = []
        super().__init__(model, args, **{**kwargs, "compute_loss_func": causal_loss})
        self._loss_shifts_labels = True  # causal_loss does, if maybe not the model's own
        if not self._collates and self.eval_dataset is not None:
            for name, dataset in _by_name(self.eval_dataset).items():
                where = f"eval_dataset {name!r}" if name else "eval_dataset"
                self._scored_set(dataset, where)
        if self.compute_metrics is None and not self._collates:
            check_evaluations(self.args, self.eval_dataset)

    # ---- training ------------------------------------------------------------------------------

    def train_rows(self, dataset: Any) -> TrainRows:
        """Return the examples of a data set, unless the user has a collator.

        Saved models stop where their learnt turns end.
        """
        if self._collates:
            return super().train_rows(dataset)
        examples = self._examples(dataset, "train_dataset")
        tokenizer: Any = self.processing_class
        if tokenizer is not None:
            stop_at(self.model, turn_ends_of(examples), tokenizer)
        return EncodedRows(examples, self._pad_token_id)

    def _examples(self, dataset: Any, name: str) -> Sequence[Example]:
        if self.template_time is None:  # the same on all ranks, whatever their clocks say
            self.template_time = all_gather_object(datetime.now().isoformat())[0]
        tokenizer: Any = self.processing_class
        config: Any = getattr(self.model, "config", None)
        return as_examples(
            dataset,
            name,
            tokenizer,
            model_positions=max_positions(config),
            vocabulary_size=vocabulary_size(config),
            now=datetime.fromisoformat(self.template_time),
        )

    def _scored_set(self, dataset: Any, name: str) -> ScoredSet:
        """Return what evaluates the examples of a data set.

        That of ``eval_dataset`` is made once, and once more by a resumed run, whose chat templates
        read the time of its first start.

        Raises:
            UserError: a row cannot be used, or rows have no numbers.
        """
        if isinstance(dataset, ScoredSet):
            return dataset
        for number, (given, time, made) in enumerate(self._evaluated):
            if given is not dataset:
                continue
            if time != self.template_time:
                made = EvaluationSet(self._examples(dataset, name))
                self._evaluated[number] = dataset, self.template_time, made
            return made
        check_map_style(dataset, name, "ranks share out")
        made = EvaluationSet(self._examples(dataset, name))
        if any(dataset is each for each in _by_name(self.eval_dataset).values()):
            self._evaluated.append((dataset, self.template_time, made))
        return made

    def _count_targets(self, batches: list[dict[str, Any]]) -> Tensor | int | None:
        """Count the targets of all ranks; nothing predicts position 0, whatever the model says."""
        if any("labels" not in batch for batch in batches):
            raise UserError(
                f"{type(self).__name__}: the data_collator makes no labels, from which the loss is "
                "computed"
            )
        own = sum(int((batch["labels"][:, 1:] != NO_LOSS).sum()) for batch in batches)
        counts = self.accelerator.gather(torch.tensor([own], device=self.args.device))
        return int(counts.sum())

    def prepare_micro_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the device, with what its loss needs to know of the labels."""
        return self._prepare_inputs({**batch, **target_tensors(batch["labels"])})

    def micro_batch_loss(self, model: nn.Module, batch: dict[str, Any], targets: Any) -> Tensor:
        """Return a loss whose mean over ranks and micro-batches is that over all target tokens.

        In fp64. The sum is divided by the global number of targets, and multiplied by the number of
        ranks and micro-batches: whoever takes the step takes a mean over them. It is 0 for a batch
        without any, which only a collator of a user's own makes.
        """
        with self.compute_loss_context_manager():
            scores = target_scores(model, batch)
        parts = self.args.world_size * self.settings.gradient_accumulation_steps
        return -scores[:, 0].sum() * (parts / max(targets, 1))

    # ---- evaluation ----------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Score a batch by its data set; scores are gathered once, after all batches."""
        if self._scored is None:
            labels = {name: inputs[name] for name in self.label_names if name in inputs}
            inputs = {**model_inputs(model, inputs), **labels}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        dataset, table = self._scored
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            table.add(inputs["index"], dataset.score(model, inputs))
        return None, None, None

    def _eval_digest(self, metric: str) -> str | None:
        if self._collates or self.eval_dataset is None:
            return None
        by_name = _by_name(self.eval_dataset)
        names = [name for name in by_name if not name or metric.startswith(f"{name}_")]
        if not names:
            return None
        return self._scored_set(by_name[max(names, key=len)], "eval_dataset").digest

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return a loader of this rank's share of a data set's batches."""
        if self._collates:
            return super().get_eval_dataloader(eval_dataset)
        chosen: Any = self.eval_dataset
        if isinstance(eval_dataset, str):
            chosen = chosen[eval_dataset]
        elif eval_dataset is not None:
            chosen = eval_dataset
        if chosen is None:
            raise UserError(f"{type(self).__name__}: evaluation needs an eval_dataset")
        chosen = self._scored_set(chosen, "eval_dataset")
        if self.compute_metrics is not None:
            return super().get_eval_dataloader(chosen)
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
        """Run Trainer's loop, with the metrics of the data set."""
        dataset: Any = dataloader.dataset
        if isinstance(dataset, ScoredSet) and self.compute_metrics is None:
            self._scored = dataset, ScoreTable(dataset)
        try:
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
