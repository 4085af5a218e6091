"""The DeepSpeed JSON: reading it, filling its "auto" values, refusing what Addax cannot honour.

`deepspeed_keys` lists every key. Under Transformers' Trainer the "auto" values are filled by
Trainer and by `configure`; without Trainer by `ds_config`.
"""

import copy
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from addax_ds.config.deepspeed_keys import AUTO_KEYS, DS_KEYS, OPTIMIZER_PARAMS
from addax_ds.config.deepspeed_values import AUTO, json_problems, value_problems
from addax_ds.config.presets import find_preset
from addax_ds.config.support import Status
from addax_ds.optim.update import ROUNDINGS
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import read_regular
from addax_ds.utils.messages import did_you_mean, raise_problems, shown

logger = logging.getLogger(__name__)

Source = str | PathLike[str] | Mapping[str, Any]

# Defaults of `addax_ds.Addax`; the learning rate has none.
OPTIMIZER_DEFAULTS: dict[str, Any] = {
    "alpha": 1e-3,
    "zo_eps": 1e-3,
    "weight_decay": 0.0,
    "seed": 0,
    "rounding": "stochastic",
}

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


def load_ds_config(source: Source) -> tuple[dict[str, Any], str]:
    """Read a DeepSpeed configuration.

    Args:
        source: the path of a JSON file, the name of a ready one such as "zero3", a string that is
            a JSON object, or a mapping.

    Returns:
        The configuration as a new `dict`, "auto" values included, and how to name it in messages.

    Raises:
        UserError: the file is missing, is not JSON, names a key twice, is not an object, or holds
            what `addax_ds.config.deepspeed_values.json_problems` lists.
    """
    if not isinstance(source, str | PathLike | Mapping):
        raise UserError(f"A DeepSpeed config is a path or an object, not {shown(repr(source))}.")
    if isinstance(source, Mapping):
        config, where = source, "the DeepSpeed config"
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        config, where = _parse(source, "the DeepSpeed config"), "the DeepSpeed config"
    else:
        where = find_preset(str(source))
        config = _parse(_read(Path(where)), where)
    if not isinstance(config, Mapping):
        raise UserError(f"{where} must hold a JSON object, not {type(config).__name__}.")
    raise_problems(f"{where} cannot be used:", list(json_problems(config)))
    return copy.deepcopy(dict(config)), where


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
        problems.append(f"zero_optimization.stage is missing. {_note('zero_optimization.stage')}")
    optimizer = config.get("optimizer")
    if isinstance(optimizer, Mapping):
        if "type" not in optimizer:
            problems.append(f"optimizer.type is missing. {_note('optimizer.type')}")
        params = optimizer.get("params", {})
        if isinstance(params, Mapping):
            problems += optimizer_problems(params, prefix="optimizer.params.")
    problems = problems or list(value_problems(config))
    raise_problems(f"{where} cannot be used with Addax:", problems)


def optimizer_problems(params: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield what is wrong with the values of Addax's own settings; "auto" and `None` pass."""
    for name, value in params.items():
        if value is None or value == AUTO or name not in OPTIMIZER_PARAMS:
            continue
        expected = _expected(name, value)
        if expected:
            yield f"{prefix}{name} = {shown(repr(value))}: it must be {expected}."


def warn_without_effect(config: Mapping[str, Any], where: str) -> None:
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
    weight_decay: float | None = None,
    alpha: float | None = None,
    zo_eps: float | None = None,
    seed: int | None = None,
    rounding: str | None = None,
    bf16: bool | None = None,
    hidden_size: int | None = None,
) -> dict[str, Any]:
    """Build the `config` for `deepspeed.initialize` without Transformers' Trainer.

    Replaces every "auto" that Trainer would replace, adds the `optimizer` block where it is
    missing, and checks the result. `gradient_accumulation_steps` becomes 1, `gradient_clipping` 0
    and `fp16.enabled` false; an "auto" `train_batch_size` is left to DeepSpeed, which multiplies
    the micro batch by the number of ranks.

    Args:
        path_or_dict: the path of a DeepSpeed JSON, or the same as a mapping. It is not changed.
        lr: learning rate η.
        micro_batch_size: first-order examples per rank and step, K¹ / ranks.
        weight_decay: decoupled weight decay λ (default 0).
        alpha: mixing weight α of the zeroth-order gradient, 0 to 1 (default 1e-3).
        zo_eps: perturbation scale ε (default 1e-3).
        seed: seed of z and of stochastic rounding (default 0).
        rounding: "stochastic" or "nearest", for bf16 weights (default stochastic).
        bf16: whether the weights are stored in bf16 (default: as in the JSON, "auto" is false).
        hidden_size: `model.config.hidden_size`, from which Trainer derives the "auto" bucket sizes
            and the persistence threshold. Without it those keys are dropped and DeepSpeed's own
            defaults apply, among them a reduce bucket of 5e8 elements.

    Raises:
        UserError: for anything `load_ds_config` or `check_ds_config` refuses, for an argument that
            contradicts a value in the JSON (both are named), and for a left-over "auto".
    """
    config, where = load_ds_config(path_or_dict)
    check_ds_config(config, where)
    warn_without_effect(config, where)
    if config.get("gradient_accumulation_steps") not in (None, AUTO, 1):
        raise UserError(
            f"{where}: gradient_accumulation_steps is Trainer's. Without it write 1, and give "
            "Addax.measure() a closure for each micro-batch."
        )
    arguments = {
        "lr": lr,
        "alpha": alpha,
        "zo_eps": zo_eps,
        "weight_decay": weight_decay,
        "seed": seed,
        "rounding": rounding,
    }
    raise_problems("ds_config() was called with:", list(optimizer_problems(arguments, prefix="")))
    params = config.setdefault("optimizer", {"type": "Addax"}).setdefault("params", {})
    for name, value in arguments.items():
        _fill(params, name, value, OPTIMIZER_DEFAULTS.get(name), f"optimizer.params.{name}", where)
    _fill_sizes(config, micro_batch_size, hidden_size, where)
    if bf16 is not None:
        config.setdefault("bf16", {}).setdefault("enabled", AUTO)
    if "enabled" in config.get("bf16", {}):
        _fill(config["bf16"], "enabled", bf16, False, "bf16.enabled", where, argument="bf16")
    _fill_schedule(config, params["lr"])
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


def _fill(
    block: dict[str, Any],
    name: str,
    given: Any,
    default: Any,
    key: str,
    where: str,
    argument: str | None = None,
) -> None:
    """Settle `block[name]` in place; without any value an "auto" stays for `_refuse_auto`."""
    value = pick(block.get(name), given, default, (argument or name, key), where)
    block[name] = AUTO if value is None else value


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
        _fill(config, key, micro_batch_size, None, key, where, argument="micro_batch_size")
    for name, value in (("gradient_accumulation_steps", 1), ("gradient_clipping", 0.0)):
        if config.get(name, AUTO) == AUTO:
            config[name] = value
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
                yield f"{shown(path)}: unknown key.{guess}{_unknown_hint(path)}"
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


def _unknown_hint(path: str) -> str:
    if path == "optimizer.params.eps":
        return " Addax's perturbation scale is zo_eps; it has no Adam epsilon."
    if path == "optimizer.params.method":
        return " The method is an argument of launch/train.py; here alpha says it (1 is mezo)."
    return ""


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


def _expected(name: str, value: Any) -> str:
    """Return what `value` should have been, or an empty string when it is right."""
    if name == "rounding":
        return "" if value in ROUNDINGS else " or ".join(map(repr, ROUNDINGS))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name == "seed":
        whole = isinstance(value, int) and number and 0 <= value < 2**64
        return "" if whole else "an integer from 0 to 2**64 - 1"
    finite = number and abs(value) <= sys.float_info.max  # not for a NaN either
    if name == "alpha":
        return "" if finite and 0 <= value <= 1 else "a number from 0 to 1"
    if name == "zo_eps":
        return "" if finite and value > 0 else "a number above 0"
    return "" if finite and value >= 0 else "a number of at least 0"


def _note(path: str) -> str:
    return DS_KEYS[path].note


def _read(path: Path) -> str:
    try:
        return read_regular(path, "utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no DeepSpeed config {path} (looked in {Path.cwd()}).") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a null byte in the path
        where = shown(str(path), 300)
        raise UserError(f"Cannot read the DeepSpeed config {where}: {error}.") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # a number too long, or too many brackets
        raise UserError(f"{where} cannot be read: {error}.") from error


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    twice = sorted(shown(name) for name, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{where} gives {', '.join(twice)} more than once; keep one.")
    return dict(pairs)
