"""Trials of what Trainer makes of the arguments once the model is loaded.

The objects are made here beforehand, for a model of no consequence, so that whoever made a mistake
hears of it in time. Nothing is known here of what their arguments may be.
"""

import copy
import inspect
import json
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from addax_ds.data.loading import RankLoader
from addax_ds.distributed.startup import launched_as_rank_zero
from addax_ds.utils.generators import generators_kept
from addax_ds.utils.messages import on_one_line, raise_problems, shown

if TYPE_CHECKING:
    from addax_ds.config.addax_config import AddaxConfig

logger = logging.getLogger(__name__)

_STEPS = 1000  # of a run that counts epochs; of a longer one about as many rates are looked at
_OF_THE_HUB = (
    *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
    "hub_revision",
)
_TRAINERS_OWN = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def problems(args: "AddaxConfig", in_json: bool) -> Iterator[str]:
    """Yield what cannot be made.

    Args:
        args: have values that fit Trainer, and a settled learning rate.
        in_json: whether the schedule stands in the DeepSpeed JSON.
    """
    if not in_json:
        yield from _schedule_problems(args, args.max_steps if args.max_steps > 0 else _STEPS)
    if args.activation_checkpointing or args.gradient_checkpointing:
        yield from _checkpointing_problems(args)
    yield from _loader_problems(args)
    if args.push_to_hub and launched_as_rank_zero():  # which alone uploads
        yield from _hub_problems(args)


def check_steps(args: "AddaxConfig", steps: int) -> None:
    """Check the schedule of the learning rate against the number of steps.

    Args:
        args: of the run.
        steps: of the whole training.

    Raises:
        UserError: the schedule cannot have so many, or the DeepSpeed JSON says another number.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None or "scheduler" not in config.config:
        raise_problems("These arguments cannot be used:", list(_schedule_problems(args, steps)))
        return
    filled = copy.deepcopy(config)
    try:
        filled.trainer_config_finalize(args, SimpleNamespace(config=_Hidden), steps)
    except ValueError:
        raise_problems(
            'The schedule in the DeepSpeed config contradicts the training; with "auto" it takes '
            "the number of the training:",
            [mismatch.removeprefix("- ") for mismatch in filled.mismatches],
        )
        raise


def warn_of_unused_arguments(args: "AddaxConfig", in_json: bool, given: Collection[str]) -> None:
    """Log a warning for each argument that another one keeps from having an effect.

    Args:
        args: see `problems`.
        in_json: see `problems`.
        given: names of the arguments that were given.
    """
    unheeded = {
        name: "the DeepSpeed config has a scheduler of its own"
        for name in ("lr_scheduler_type", "lr_scheduler_kwargs")
        if in_json
    }
    kind = SchedulerType(args.lr_scheduler_type)
    if kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP) and not in_json:
        unheeded["lr_scheduler_kwargs"] = f"--lr_scheduler_type {kind.value} takes none"
    if kind is SchedulerType.CONSTANT and args.warmup_steps and not in_json:
        unheeded["warmup_steps"] = "--lr_scheduler_type constant_with_warmup would heed it"
    if not (args.activation_checkpointing or args.gradient_checkpointing):
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            unheeded[name] = "it needs --activation_checkpointing"
    if args.eval_strategy == "no":
        for name in ("do_eval", "metric_for_best_model", "load_best_model_at_end", "eval_delay"):
            unheeded[name] = "it needs --eval_strategy"
    for kind_of in ("eval", "save", "logging"):
        strategy = getattr(args, f"{kind_of}_strategy")
        strategy = getattr(strategy, "value", strategy)
        if strategy != "steps":
            unheeded[f"{kind_of}_steps"] = f"--{kind_of}_strategy is {strategy}, not steps"
    if args.eval_strategy == "steps" and args.eval_steps is None:
        unheeded.pop("logging_steps", None)  # Trainer evaluates as often
    if args.max_steps > 0:
        unheeded["num_train_epochs"] = "--max_steps says how many steps there are"
    if args.metric_for_best_model is None:
        unheeded["greater_is_better"] = "it needs --metric_for_best_model"
    if not args.push_to_hub:
        for name in _OF_THE_HUB:
            unheeded[name] = "it needs --push_to_hub"
    for name, reason in unheeded.items():
        if name in given and (getattr(args, name) or name == "greater_is_better"):
            logger.warning("--%s has no effect: %s.", name, reason)


def repository(args: "AddaxConfig") -> str:
    """Return the name of the repository that ``push_to_hub`` uploads to, as Trainer has it."""
    return args.hub_model_id or Path(args.output_dir or "").absolute().name


class _Hidden:
    hidden_size = 1


def _object(value: Any) -> dict[str, Any]:
    return dict(value or {})  # AddaxConfig has read the JSON of one


def _schedule_problems(args: "AddaxConfig", steps: int) -> Iterator[str]:
    kind, own = SchedulerType(args.lr_scheduler_type), _object(args.lr_scheduler_kwargs)
    called = f"--lr_scheduler_type {kind.value}"
    if own:
        called += f" with --lr_scheduler_kwargs {shown(json.dumps(own))}"
    rate = args.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    try:
        warmup = args.get_warmup_steps(steps)
        schedule: Any = get_scheduler(kind, optimizer, warmup, steps, own)
        looked_at = (*range(0, steps, max(1, steps // _STEPS)), steps - 1)
        rates = [rate * factor(step) for factor in schedule.lr_lambdas for step in looked_at]
    except Exception as error:  # they fail as any function does that is called with anything
        function: Any = TYPE_TO_SCHEDULER_FUNCTION[kind]
        names = inspect.signature(function).parameters.keys()
        takes = ", ".join(name for name in names if name not in _TRAINERS_OWN)
        yield f"{called}: {_said(error)}. --lr_scheduler_kwargs may have {takes or 'nothing'}."
        return
    wrong = next((r for r in rates if not 0 <= r < math.inf), None)
    if wrong is not None:
        yield f"{called}: in {steps} steps the learning rate becomes {wrong:g}."


def _checkpointing_problems(args: "AddaxConfig") -> Iterator[str]:
    """Recompute a tiny model, as Trainer has it done."""
    from transformers import LlamaConfig, LlamaModel  # takes a moment, and few runs ask for it

    name = "activation_checkpointing_kwargs"
    own = _object(getattr(args, name) or args.gradient_checkpointing_kwargs)
    if not own:
        return
    config = LlamaConfig(
        vocab_size=1, hidden_size=2, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1
    )
    whole = {key: value for key, value in own.items() if key in ("every_n_layers", "offload")}
    of_layers = {key: value for key, value in own.items() if key not in whole}
    try:
        with generators_kept(torch.device("cpu")):
            model: Any = LlamaModel(config).train()
            model.activation_checkpointing_enable(of_layers or None, **whole)
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))[0].sum().backward()
    except Exception as error:
        yield f"--{name} {shown(json.dumps(own))}: {_said(error)}."


def _loader_problems(args: "AddaxConfig") -> Iterator[str]:
    names = ("num_workers", "prefetch_factor", "persistent_workers")
    options = {name: getattr(args, f"dataloader_{name}") for name in names}
    try:
        RankLoader([0], collate_fn=dict, **options)  # type: ignore[arg-type]
    except ValueError as error:
        given = ", ".join(f"--dataloader_{name} {value}" for name, value in options.items())
        yield f"{given}: {_said(error)}."


def _hub_problems(args: "AddaxConfig") -> Iterator[str]:
    """Find out what can be known of a hub without asking it."""
    called = repository(args)
    try:
        validate_repo_id(called)
    except HFValidationError as error:
        yield f"--push_to_hub to {shown(called)}: {_said(error)}."
    if is_offline_mode():
        yield "--push_to_hub: HF_HUB_OFFLINE keeps this process from the hub; unset it."
    elif (args.hub_token or get_token()) is None:
        yield "--push_to_hub: there is no token; log in (hf auth login), or give --hub_token."


def _said(error: Exception) -> str:
    return on_one_line(f"{error}").removesuffix(".")
