"""Checkpoints: a folder for ``from_pretrained``, and beside it a few numbers of the run.

The weights are safetensors files (`addax_ds.weights`), those of an adapter likewise. What the
optimizer has is in ``addax_state.json``; the schedule is in ``scheduler.pt``, and the rest is
Trainer's own. Nothing depends on the number of ranks or on the back end, except the states of the
random generators, one file a rank, which dropout draws from.
"""

import json
import logging
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from addax_ds import weights
from addax_ds.adapters import has_adapters, load_adapters, save_adapters
from addax_ds.agreement import all_ranks_or_none
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.settings import AddaxSettings
from addax_ds.sharding.base import Sharding

logger = logging.getLogger(__name__)

STATE_NAME = "addax_state.json"


@dataclass(frozen=True)
class Run:
    """What a checkpoint notes of the run that wrote it.

    Attributes:
        sharding: back end.
        ranks: number of ranks; with another one or on another back end a run goes on all the same.
        dtype: of the weights.
        zeroth_order_batch: global size of the zeroth-order batch, 0 if there is none.
        first_order_batch: global size of the first-order batch, 0 if there is none.
    """

    sharding: str
    ranks: int
    dtype: str
    zeroth_order_batch: int
    first_order_batch: int

    @classmethod
    def of(cls, args: TrainingArguments, settings: AddaxSettings, sharding: str) -> "Run":
        """Describe the run that has these arguments."""
        first_order = 0 if settings.method == "mezo" else args.per_device_train_batch_size
        return cls(
            sharding,
            args.world_size,
            "bf16" if args.bf16 else "fp32",
            settings.per_device_zo_batch_size * args.world_size,
            first_order * args.world_size,
        )


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
    with all_ranks_or_none():
        if args.should_save:
            _start_folder(model, folder, args, tokenizer)
    if has_adapters(model):
        save_adapters(model, folder, args.should_save)
    else:
        weights.save_weights(model, folder, _writers(args))


def load_weights(sharding: Sharding, folder: Path) -> None:
    """Fill this rank's shards from a folder that `save_model` wrote.

    Raises:
        UserError: see `addax_ds.weights.WeightFiles`.
    """
    if has_adapters(sharding.model):
        load_adapters(sharding.model, folder)
        sharding.finish_step()  # what is gathered is from before
    else:
        weights.load_weights(sharding, folder)


def _start_folder(model: nn.Module, folder: Path, args: TrainingArguments, tokenizer: Any) -> None:
    """Write all but the weights."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PreTrainedModel):
            _save_config(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(args, folder / TRAINING_ARGS_NAME)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the model: {error}") from error


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """Write what ``save_pretrained`` writes beside the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard's
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _writers(args: TrainingArguments) -> list[int]:
    """Ranks that share a file system with this rank, or with rank 0 if nodes do not all save."""
    if args.world_size == 1:
        return [0]
    local = [torch.zeros((), dtype=torch.int64, device=args.device) for _ in range(args.world_size)]
    dist.all_gather(local, torch.tensor(args.local_process_index, device=args.device))
    nodes: list[list[int]] = []
    for rank, index in enumerate(local):
        if index == 0:
            nodes.append([])
        nodes[-1].append(rank)
    own = args.process_index if args.save_on_each_node else 0
    return next(node for node in nodes if own in node)


# ---- state -------------------------------------------------------------------------------------


def save_state(folder: Path, optimizer: Addax, scheduler: Any, run: Run) -> None:
    """Write what is needed beside the weights to go on; one rank calls it."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    content = {"optimizer": {**state, "param_groups": groups}, "run": asdict(run)}
    (folder / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)


def load_state(folder: Path, optimizer: Addax, scheduler: Any, run: Run) -> None:
    """Let optimizer and schedule go on from where `save_state` was called.

    Raises:
        UserError: if this run cannot go on from there.
    """
    written = check(folder, run)
    state = _read_state(folder)["optimizer"]
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(state["param_groups"]):
        raise UserError(
            f"{folder}: written with {len(state['param_groups'])} parameter groups, and this run "
            f"has {len(own)}"
        )
    groups = [{**g, "params": o["params"]} for g, o in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    _load_schedule(folder / SCHEDULER_NAME, scheduler)
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


def check(folder: Path, run: Run) -> Run:
    """Check that a run can go on from a folder, before anything slow happens.

    Returns:
        The run that wrote the folder.

    Raises:
        UserError: says why it cannot.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise UserError(f"{folder}: there is no checkpoint in this folder")
    if not (folder / STATE_NAME).is_file():
        raise UserError(
            f"{folder}: there is no {STATE_NAME}, without which the step and the learning rate are "
            "not known: written with --save_only_model, or by another trainer. To start anew from "
            f"its weights: --model_name_or_path {folder}"
        )
    written = Run(**_read_state(folder)["run"])
    if written.dtype != run.dtype:
        other = "with" if written.dtype == "bf16" else "without"
        raise UserError(
            f"{folder}: its weights are {written.dtype}, and this run's are {run.dtype}: resume "
            f"{other} --bf16"
        )
    for stream, flag in (
        ("zeroth_order_batch", "--per_device_zo_batch_size"),
        ("first_order_batch", "--per_device_train_batch_size"),
    ):
        before, now = getattr(written, stream), getattr(run, stream)
        if before != now:
            raise UserError(
                f"{folder}: the {stream.replace('_', ' ')} was {before} over all ranks, and is "
                f"{now} in this run, which would see other data: resume with {flag} so that it is "
                f"{before} over {run.ranks} rank(s)"
            )
    return written


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        Run(**content["run"])
        content["optimizer"]["param_groups"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: this is not the state of an Addax run: {error!r}") from error
    return content


def _load_schedule(path: Path, scheduler: Any) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: the file is damaged or cannot be read: {error}") from error
    if not isinstance(state, dict) or state.keys() != scheduler.state_dict().keys():
        raise UserError(
            f"{path}: this is the state of another kind of schedule: resume with the "
            "--lr_scheduler_type, or the scheduler in the DeepSpeed JSON, that it was written with"
        )
    scheduler.load_state_dict(state)
