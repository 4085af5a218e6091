"""Trainer that goes on from a checkpoint as if it had not been interrupted."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from addax_ds.checkpoint import folders
from addax_ds.checkpoint.identity import Progress
from addax_ds.checkpoint.state import load_state, save_state
from addax_ds.distributed.collectives import all_gather_object, raise_on_all_ranks
from addax_ds.optim.addax import Addax, unwrap
from addax_ds.training.costs import Costs
from addax_ds.training.saving import SavingMixin

logger = logging.getLogger(__name__)


class ResumingMixin(SavingMixin):
    """Saves what a run needs to go on, and loads it, as overrides of Trainer's methods."""

    _progress: Progress | None = None
    _loss_before = 0.0

    @property
    def addax(self) -> Addax:
        """The optimizer, out of the wrappers of DeepSpeed and Accelerate."""
        return unwrap(self.optimizer)

    def _save_optimizer_state(self, folder: Path) -> None:
        """Write optimizer, scheduler and the settings that must match on a resume."""
        metric, greater_is_better = self._chosen_by
        eval_data = None if metric is None else self._eval_digest(metric)
        with raise_on_all_ranks():
            if self.args.should_save:
                progress = Progress(
                    loss_sum=self._tr_loss.item(),
                    loss_total=self._loss_total(),
                    last_logged_step=self._globalstep_last_logged,
                    costs=asdict(self.costs.costs),
                    metric=metric,
                    greater_is_better=greater_is_better,
                    eval_data=eval_data,
                )
                save_state(folder, self.addax, self.lr_scheduler, self._run, progress)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint), max_steps)
        return prepared

    def _resume(self, folder: Path, max_steps: int) -> None:
        """Load optimizer, scheduler and weights of a checkpoint; every rank has to call it."""
        with raise_on_all_ranks():
            progress = load_state(folder, self.addax, self.lr_scheduler, self._run)
        self._progress = progress
        self.state.compute_steps(self.args, max_steps)  # Trainer leaves those of the checkpoint
        self._forget_another_best(folder, progress)
        self._load_weights(folder)
        self.resumed_step = self.state.global_step
        self.addax.sharding.resume_at(self.resumed_step)
        if self.is_world_process_zero():
            costs = Costs(**progress.costs)
            logger.info(
                "Resuming from %s: step %d of %d, after %d tokens in %.0f s",
                folder,
                self.resumed_step,
                max_steps,
                costs.train_tokens,
                costs.train_seconds,
            )

    @property
    def _chosen_by(self) -> tuple[str | None, bool | None]:
        """The metric by which the best checkpoint is chosen, and whether more of it is better."""
        metric = self.args.metric_for_best_model
        if metric is None:
            return None, None
        return metric.removeprefix("eval_"), self.args.greater_is_better

    def _eval_digest(self, metric: str) -> str | None:
        """Digest of the rows of ``eval_dataset`` that a metric is of; None if nobody knows."""
        return None

    def _forget_another_best(self, folder: Path, progress: Progress) -> None:
        """Forget the best checkpoint if it was by another metric or on other rows, or is gone."""
        state = self.state
        before = progress.metric, progress.greater_is_better
        with raise_on_all_ranks():
            saved = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        named = saved.best_model_checkpoint
        if named is not None and state.best_model_checkpoint is None:
            # Not where it was written: the folder may have been moved.
            beside = folder.parent / Path(named).name
            own = folders.read_run_id(folder)
            if beside.is_dir() and own is not None and folders.read_run_id(beside) == own:
                state.best_model_checkpoint = str(beside)
                if self.is_world_process_zero():
                    logger.info("Resuming: the best checkpoint up to now is %s", beside)
        metric, rows = progress.metric, progress.eval_data
        if metric is not None and before != self._chosen_by:
            why = f"was chosen by {metric}, which no longer chooses it in the same way"
        elif metric and rows and self._eval_digest(metric) not in (rows, None):
            why = "was chosen on other rows"
        elif any(all_gather_object(named is not None and state.best_model_checkpoint is None)):
            why = "is not there any more"
        else:
            return
        if state.best_metric is not None and self.is_world_process_zero():
            logger.warning(
                "Resuming: the best checkpoint up to now, %s, %s: the best one is that of the "
                "steps from here on.",
                named or f"of step {state.best_global_step}",
                why,
            )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def resume_logging(self) -> None:
        """Go on with what is logged as a sum over steps, once Trainer has begun anew."""
        self._loss_before = 0.0
        if self._progress is not None:
            self._tr_loss += self._progress.loss_sum
            self._total_loss_scalar = -self._progress.loss_sum  # of the steps since the resume
            self._loss_before = self._progress.loss_total
            self._globalstep_last_logged = self._progress.last_logged_step
            self.costs.resume(Costs(**self._progress.costs))
            self._progress = None

    def _loss_total(self) -> float:
        """Sum of the losses of all steps up to now."""
        return self._loss_before + self._total_loss_scalar + self._tr_loss.item()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer's ``train_loss`` is a mean over the steps since the resume; this one is over those
        # before, too, and still there if none is left to train.
        since = max(self.state.global_step - self._initial_global_step, 0.001)
        mean = self._loss_total() / max(self.state.global_step, 1)
        self._total_loss_scalar = mean * since - self._tr_loss.item()
        return super()._finalize_training(*args, **kwargs)

    def _free_gathered(self) -> None:
        self.addax.sharding.weights_changed()
