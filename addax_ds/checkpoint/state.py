"""State of a run beside its weights: optimizer, schedule, and what must match on a resume."""

import json
import logging
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from addax_ds.checkpoint import atomic
from addax_ds.checkpoint.folders import torch_save
from addax_ds.checkpoint.identity import Progress, Run, changes
from addax_ds.distributed.collectives import is_rank_zero
from addax_ds.optim.addax import Addax
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

STATE_NAME = "addax_state.json"


def save_state(
    folder: Path, optimizer: Addax, scheduler: Any, run: Run, progress: Progress
) -> None:
    """Write what is needed beside the weights to go on; one rank calls it."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    content = {
        "optimizer": {**state, "param_groups": groups},
        "run": asdict(run),
        "progress": asdict(progress),
    }
    with atomic.writing(folder):
        (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        torch_save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_state(folder: Path, optimizer: Addax, scheduler: Any, run: Run) -> Progress:
    """Restore optimizer and schedule to the point where `save_state` was called.

    The learning rate and the weight decay are those of this run: another learning rate scales what
    is left of the schedule.

    Returns:
        What was saved with them.

    Raises:
        UserError: if the state is not one of this model and schedule, or cannot be read.
    """
    content = _read_state(folder)
    state = content["optimizer"]
    saved, own = state["param_groups"], optimizer.state_dict()["param_groups"]
    if len(own) != len(saved):
        raise UserError(
            f"{folder}: written with {len(saved)} parameter groups, and this run has {len(own)}"
        )
    groups = [_continued(*pair) for pair in zip(saved, own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _load_schedule(folder / SCHEDULER_NAME, scheduler, optimizer)
    _announce(Run(**content["run"]), run)
    return Progress(**content["progress"])


def read_run(folder: Path) -> Run:
    """Return the run that wrote a checkpoint.

    Raises:
        UserError: no run could go on from the folder; says why.
    """
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"{folder}: there is no checkpoint in this folder")
    if not (folder / STATE_NAME).is_file():
        raise UserError(
            f"{folder}: there is no {STATE_NAME}, without which the step and the learning rate are "
            "not known: written with --save_only_model, or by another trainer. To start anew from "
            f"its weights: --model_name_or_path {folder}"
        )
    return Run(**_read_state(folder)["run"])


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        Run(**content["run"])
        Progress(**content["progress"])
        content["optimizer"]["param_groups"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: this is not the state of an Addax run: {error!r}") from error
    return content


def _continued(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group where it was, with the hyperparameters that this run gives it."""
    group = {**saved, "params": own["params"], "weight_decay": own["weight_decay"]}
    before, now = saved.get("initial_lr"), own.get("initial_lr")
    if before and now is not None and before != now:
        if is_rank_zero():
            logger.warning("The learning rate was %g and is %g from here on.", before, now)
        group |= {"lr": saved["lr"] * (now / before), "initial_lr": now}
    return group


def _load_schedule(path: Path, scheduler: Any, optimizer: Addax) -> None:
    """Go on in a schedule; the optimizer, which has been loaded, gets its rate."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the file is damaged or cannot be read: {error}") from error
    own = scheduler.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        raise UserError(
            f"{path}: this is the state of another kind of schedule: resume with the "
            "--lr_scheduler_type, or the scheduler in the DeepSpeed JSON, that it was written with"
        )
    lrs = [group["lr"] for group in optimizer.param_groups]
    of_this_run = {"base_lrs": own.get("base_lrs"), "_last_lr": lrs}
    scheduler.load_state_dict(state | {k: v for k, v in of_this_run.items() if k in own})
    inner = getattr(scheduler, "scheduler", scheduler)  # out of Accelerate's wrapper
    if isinstance(inner, LambdaLR):
        # The rate that was saved is one of the schedule as it was, perhaps over fewer steps.
        factors = [factor(inner.last_epoch) for factor in inner.lr_lambdas]
        lrs = [base * factor for base, factor in zip(inner.base_lrs, factors, strict=True)]
        inner._last_lr = lrs
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr


def _announce(written: Run, run: Run) -> None:
    """Log the differences from the run that wrote a checkpoint, on rank 0."""
    if not is_rank_zero():
        return
    for change in changes(written, run):
        logger.warning("Resuming: %s.", change)
    if (written.sharding, written.ranks) != (run.sharding, run.ranks):
        logger.info(
            "Resuming on %d rank(s), sharding %s, what %d rank(s), sharding %s, have saved: "
            "weights, step, schedule and order of the data go on as they would have there. "
            "Dropout, if the model has any, draws other masks.",
            run.ranks,
            run.sharding,
            written.ranks,
            written.sharding,
        )
