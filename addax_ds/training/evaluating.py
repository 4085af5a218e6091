"""Trainer whose evaluation lets the data set score its batches, shared out over the ranks."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from addax_ds.evaluation.scored_set import ScoredSet, Scores, ScoreTable, evaluation_dataloader
from addax_ds.utils.errors import UserError


def check_evaluations(
    args: TrainingArguments, dataset: ScoredSet | Mapping[str, ScoredSet] | None
) -> None:
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
    sets = dataset.items() if isinstance(dataset, Mapping) else [("", dataset)]
    made = [
        f"{name}_{metric}" if name else metric
        for name, scored in sets
        for metric in scored.metrics(np.full((len(scored), scored.width), -1.0))
    ]
    if chosen.removeprefix("eval_") not in made:
        raise UserError(
            f"--metric_for_best_model {chosen}: no evaluation here makes it; it must be of "
            f"{', '.join(made)}"
        )


class ScoringTrainer(Trainer):
    """Evaluation of `AddaxTrainer`, as overrides of Trainer's methods.

    With a ``compute_metrics`` of the user's, Trainer's own evaluation runs instead.

    Attributes:
        scores: what the data set made its last metrics of, a row an example; or None.
    """

    scores: Scores | None = None
    _scored: tuple[ScoredSet, ScoreTable] | None = None
    _pad_token_id: int

    @property
    def _scores_own_metrics(self) -> bool:
        return self.compute_metrics is None

    def _forward_only(self) -> AbstractContextManager[None]:
        """Announce passes without a backward."""
        return nullcontext()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Score a batch by its data set; scores are gathered once, after all batches."""
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
        try:
            with self._forward_only():
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
