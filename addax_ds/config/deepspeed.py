"""The DeepSpeed JSON: reading it, filling its "auto" values, refusing what Addax cannot honour.

`deepspeed_keys` lists every key. Under Transformers' Trainer the "auto" values are filled by
Trainer and by `AddaxConfig`; without Trainer by `ds_config`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from addax_ds.config.deepspeed_keys import AUTO_KEYS, DS_KEYS
from addax_ds.config.deepspeed_values import AUTO, value_problems
from addax_ds.config.presets import find_preset
from addax_ds.config.support import Status
from addax_ds.optim.hyperparameters import BY_NAME, HYPERPARAMETERS, HyperparameterKwargs
from addax_ds.optim.hyperparameters import problems as hyperparameter_problems
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json, read_regular
from addax_ds.utils.messages import did_you_mean, raise_problems, shown

logger = logging.getLogger(__name__)

Source = str | PathLike[str] | Mapping[str, Any]

_BLOCKS = frozenset(key.rpartition(".")[0] for key in DS_KEYS if "." in key)
# Blocks that must be off: what else stands in them does nothing, so it is not checked.
_OFF_BLOCKS = frozenset(
    {
        "autotuning",
        "compile",
        "data_efficiency",
        "expert_parallel",
        "hybrid_engine",
        "tensor_parallel",
    }
)
_UNKNOWN_HINTS = {
    "optimizer.params.eps": " Addax's perturbation scale is zo_eps; it has no Adam epsilon.",
    "optimizer.params.method": " The method is an argument of the command line; here alpha says it "
    "(1 is mezo).",
}


def load_ds_config(source: Source) -> tuple[dict[str, Any], str]:
    """Read a DeepSpeed configuration.

    Args:
        source: the path of a JSON file, the name of a ready one such as "zero3", a string that is
            a JSON object, or a mapping.

    Returns:
        The configuration as a new `dict`, "auto" values included, and how to name it in messages.

    Raises:
        UserError: the file is missing, is not JSON, names a key twice, or is not an object.
    """
    if not isinstance(source, str | PathLike | Mapping):
        raise UserError(f"A DeepSpeed config is a path or an object, not {shown(repr(source))}.")
    where = "the DeepSpeed config"
    try:
        if isinstance(source, Mapping):
            text = json.dumps(dict(source), allow_nan=False)
        elif isinstance(source, str) and source.lstrip().startswith("{"):
            text = source
        else:
            where = find_preset(str(source))
            text = _read(Path(where))
        config = parse_json(text)
    except UserError:  # a ValueError, too, and a whole sentence
        raise
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} cannot be used: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{where} must hold a JSON object, not {type(config).__name__}.")
    return config, where


def check_ds_config(config: Mapping[str, Any], where: str) -> None:
    """Check a DeepSpeed configuration, "auto" values allowed where something fills them.

    Args:
        config: the configuration, before or after its "auto" values were filled.
        where: how to name it in messages.

    Raises:
        UserError: lists every unknown key, refused value, wrong value and misplaced "auto", each by
            its dotted key.
    """
    problems = list(_key_problems(config))
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping) or "stage" not in zero:
        problems.append(
            f"zero_optimization.stage is missing. {DS_KEYS['zero_optimization.stage'].note}"
        )
    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping):
        if "type" not in optimizer:
            problems.append(f"optimizer.type is missing. {DS_KEYS['optimizer.type'].note}")
        params = optimizer.get("params", {})
        if isinstance(params, Mapping):
            given = {k: v for k, v in params.items() if v is not None and v != AUTO}
            problems += hyperparameter_problems(given, "optimizer.params.")
    problems = problems or list(value_problems(config))
    raise_problems(f"{where} cannot be used with Addax:", problems)


def warn_of_unused_keys(config: Mapping[str, Any], where: str) -> None:
    """Log a warning for each key of `config` that changes nothing here."""
    for path, _ in _leaves(config):
        rule = DS_KEYS.get(path)
        if rule is not None and rule.status is Status.NO_EFFECT:
            logger.warning("%s: %s has no effect: %s", where, path, rule.note)


def ds_config(
    path_or_dict: Source,
    *,
    lr: float | None = None,
    micro_batch_size: int | None = None,
    bf16: bool | None = None,
    hidden_size: int | None = None,
    **hyperparameters: Unpack[HyperparameterKwargs],
) -> dict[str, Any]:
    """Build the `config` for `deepspeed.initialize` without Transformers' Trainer.

    Replaces every "auto" that Trainer would replace, adds the `optimizer` block where it is
    missing, and checks the result. `gradient_accumulation_steps` becomes 1 and `fp16.enabled`
    false; an "auto" `train_batch_size` is left to DeepSpeed, which multiplies the micro batch by
    the number of ranks.

    Args:
        path_or_dict: see `load_ds_config`. A mapping is not changed.
        lr: learning rate η.
        micro_batch_size: first-order examples per rank and step, K¹ / ranks.
        bf16: whether the weights are stored in bf16 (default: as in the JSON, "auto" is false).
        hidden_size: `model.config.hidden_size`, from which Trainer derives the "auto" bucket sizes
            and the persistence threshold. Without it those keys are dropped and DeepSpeed's own
            defaults apply, among them a reduce bucket of 5e8 elements.
        **hyperparameters: those of `addax_ds.Addax`; `max_grad_norm` is `gradient_clipping` in the
            JSON.

    Raises:
        UserError: for anything `load_ds_config` or `check_ds_config` refuses, for an argument that
            contradicts a value in the JSON (both are named), and for a left-over "auto".
        TypeError: for an argument that there is not.
    """
    config, where = load_ds_config(path_or_dict)
    check_ds_config(config, where)
    warn_of_unused_keys(config, where)
    if config.get("gradient_accumulation_steps") not in (None, AUTO, 1):
        raise UserError(
            f"{where}: gradient_accumulation_steps is Trainer's. Without it write 1, and give "
            "Addax.measure() a closure for each micro-batch."
        )
    _fill_hyperparameters(config, {"lr": lr, **hyperparameters}, where)
    _fill_sizes(config, micro_batch_size, hidden_size, where)
    if bf16 is not None or "enabled" in config.get("bf16", {}):
        _fill(config, "bf16.enabled", bf16, False, where, argument="bf16")
    _fill_schedule(config, config["optimizer"]["params"]["lr"])
    _refuse_auto(config, where)
    check_ds_config(config, where)
    return config


def automatic_sizes(hidden: int) -> dict[str, int]:
    """Return what Trainer makes of "auto" in a ``zero_optimization`` block, in elements.

    Args:
        hidden: hidden size of the model (`HfTrainerDeepSpeedConfig.trainer_config_finalize`).
    """
    return {
        "reduce_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }


def pick(json_value: Any, given: Any, default: Any, names: tuple[str, str], where: str) -> Any:
    """Settle one value that may stand both in the JSON and in an argument.

    Args:
        json_value: the value in the JSON; `None` and "auto" mean the argument.
        given: the argument, or `None` if it was not given.
        default: used when neither is given.
        names: what to call the argument and the JSON key in a message.
        where: what to call the JSON.

    Raises:
        UserError: both are given and differ.
    """
    if json_value is None or json_value == AUTO:
        return default if given is None else given
    if given is not None and given != json_value:
        argument, key = names
        raise UserError(
            f"{argument} is {given!r}, but {key} in {where} is {json_value!r}. "
            f'Give the value in one of the two places only, or write "auto" in the JSON.'
        )
    return json_value


def value_at(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key, `None` where it is missing."""
    *blocks, name = key.split(".")
    for block in blocks:
        config = config.get(block, {})
    return config.get(name)


def _fill(
    config: dict[str, Any], key: str, given: Any, default: Any, where: str, argument: str = ""
) -> None:
    """Settle the value at a dotted key, in place; without any an "auto" is left.

    Args:
        config: gets the blocks that are missing.
        key: the last part is the argument's name, unless `argument` says another.
        given: see `pick`.
        default: see `pick`; `_refuse_auto` names the key if it is `None`.
        where: what to call the JSON.
        argument: what to call the argument.
    """
    *blocks, name = key.split(".")
    block = config
    for inner in blocks:
        block = block.setdefault(inner, {})
    value = pick(block.get(name), given, default, (argument or name, key), where)
    block[name] = AUTO if value is None else value


def _fill_hyperparameters(config: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Fill the optimizer's block, and what else of the JSON is a hyperparameter, in place."""
    unknown = given.keys() - BY_NAME.keys()
    if unknown:
        raise TypeError(f"ds_config() got an unexpected keyword argument {min(unknown)!r}")
    stated = {name: value for name, value in given.items() if value is not None}
    raise_problems("ds_config() was called with:", list(hyperparameter_problems(stated)))
    config.setdefault("optimizer", {"type": "Addax"})
    for known in HYPERPARAMETERS:
        default = None if known.default is MISSING else known.default
        name = known.name
        _fill(config, known.json_key, stated.get(name), default, where, argument=name)


def _fill_sizes(
    config: dict[str, Any], micro_batch_size: int | None, hidden_size: int | None, where: str
) -> None:
    """Fill batch sizes and the sizes that Trainer derives from `hidden_size`, in place."""
    key = "train_micro_batch_size_per_gpu"
    if micro_batch_size is not None and micro_batch_size < 1:
        raise UserError(f"micro_batch_size must be at least 1, not {micro_batch_size}.")
    if config.get("train_batch_size") == AUTO:
        del config["train_batch_size"]
    if micro_batch_size is not None or "train_batch_size" not in config:
        _fill(config, key, micro_batch_size, None, where, argument="micro_batch_size")
    if config.get("gradient_accumulation_steps", AUTO) == AUTO:
        config["gradient_accumulation_steps"] = 1
    if config.get("fp16", {}).get("enabled") == AUTO:
        config["fp16"]["enabled"] = False
    zero = config["zero_optimization"]
    for name, size in automatic_sizes(hidden_size or 0).items():
        if zero.get(name) == AUTO:
            if hidden_size is None:
                del zero[name]
            else:
                zero[name] = size


def _fill_schedule(config: dict[str, Any], lr: Any) -> None:
    """Fill the scheduler's learning rates as Trainer does; its step counts need a number."""
    params = config.get("scheduler", {}).get("params", {})
    for name, value in (("warmup_min_lr", 0.0), ("warmup_max_lr", lr)):
        if params.get(name) == AUTO:
            params[name] = value


def _refuse_auto(config: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` naming every key that still says "auto"."""
    hints = {
        "optimizer.params.lr": "pass lr=",
        "train_micro_batch_size_per_gpu": "pass micro_batch_size=",
    }
    left = [path for path, value in _leaves(config) if value == AUTO]
    raise_problems(
        f'{where} leaves "auto", which only Trainer resolves, in:',
        [f"{path}: {hints.get(path, 'write a value in the JSON')}." for path in left],
    )


def _key_problems(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield unknown keys, refused values and misplaced "auto", depth first."""
    parent = prefix.rstrip(".")
    for key, value in block.items():
        path = f"{prefix}{key}"
        rule = DS_KEYS.get(path)
        if rule is None:
            if parent not in _OFF_BLOCKS:
                known = [k[len(prefix) :] for k in DS_KEYS if k.rpartition(".")[0] == parent]
                guess = did_you_mean(str(key), known)
                yield f"{shown(path)}: unknown key.{guess}{_UNKNOWN_HINTS.get(path, '')}"
        elif value == AUTO and path not in AUTO_KEYS:
            yield f'{path} = "auto": nothing fills this key; write a value or remove it.'
        elif value != AUTO and not rule.accepts(value):
            yield f"{path} = {shown(json.dumps(value))}: {rule.note}"
        elif path in _BLOCKS and not (path == "zero_optimization.offload_param" and value is None):
            if isinstance(value, Mapping):
                yield from _key_problems(value, f"{path}.")
            else:
                yield f"{path} = {shown(json.dumps(value))}: it must be an object."
        elif isinstance(value, Mapping):
            for inner, leaf in _leaves(value, f"{path}."):
                if leaf == AUTO and inner not in AUTO_KEYS:
                    yield f'{shown(inner)} = "auto": nothing fills this key; write or remove it.'


def _leaves(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and value of every entry that is not itself a listed block."""
    for key, value in block.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if path in DS_KEYS and path not in _BLOCKS:
                yield path, None
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _read(path: Path) -> str:
    try:
        return read_regular(path, "utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no DeepSpeed config {path} (looked in {Path.cwd()}).") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a null byte in the path
        where = shown(str(path), 300)
        raise UserError(f"Cannot read the DeepSpeed config {where}: {error}.") from error
