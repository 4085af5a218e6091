"""Checkpoints: a folder for ``from_pretrained``, and beside it a few numbers of the run.

The weights are safetensors files (`weights`), those of an adapter likewise. What the optimizer has
is in ``addax_state.json``; the schedule is in ``scheduler.pt``, and the rest is Trainer's own.
Nothing depends on the number of ranks or on the back end, except the states of the random
generators, one file a rank, which dropout draws from. The folder appears when it is complete, with
a checksum for each file (`atomic`); `resume` says which one to go on from.
"""

import contextlib
import io
import json
import logging
import pickle
import re
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from addax_ds.checkpoint import atomic, weights
from addax_ds.checkpoint.adapters import (
    check_adapters,
    has_adapters,
    load_adapters,
    save_adapter_configs,
    save_adapters,
)
from addax_ds.checkpoint.identity import Progress, Run, changes
from addax_ds.distributed.collectives import is_rank_zero, raise_on_all_ranks
from addax_ds.distributed.nodes import ranks_of_node
from addax_ds.optim.addax import Addax
from addax_ds.optim.hyperparameters import BY_NAME
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)

STATE_NAME = "addax_state.json"
RUN_ID_NAME = "addax_run_id"


# ---- the folder --------------------------------------------------------------------------------


def atomic_folder(folder: Path, args: TrainingArguments) -> AbstractContextManager[Path]:
    """Give where to write what is to be ``folder``, which appears when all of it is on the disk.

    Every rank has to call and enter; see `atomic.atomic_folder`. Several nodes need a file system
    that they share, or ``save_on_each_node`` if each has its own. On disks of their own
    without that flag the first node alone has the folder, and it has to be copied to the others
    before a run can go on from it.

    Raises:
        UserError: on all ranks, if one of them cannot write.
    """
    return atomic.atomic_folder(folder, _writers(args))


def steps(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, the newest first."""
    found = (
        re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir()
    )
    return sorted((int(match[1]) for match in found if match), reverse=True)


def path_of(output_dir: Path, step: int) -> Path:
    """Return where Trainer keeps the checkpoint of a step."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint from its path."""
    return int(folder.name.rpartition("-")[2])


def read_run_id(folder: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if it has none."""
    try:
        found = (folder / RUN_ID_NAME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if re.fullmatch("[0-9a-f]{32}", found) else None


def write_run_id(folder: Path, run_id: str | None) -> None:
    """Write the id of a run into a checkpoint, if it has one."""
    if run_id:
        (folder / RUN_ID_NAME).write_text(f"{run_id}\n", encoding="utf-8")


def rotate(
    output_dir: Path,
    step: int,
    limit: int | None,
    best: str | None,
    run_id: str | None = None,
) -> None:
    """Remove the oldest checkpoints of a run beyond ``save_total_limit``; one rank calls it.

    Those of later steps count as the oldest: the run went on from before them.

    Args:
        output_dir: where they are.
        step: of the checkpoint that was just written, which stays.
        limit: how many to keep; all if it is None or 0.
        best: path of the best one, which stays.
        run_id: of the run, as in its checkpoints; those of others stay.
    """
    if not limit or limit < 0:
        return
    own = (s for s in steps(output_dir) if read_run_id(path_of(output_dir, s)) == run_id)
    by_age = sorted(own, key=lambda other: (other <= step, other))
    kept = {path_of(output_dir, step), Path(best) if best else None} - {None}
    removable = [p for s in by_age if (p := path_of(output_dir, s)) not in kept]
    for path in removable[: max(0, len(by_age) - max(limit, len(kept)))]:
        with atomic.writing(path):
            atomic.discard(path)


def _writers(args: TrainingArguments) -> list[int]:
    """Ranks that share a file system with this rank, or with rank 0 if nodes do not all save."""
    return ranks_of_node(args, None if args.save_on_each_node else 0)


# ---- weights -----------------------------------------------------------------------------------


def save_model(
    model: nn.Module,
    folder: Path,
    args: TrainingArguments,
    tokenizer: Any = None,
) -> None:
    """Write a folder that ``from_pretrained`` loads; every rank has to call it.

    Args:
        model: on any back end; of one with adapters these alone are written.
        folder: where to.
        args: say which ranks write.
        tokenizer: or None; saved with the model.
    """
    with raise_on_all_ranks(), atomic.writing(folder):
        if args.should_save:
            _start_folder(folder, args, tokenizer)
    if has_adapters(model):
        save_adapters(model, folder, args.should_save)
    else:
        shown = args.process_index == 0 and not args.disable_tqdm
        weights.save_weights(model, folder, _writers(args), progress=shown)


def rehearse_saving(
    model: nn.Module, output_dir: Path, args: TrainingArguments, tokenizer: Any = None
) -> None:
    """Write what `save_model` writes beside the weights, and remove it; every rank has to call it.

    Raises:
        UserError: on all ranks, if one could not save what it is going to train.
    """
    folder = output_dir / atomic.UNFINISHED / "rehearsal"
    with raise_on_all_ranks():
        if not args.should_save:
            return
        try:
            with atomic.writing(output_dir):
                atomic.remove_unfinished(output_dir)
                _start_folder(folder, args, tokenizer)
                if has_adapters(model):
                    save_adapter_configs(model, folder)
                else:
                    weights.save_config(model, folder)
        except UserError:
            raise
        except Exception as error:  # of whatever class of configuration or tokenizer the model has
            raise UserError(
                f"the model could not be saved after the training, which therefore does not start: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                atomic.remove_unfinished(output_dir)


def load_weights(model: nn.Module, folder: Path, progress: bool = False) -> None:
    """Fill this rank's shards from a folder that `save_model` wrote; every rank has to call it.

    What is gathered is then from before; whoever gathers has to free it.

    Raises:
        UserError: on all ranks, if one cannot; see `WeightFiles`. Also if one
            of folder and model has adapters of PEFT and the other has not.
    """
    adapters = has_adapters(model)
    with raise_on_all_ranks():
        if adapters:
            load_adapters(model, folder)
        else:
            check_adapters(folder, None)
            weights.fill(model, folder, progress)


def _start_folder(folder: Path, args: TrainingArguments, tokenizer: Any) -> None:
    """Write all that does not depend on the model."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    _save(args, folder / TRAINING_ARGS_NAME)


def _save(content: Any, path: Path) -> None:
    """Save by way of memory: torch itself does not say why a file cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


# ---- state -------------------------------------------------------------------------------------


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
        _save(scheduler.state_dict(), folder / SCHEDULER_NAME)


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
    _load_schedule(folder / SCHEDULER_NAME, scheduler, [group["lr"] for group in groups])
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
        content["run"] = _nested(content["run"])
        Run(**content["run"])
        Progress(**content["progress"])
        content["optimizer"]["param_groups"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: this is not the state of an Addax run: {error!r}") from error
    return content


def _nested(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run with its hyperparameters in one entry; older states have one for each."""
    flat = {name: value for name, value in run.items() if name in BY_NAME}
    if not flat:
        return run
    rest = {name: value for name, value in run.items() if name not in flat}
    return rest | {"hyperparameters": flat | rest.get("hyperparameters", {})}


def _continued(saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group where it was, with the hyperparameters that this run gives it."""
    group = {**saved, "params": own["params"], "weight_decay": own["weight_decay"]}
    before, now = saved.get("initial_lr"), own.get("initial_lr")
    if before and now is not None and before != now:
        if is_rank_zero():
            logger.warning("The learning rate was %g and is %g from here on.", before, now)
        group |= {"lr": saved["lr"] * (now / before), "initial_lr": now}
    return group


def _load_schedule(path: Path, scheduler: Any, lrs: list[float]) -> None:
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
    of_this_run = {"base_lrs": own.get("base_lrs"), "_last_lr": lrs}
    scheduler.load_state_dict(state | {k: v for k, v in of_this_run.items() if k in own})


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
