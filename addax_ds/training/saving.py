"""Trainer with atomic checkpoints, which are verified before they are read."""

import io
import logging
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from addax_ds.checkpoint import atomic, folders, model_folder, ownership, resume
from addax_ds.checkpoint.identity import Run
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.settings import AddaxSettings, check_can_resume
from addax_ds.data.partition import Partition
from addax_ds.distributed.collectives import all_gather_object, limit_waiting, raise_on_all_ranks
from addax_ds.sharding.registry import back_end, back_end_of
from addax_ds.training.costs import CostMeter
from addax_ds.training.hub import UploadingMixin
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)


class SavingMixin(UploadingMixin):
    """Saving and loading of models and checkpoints, as overrides of Trainer's methods.

    A rank that cannot write ends all of them with a `UserError`; no collective waits for it.

    Args:
        *args: of Trainer.
        template_time: see `Run`; None for the time at which rows are encoded.
        saves_at_end: whether the model is to be saved after the training, also without checkpoints:
            then it is tried before the first step.
        **kwargs: of Trainer.

    Attributes:
        partition: how the training data is divided; None if there is none.
        costs: of the training up to now.
        resumed_step: how many steps the checkpoint had that the training goes on from, or 0.
        template_time: see `Run`; a resumed run has that of its checkpoint.
    """

    args: AddaxConfig
    partition: Partition | None
    costs: CostMeter
    resumed_step: int = 0
    _run_id: str | None = None

    def __init__(
        self,
        *args: Any,
        template_time: str | None = None,
        saves_at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        self.template_time = template_time
        self.saves_at_end = saves_at_end
        super().__init__(*args, **kwargs)

    @property
    def settings(self) -> AddaxSettings:
        """The method and its hyperparameters, those of ``args``."""
        return self.args.settings

    # ---- saving --------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder that ``from_pretrained`` loads; every rank has to call it.

        Files are written where they are to be; `save_complete_model` leaves no half of a model.
        """
        folder = output_dir or self.args.output_dir
        assert folder is not None
        assert self.model is not None
        model_folder.save_model(self.model, Path(folder), self.args, self.processing_class)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_complete_model(self, folder: Path) -> None:
        """Write the model to ``folder`` with checksums; it appears, or is replaced, when complete.

        Every rank has to call it. What else was in the folder is gone afterwards.

        Raises:
            UserError: on all ranks, if one cannot write; ``folder`` is as it was.
        """
        with folders.atomic_folder(folder, self.args) as staging:
            self.save_model(str(staging), _internal_call=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write Trainer's card, with the method where Trainer would name ``--optim``."""
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir or ".") / "README.md"
        if not self.is_world_process_zero() or not card.is_file():
            return
        run = self._run
        values = (f", {k} {v}" for k, v in run.hyperparameters.items() if v is not None)
        lines = [f"- optimizer: addax_ds, method {run.method}{''.join(values)}"]
        for name in ("zeroth_order_batch", "first_order_batch"):
            if size := getattr(run, name):
                lines.append(f"- {name}_size: {size} over all ranks")
        text = re.sub(r"^- total_train_batch_size: .*\n", "", card.read_text("utf-8"), flags=re.M)
        method = re.sub(r"^- optimizer: .*$", lambda _: "\n".join(lines), text, flags=re.M)
        card.write_text(method, "utf-8")

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write what Trainer writes; older checkpoints are removed when the new one is there."""
        self.store_flos()
        assert self.args.output_dir is not None
        root, step = Path(self.args.output_dir), self.state.global_step
        folder = folders.path_of(root, step)
        with folders.atomic_folder(folder, self.args) as staging:
            self._name_best(root)
            self.save_model(str(staging), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_state(staging)
                self._save_generators(staging)
            self._save_trainer_state(staging)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self._rotate(step)

    def _rotate(self, step: int) -> None:
        """Remove this run's checkpoints beyond the limit; that of a step and the best one stay."""
        with raise_on_all_ranks():
            if self.args.should_save:
                root, limit = Path(self.args.output_dir or "."), self.args.save_total_limit
                best = self.state.best_model_checkpoint
                folders.rotate(root, step, limit, best, self._run_id)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer would delete other runs' checkpoints, too, when the limit is 1. A stopped run
        # keeps the weights and the checkpoint that it resumes from.
        limit, loads_best = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit = None
        self.args.load_best_model_at_end = loads_best and not self.stopped
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, loads_best
        if limit == 1 and self.best_step and not self.stopped:
            self._rotate(self.best_step)
        return output

    @property
    def stopped(self) -> bool:
        """True if ``train`` ended early on request."""
        return False

    @property
    def best_step(self) -> int | None:
        """Step of the best checkpoint; None if there is none.

        A better evaluation may have come when nothing was saved.
        """
        best = self.state.best_model_checkpoint
        return None if best is None else folders.step_of(Path(best))

    def _name_best(self, root: Path) -> None:
        """Note where the best checkpoint is, or will be in a moment."""
        step = self.state.best_global_step
        if not step:
            return
        best = folders.path_of(root, step)
        if step == self.state.global_step or all(all_gather_object(best.is_dir())):
            self.state.best_model_checkpoint = str(best)

    def _save_optimizer_state(self, folder: Path) -> None:
        """Nothing here: the checkpoints of a baseline serve to choose the best one alone."""

    def _save_generators(self, folder: Path) -> None:
        """Gather the states of all ranks, of which some may not see the folder."""
        distributed = self.args.world_size > 1
        by_rank = all_gather_object(_generator_states(distributed))
        with raise_on_all_ranks(), atomic.writing(folder):
            if self.args.should_save:
                for rank, states in enumerate(by_rank):
                    name = f"rng_state_{rank}.pth" if distributed else "rng_state.pth"
                    (folder / name).write_bytes(states)

    def _save_trainer_state(self, folder: Path) -> None:
        """Write what Trainer knows, callbacks included, and whose checkpoint it is."""
        with raise_on_all_ranks(), atomic.writing(folder):
            if not self.args.should_save:
                return
            # Anew: a callback may have come with a resume.
            states: dict[str, Any] = {}
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    states.setdefault(type(callback).__name__, []).append(callback.state())
            state: Any = self.state
            state.stateful_callbacks = {
                name: of_class[0] if len(of_class) == 1 else of_class
                for name, of_class in states.items()
            }
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            assert self._run_id is not None  # `train` claims one
            folders.write_run_id(folder, self._run_id)

    # ---- training from a checkpoint ------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | resume.Checkpoint | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train, from the start or from a checkpoint; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a path, True for the newest intact one in ``output_dir``, or
                what `resume.find` has found, whose files are then not read a second time.
            *args: passed on.
            **kwargs: passed on.

        Raises:
            UserError: if the method cannot resume, the checkpoint is damaged or of another run (see
                `resume.find`), or ``output_dir`` belongs to another run (see
                `addax_ds.checkpoint.ownership`).
        """
        if self.args.find_learning_rate:
            raise UserError(
                "find_learning_rate is set, so there is no learning rate to train with: call "
                "find_learning_rate() of the trainer, or set learning_rate"
            )
        unheeded = self.args.resume_from_checkpoint if resume_from_checkpoint is None else None
        if unheeded and str(unheeded).lower() != "false":
            logger.warning(
                "resume_from_checkpoint of the arguments has no effect on train(): call "
                "train(resume_from_checkpoint=...)"
            )
        if resume_from_checkpoint:
            check_can_resume(self.settings.method)
        self.resumed_step = 0
        with ownership.held(self.args):
            found = resume_from_checkpoint
            if not isinstance(found, resume.Checkpoint):
                found = resume.find(found, self.args)
            folder = None if found is None else found.folder
            self._run_id = ownership.claim(self.args, folder, self._run_id)
            if found is None:
                return super().train(None, *args, **kwargs)
            with raise_on_all_ranks():
                found.check(replace(self._run, data=None))
            self._take_time_of(found.written)
            with raise_on_all_ranks():
                found.check(self._run)
            return super().train(str(found.folder), *args, **kwargs)

    def _take_time_of(self, written: Run) -> None:
        """Let chat templates read the time that they read in a run that goes on here."""
        self.template_time = written.template_time or self.template_time

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: `ResumingMixin` fills the shards, once there are any."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        limit_waiting(self.args.ddp_timeout)  # now that DeepSpeed has made its groups
        assert self.model is not None
        if self.saves_at_end or self.args.save_strategy != "no":
            root = Path(self.args.output_dir or ".")
            model_folder.rehearse_saving(self.model, root, self.args, self.processing_class)
        if resume_from_checkpoint is None:
            self.start_afresh(prepared[0])
        return prepared

    def start_afresh(self, model: nn.Module) -> None:
        """Do what a training needs before its first step, and not when it resumes.

        Args:
            model: as steps call it; under DeepSpeed the engine.
        """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks whether the last step is done only after it has taken one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        folder = Path(self.state.best_model_checkpoint)
        resume.require_intact(folder, self.args)
        self._load_weights(folder)

    def _load_weights(self, folder: Path) -> None:
        """Fill the shards; every rank has to call it."""
        shown = self.is_world_process_zero() and not self.args.disable_tqdm
        assert self.model is not None
        model_folder.load_model(self.model, folder, progress=shown)
        self._free_gathered()

    def _free_gathered(self) -> None:
        """Free what is gathered from weights that are no more."""
        assert self.model is not None
        back_end_of(self.model).free_gathered(self.model_wrapped)

    @property
    def _run(self) -> Run:
        """Identity of the run, for checkpoints."""
        assert self.model is not None
        # DeepSpeed's engine may not have partitioned the model yet.
        engine = back_end(deepspeed=True) if self.is_deepspeed_enabled else None
        run = Run.of(self.args, (engine or back_end_of(self.model)).name)
        run = replace(run, template_time=self.template_time)
        if self.partition is None:
            return run
        return run.with_data(self._data_digest, self.partition.threshold)

    @property
    def _data_digest(self) -> str:
        """Digest of the training data, if there is any."""
        raise NotImplementedError


def _generator_states(distributed: bool) -> bytes:
    """Return the file that `Trainer._load_rng_state` reads."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        get = torch.cuda.get_rng_state_all if distributed else torch.cuda.get_rng_state
        states["cuda"] = get()
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()
