"""The values in the DeepSpeed JSON, whose keys `addax_ds.config.deepspeed_keys` lists.

DeepSpeed reads many of them unseen and dies of a wrong one after the model is loaded, or in the
middle of a run. Here its own classes are asked beforehand, and what they take without looking is
checked by a class of the same kind. DeepSpeed is imported when there is a JSON to check.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from addax_ds.distributed.startup import launched_as_rank_zero
from addax_ds.utils.extras import naming_extras
from addax_ds.utils.messages import on_one_line, shown

AUTO = "auto"

_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_DType = Literal["fp32", "bf16", "fp16"]


class _Block(BaseModel):
    """Strict: no text and no boolean where a number belongs."""

    model_config = ConfigDict(strict=True)


class _BF16(_Block):
    enabled: bool = False


class _FP16(_BF16):
    loss_scale: _Number = 0.0
    min_loss_scale: _Number = 1.0
    loss_scale_window: PositiveInt = 1000


class _DataTypes(_Block):
    param_dtype: _DType | None = None
    buffer_dtype: _DType | None = None


class _FlopsProfiler(_Block):
    enabled: bool = False
    detailed: bool = True
    recompute_fwd_factor: _Number = 0.0
    profile_step: PositiveInt = 1
    module_depth: Annotated[int, Field(ge=-1)] = -1
    top_modules: NonNegativeInt = 1
    output_file: str | None = None


class _Unseen(_Block):
    """Values that DeepSpeed does not look at, or takes in spellings that Transformers does not."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: _Number | None = None
    steps_per_print: Annotated[float, Field(gt=0)] | None = None  # infinite under Accelerate
    vocabulary_size: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    bf16: _BF16 = _BF16()
    fp16: _FP16 = _FP16()
    data_types: _DataTypes = _DataTypes()
    flops_profiler: _FlopsProfiler = _FlopsProfiler()


def value_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values that DeepSpeed could not use; "auto" passes.

    Args:
        config: keys and refused values have been checked.

    Raises:
        MissingExtraError: DeepSpeed is not installed.
    """
    with naming_extras():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
    try:
        _Unseen.model_validate(_without_auto(config))
    except ValidationError as error:
        yield from _pydantic_problems(error)
    batch: Any = config.get("train_batch_size")
    micro: Any = config.get("train_micro_batch_size_per_gpu")
    if type(batch) is type(micro) is int and micro > 0 and batch % micro:
        yield (
            f"train_batch_size = {batch}: it is train_micro_batch_size_per_gpu, {micro}, times "
            "micro-batches and ranks; leave it out."
        )
    zero = config["zero_optimization"]
    yield from _kind_problems(DeepSpeedZeroConfig, zero, "zero_optimization")
    offload = zero.get("offload_param") or {}
    yield from _kind_problems(
        DeepSpeedZeroOffloadParamConfig, offload, "zero_optimization.offload_param"
    )
    yield from _deepspeed_problems(config)
    if launched_as_rank_zero():  # which alone writes to them
        yield from _monitor_problems(config)
    yield from _schedule_problems(config)


def _pydantic_problems(error: ValidationError, *parents: str) -> Iterator[str]:
    for item in error.errors():
        path = ".".join((*parents, *map(str, item["loc"])))
        yield f"{shown(path)} = {_value(item['input'])}: {item['msg']}."


def _kind_problems(model: Any, block: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield booleans for numbers and texts for either, which DeepSpeed's classes would convert.

    The planner and Transformers read the block as it is.
    """
    for name, field in model.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)} & {bool, int, float}
        for spelling in {name, field.alias} & block.keys() if kinds else ():
            value = block[spelling]
            if value is None or value == AUTO or isinstance(value, Mapping | list):
                continue
            if isinstance(value, str) or isinstance(value, bool) != (bool in kinds):
                expected = "true or false" if bool in kinds else "a number"
                yield f"{path}.{spelling} = {_value(value)}: it must be {expected}."


def _deepspeed_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Parse each top-level entry with DeepSpeed's own models."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fixed = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for key, value in config.items():
        if key in (*fixed, "train_batch_size", "optimizer", "scheduler") or value == AUTO:
            continue
        try:
            with _silent():
                DeepSpeedConfig({**fixed, key: _without_auto(value)})
        except Exception as error:  # assertions and attribute errors among them
            yield f"{key} = {_value(value)}: DeepSpeed refuses it: {_said(error)}"
    try:
        with _silent():
            DeepSpeedZeroConfig(**config["zero_optimization"])
    except ValidationError as error:
        yield from _pydantic_problems(error, "zero_optimization")
    except Exception as error:
        yield f"zero_optimization: DeepSpeed refuses it: {_said(error)}"


def _monitor_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield monitors whose packages cannot be imported, as rank 0 would find out."""
    from deepspeed.monitor import utils

    for block, check in (
        ("tensorboard", utils.check_tb_availability),
        ("wandb", utils.check_wandb_availability),
        ("comet", utils.check_comet_availability),
    ):
        options = config.get(block)
        if not isinstance(options, Mapping) or options.get("enabled") is not True:
            continue
        try:
            with redirect_stdout(StringIO()):
                check()
        except ImportError as error:
            yield f"{block}.enabled = true: {_said(error)}; install it, or remove the block."


def _schedule_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Make the schedule that the JSON asks for, for an optimizer of no consequence."""
    from deepspeed.runtime import lr_schedules

    if "scheduler" not in config:
        return
    block = config["scheduler"]
    known = lr_schedules.VALID_LR_SCHEDULES
    if not isinstance(block, Mapping) or block.get("type") not in known:
        yield f"scheduler = {_value(block)}: its type must be one of {', '.join(known)}."
        return
    params = block.get("params")
    if not isinstance(params, Mapping):
        yield f"scheduler.params = {_value(params)}: it must be an object."
        return
    # A list has a value for each parameter group.
    filled = {
        key: 1 if value == AUTO else value[0] if isinstance(value, list) and value else value
        for key, value in params.items()
    }
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        with _silent():
            schedule = getattr(lr_schedules, block["type"])(optimizer, **filled)
            optimizer.step()
            schedule.step()
        rate = float(optimizer.param_groups[0]["lr"])
    except Exception as error:
        yield f"scheduler.params = {_value(params)}: {block['type']} refuses them: {_said(error)}"
        return
    if not math.isfinite(rate) or rate < 0:
        yield f"scheduler.params = {_value(params)}: the learning rate becomes {rate}."


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}


@contextmanager
def _silent() -> Iterator[None]:
    """Keep DeepSpeed from announcing each configuration that it is asked about."""
    from deepspeed.utils import logger as deepspeed_logger

    level = deepspeed_logger.level
    deepspeed_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        deepspeed_logger.setLevel(level)


def _said(error: Exception) -> str:
    return on_one_line(f"{type(error).__name__}: {error}")


def _value(value: Any) -> str:
    return shown(repr(value))
