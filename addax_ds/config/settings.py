"""Settings of a training, settled from its arguments and the DeepSpeed JSON."""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from addax_ds.config.deepspeed import pick, value_at
from addax_ds.config.training_arguments import DEFAULTS
from addax_ds.optim.hyperparameters import (
    HYPERPARAMETERS,
    Hyperparameters,
    runs_twice_to_clip,
)
from addax_ds.optim.methods import BASELINES, METHODS, Method
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems

if TYPE_CHECKING:
    from addax_ds.config.addax_config import AddaxConfig

logger = logging.getLogger(__name__)

# Methods at one end of alpha; those without a zeroth-order part are at 0.
_FIXED_ALPHA: dict[Method, float] = {"mezo": 1.0, "ip-sgd": 0.0, **dict.fromkeys(BASELINES, 0.0)}

# Arguments that a method does not heed.
_OF_ZEROTH_ORDER = (
    "per_device_zo_batch_size",
    *(known.flag for known in HYPERPARAMETERS if known.zeroth_order),
)
_IGNORED: dict[Method, tuple[str, ...]] = {
    "addax": (),
    "addax-wa": ("length_threshold",),
    "mezo": ("length_threshold",),
    "ip-sgd": _OF_ZEROTH_ORDER,
    **dict.fromkeys(BASELINES, ("length_threshold", *_OF_ZEROTH_ORDER, "rounding")),
}


@dataclass(frozen=True)
class AddaxSettings:
    """Settings of a training.

    Attributes:
        method: one of `Method`.
        hyperparameters: of the optimizer; alpha is 1 for mezo, 0 where there are no zeroth-order
            steps.
        length_threshold: L_T in tokens, "median", or "auto" (until a plan has found it); `None`
            where the data is not partitioned. ip-sgd leaves out the rows longer than it.
        per_device_zo_batch_size: rows of a zeroth-order micro-batch; 0 where there is none.
        gradient_accumulation_steps: micro-batches of a step and rank, in either stream.
    """

    method: Method
    hyperparameters: Hyperparameters
    length_threshold: int | Literal["median", "auto"] | None
    per_device_zo_batch_size: int
    gradient_accumulation_steps: int = 1


def settle(
    args: "AddaxConfig", config: Mapping[str, Any], where: str, given: Collection[str]
) -> AddaxSettings:
    """Check the arguments of Addax and settle them against the DeepSpeed JSON.

    A value in the JSON that is not "auto" wins over a default and must agree with an argument that
    was given. Fields of Trainer take it over, in place.

    Args:
        args: arguments whose values fit Trainer.
        config: the JSON as written, empty without DeepSpeed.
        where: what to call the JSON in messages.
        given: names of the arguments that were given.

    Raises:
        UserError: a value out of range, a flag without effect for the method, or a contradiction,
            which names both places and both values.
    """
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: it must be one of {', '.join(METHODS)}.")
    raise_problems("These arguments cannot be used:", list(_problems(args, given)))
    steps_key = "gradient_accumulation_steps"
    steps = _settle(steps_key, steps_key, config, args, given, where)
    values = {
        known.name: _settle(known.flag, known.json_key, config, args, given, where, known.default)
        for known in HYPERPARAMETERS
    }
    args.learning_rate = values["lr"] = _learning_rate(args, values["lr"])
    alpha = values["alpha"]
    if args.method not in _FIXED_ALPHA and not 0 < alpha < 1:
        instead = "mezo" if alpha == 1 else "ip-sgd"
        raise UserError(
            f"--method {args.method} needs an alpha between 0 and 1, and it is {alpha:g}: "
            f"that is --method {instead}."
        )
    if not 0 <= values["seed"] < 2**32:
        raise UserError(f"--seed {values['seed']}: Trainer needs a seed from 0 to 2**32 - 1.")
    _warn(args, values["max_grad_norm"], steps)
    if args.method == "mezo":
        values["max_grad_norm"] = 0.0  # it has no gradient to clip
    zo_batch_size = args.per_device_zo_batch_size or args.per_device_train_batch_size
    return AddaxSettings(
        method=args.method,
        hyperparameters=Hyperparameters(**values),
        length_threshold=_length_threshold(args),
        per_device_zo_batch_size=zo_batch_size if alpha else 0,
        gradient_accumulation_steps=steps,
    )


def _settle(
    flag: str,
    key: str,
    config: Mapping[str, Any],
    args: "AddaxConfig",
    given: Collection[str],
    where: str,
    default: Any = None,
) -> Any:
    """Settle one value; `default` is for a flag that is `None` where it was not given."""
    value, name = getattr(args, flag), f"--{flag}"
    stated = value if flag in given else None
    if flag == "alpha" and args.method in _FIXED_ALPHA:
        stated, name = _FIXED_ALPHA[args.method], f"alpha of --method {args.method}"
    unstated = default if value is None else value
    settled = pick(value_at(config, key), stated, unstated, (name, key), where)
    if value is not None:
        setattr(args, flag, settled)
    return settled


def _learning_rate(args: "AddaxConfig", settled: Any) -> float:
    """Return the rate; one that nobody has given is Trainer's for the methods that it is for.

    Raises:
        UserError: it is missing for the others.
    """
    if settled not in (None, MISSING):
        return settled
    if args.method in BASELINES:
        return DEFAULTS["learning_rate"]
    if args.find_learning_rate:
        return 0.0
    raise UserError(
        f"--learning_rate is missing. Trainer's default, {DEFAULTS['learning_rate']:g}, is a rate "
        f"for Adam; --method {args.method} needs another one. Give it, or have one proposed: "
        "--find_learning_rate (docs/choosing.md)."
    )


def check_can_resume(method: Method) -> None:
    """Raise `UserError` for a method whose checkpoints hold the weights alone."""
    if method in BASELINES:
        raise UserError(
            f"--method {method} cannot resume, its checkpoints hold the weights without the "
            "optimizer's state: remove --resume_from_checkpoint."
        )


def _problems(args: "AddaxConfig", given: Collection[str]) -> Iterator[str]:
    """Yield values out of range; if there are none, flags that contradict or have no effect."""
    out_of_range = list(_out_of_range(args))
    yield from out_of_range or _contradictions(args, given)


def _out_of_range(args: "AddaxConfig") -> Iterator[str]:
    for known in HYPERPARAMETERS:
        value = getattr(args, known.flag)
        if value is not None:
            yield from known.problems(value, f"--{known.flag}")
    if args.device_memory is not None and args.length_threshold != "auto":
        yield "--device_memory has no effect without --length_threshold auto; remove it."
    elif args.device_memory is not None and not args.device_memory > 0:
        yield f"--device_memory {args.device_memory:g}: it must be above 0."


def _contradictions(args: "AddaxConfig", given: Collection[str]) -> Iterator[str]:
    """Yield arguments that contradict each other, or have no effect beside each other."""
    method = args.method
    alpha = _FIXED_ALPHA.get(method, args.alpha)
    if args.alpha not in (None, alpha):
        yield (
            f"--alpha {args.alpha:g} contradicts --method {method}, whose alpha is {alpha:g}: "
            "remove --alpha, or use --method addax or addax-wa."
        )
    for name in _IGNORED[method]:
        if getattr(args, name) is not None:
            yield f"--{name} has no effect with --method {method}; remove it."
    own_rows = args.per_device_zo_batch_size not in (None, args.per_device_train_batch_size)
    if method == "mezo" and own_rows and "per_device_train_batch_size" in given:
        yield (
            "--per_device_train_batch_size has no effect with --method mezo beside "
            "--per_device_zo_batch_size; remove it."
        )
    if args.deepspeed and args.save_only_model and args.load_best_model_at_end:
        yield (
            "--save_only_model with --load_best_model_at_end: Trainer refuses both together under "
            "DeepSpeed; remove one."
        )
    if args.save_strategy == "best" and args.eval_strategy == "no":
        yield "--save_strategy best needs --eval_strategy: without evaluations none is the best."
    if method in BASELINES and args.fp16:
        yield f"--method {method} trains in bf16 or fp32: remove --fp16."
    if args.find_learning_rate:
        yield from _without_a_rate(args, given)
    if method in BASELINES and not args.deepspeed:
        yield f"--method {method} is DeepSpeed's: give --deepspeed zero3."


def _without_a_rate(args: "AddaxConfig", given: Collection[str]) -> Iterator[str]:
    if args.method in BASELINES:
        yield f"--find_learning_rate is for Addax's methods, not for --method {args.method}."
    for name in ("learning_rate", "resume_from_checkpoint", "push_to_hub"):
        if name in given and getattr(args, name) not in (None, False):
            yield f"--{name} has no effect with --find_learning_rate; remove one of them."


def _warn(args: "AddaxConfig", max_grad_norm: float, steps: int) -> None:
    """Log what has no effect here, and what costs more than it seems to."""
    if args.rounding is not None and weights_dtype(args) is torch.float32:
        logger.warning("--rounding has no effect on fp32 weights, whose updates are not rounded.")
    if max_grad_norm == 0.0 or args.method in BASELINES:
        return
    if args.method == "mezo":
        logger.warning("--max_grad_norm has no effect with --method mezo: there is no gradient.")
    elif runs_twice_to_clip(max_grad_norm, steps):
        logger.warning(
            "--max_grad_norm %g: the norm is known only after a backward, so each step runs its "
            "first-order forward and backward twice; 0 does not clip.",
            max_grad_norm,
        )


def _length_threshold(args: "AddaxConfig") -> int | Literal["median", "auto"] | None:
    value = args.length_threshold
    if args.method != "addax" and (args.method != "ip-sgd" or value is None):
        return None
    if value is None or value == "median":
        return "median"
    if value == "auto" and args.method == "ip-sgd":
        raise UserError(
            "--length_threshold auto is for --method addax. With ip-sgd rows longer than L_T are "
            "left out: give L_T as a number of tokens, or median."
        )
    if value == "auto":
        if args.max_steps <= 0:
            raise UserError(
                "--length_threshold auto needs --max_steps: L_T decides how many steps an epoch "
                "has, and is final only after the first passes."
            )
        return "auto"
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(
        f"--length_threshold {value}: it must be a number of tokens above 0, median or auto."
    )
