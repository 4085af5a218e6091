"""The values in the DeepSpeed JSON, whose keys `addax_ds.config.deepspeed_keys` lists.

DeepSpeed reads many of them unseen and dies of a wrong one after the model is loaded, or in the
middle of a run. Here its own classes are asked beforehand, and what they take without looking is
checked against a table. DeepSpeed is imported when there is a JSON to check.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, get_args

import torch

from addax_ds.utils.extras import naming_extras
from addax_ds.utils.messages import did_you_mean, shown

AUTO = "auto"

_MAX_DEPTH = 20
_MAX_ENTRIES = 10_000
_NUMBER_LIMIT = 2**64  # seeds go up to here

Check = tuple[Callable[[Any], bool], str]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_SWITCH: Check = (lambda value: isinstance(value, bool), "true or false")
_COUNT: Check = (lambda value: value is None or _whole(value, 1), "a whole number above 0")
_NUMBER: Check = (
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value >= 0,
    "a number of at least 0",
)
_DTYPE: Check = (lambda value: value in (None, "fp32", "bf16", "fp16"), "fp32, bf16 or fp16")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# What DeepSpeed takes without looking, or takes in several spellings of which Transformers, which
# reads the same JSON, knows one.
_CHECKS: dict[str, Check] = {
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": (lambda value: value is None or _NUMBER[0](value), _NUMBER[1]),
    # Trainer silences DeepSpeed by infinity.
    "steps_per_print": (lambda value: value == math.inf or _COUNT[0](value), _COUNT[1]),
    "vocabulary_size": _COUNT,
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "dump_state": _SWITCH,
    "disable_python_gc": _SWITCH,
    "log_level": (
        lambda value: value is None or value in _LOG_LEVELS,
        f"one of {', '.join(_LOG_LEVELS)}",
    ),
    "bf16.enabled": _SWITCH,
    "fp16.enabled": _SWITCH,
    "fp16.loss_scale": _NUMBER,
    "fp16.min_loss_scale": _NUMBER,
    "fp16.loss_scale_window": _COUNT,
    "data_types.param_dtype": _DTYPE,
    "data_types.buffer_dtype": _DTYPE,
    "flops_profiler.enabled": _SWITCH,
    "flops_profiler.detailed": _SWITCH,
    "flops_profiler.recompute_fwd_factor": _NUMBER,
    "flops_profiler.profile_step": (lambda value: _whole(value, 1), "a whole number above 0"),
    "flops_profiler.module_depth": (lambda value: _whole(value, -1), "a whole number or -1"),
    "flops_profiler.top_modules": (lambda value: _whole(value, 0), "a whole number"),
    "flops_profiler.output_file": (
        lambda value: value is None or isinstance(value, str),
        "a path or null",
    ),
    "timers": (lambda value: isinstance(value, Mapping), "an object"),
    "timers.throughput": (lambda value: isinstance(value, Mapping), "an object"),
}
# Blocks in which DeepSpeed does not mind unknown keys.
_OPEN_BLOCKS = ("flops_profiler", "timers")


def json_problems(content: Any) -> Iterator[str]:
    """Yield what JSON cannot hold, or no configuration needs; the rest may rely on it.

    Numbers are finite and below 2**64, keys are strings, and there are at most 10,000 entries in
    at most 20 levels: an alias of YAML can make more of a few lines.
    """
    yield from _json_problems(content, "", 0, count())


def _json_problems(value: Any, path: str, depth: int, entries: Iterator[int]) -> Iterator[str]:
    place = path or "the whole"
    if depth > _MAX_DEPTH:
        yield f"{shown(place)}: it is nested more than {_MAX_DEPTH} levels deep."
    elif isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            number = next(entries)
            if number == _MAX_ENTRIES:
                yield f"{shown(place)}: there are more than {_MAX_ENTRIES} entries."
            if number >= _MAX_ENTRIES:
                return
            if isinstance(value, Mapping) and not isinstance(key, str):
                yield f"{shown(place)}: the key {key!r} must be a string."
            else:
                below = f"{path}.{key}" if path else str(key)
                yield from _json_problems(inner, below, depth + 1, entries)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{shown(place)} = {value}: it must be a finite number."
    elif isinstance(value, int | float) and not -_NUMBER_LIMIT < value < _NUMBER_LIMIT:
        yield f"{shown(place)}: the number is too large."
    elif not (value is None or isinstance(value, str | int | float)):
        yield f"{shown(place)}: JSON has no {type(value).__name__}."


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
    for path, (accepts, expected) in _CHECKS.items():
        parent, _, name = path.rpartition(".")
        block = config.get(parent) if parent else config
        if isinstance(block, Mapping) and name in block:
            value = block[name]
            if value != AUTO and not accepts(value):
                yield f"{path} = {_value(value)}: it must be {expected}."
    for name in _OPEN_BLOCKS:
        block = config.get(name)
        known = [path.partition(".")[2] for path in _CHECKS if path.startswith(f"{name}.")]
        for key in block if isinstance(block, Mapping) else ():
            if key not in known:
                yield f"{shown(f'{name}.{key}')}: unknown key.{did_you_mean(key, known)}"
    batch: Any = config.get("train_batch_size")
    micro: Any = config.get("train_micro_batch_size_per_gpu")
    if _whole(batch, 1) and _whole(micro, 1) and batch % micro:
        yield (
            f"train_batch_size = {batch}: it is train_micro_batch_size_per_gpu, {micro}, times "
            "micro-batches and ranks; leave it out."
        )
    yield from _kind_problems(DeepSpeedZeroConfig, config, "zero_optimization")
    offload = config["zero_optimization"]
    yield from _kind_problems(DeepSpeedZeroOffloadParamConfig, offload, "offload_param")
    yield from _deepspeed_problems(config)
    yield from _schedule_problems(config)


def _kind_problems(model: Any, config: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield booleans for numbers and texts for either, which DeepSpeed's classes would convert."""
    prefix = "" if name == "zero_optimization" else "zero_optimization."
    block = config.get(name) or {}
    for key, field in model.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)} & {bool, int, float}
        for spelling in {key, field.alias} & block.keys():
            value = block[spelling]
            if not kinds or value is None or value == AUTO or isinstance(value, Mapping | list):
                continue
            if isinstance(value, str) or isinstance(value, bool) != (bool in kinds):
                expected = "true or false" if bool in kinds else "a number"
                yield f"{prefix}{name}.{spelling} = {_value(value)}: it must be {expected}."


def _deepspeed_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Let DeepSpeed parse one top-level entry after the other."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

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
        for item in error.errors():
            path = ".".join(("zero_optimization", *map(str, item["loc"])))
            yield f"{shown(path)} = {shown(repr(item['input']))}: {item['msg']}."
    except Exception as error:
        yield f"zero_optimization: DeepSpeed refuses it: {_said(error)}"


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
    if not isinstance(block.get("params"), Mapping):
        yield f"scheduler.params = {_value(block.get('params'))}: it must be an object."
        return
    params = {
        # A list has a value for each parameter group.
        key: 1 if value == AUTO else value[0] if isinstance(value, list) and value else value
        for key, value in block["params"].items()
    }
    name = block["type"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        with _silent():
            schedule = getattr(lr_schedules, name)(optimizer, **params)
            optimizer.step()
            schedule.step()
        rate = float(optimizer.param_groups[0]["lr"])
    except Exception as error:
        yield f"scheduler.params = {_value(block['params'])}: {name} refuses them: {_said(error)}"
        return
    if not math.isfinite(rate) or rate < 0:
        yield f"scheduler.params = {_value(block['params'])}: the learning rate becomes {rate}."


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
    return shown(" ".join(f"{type(error).__name__}: {error}".split()), 300)


def _value(value: Any) -> str:
    return shown(repr(value))
