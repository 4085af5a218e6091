"""The arguments of Addax itself, and how they are settled against the DeepSpeed JSON."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from addax_ds.config.deepspeed import OPTIMIZER_DEFAULTS, optimizer_problems, pick
from addax_ds.optim.methods import BASELINES, METHODS, Method
from addax_ds.optim.update import Rounding
from addax_ds.utils.dtypes import weights_dtype
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)

# Methods at one end of alpha; those without a zeroth-order part are at 0.
_FIXED_ALPHA: dict[Method, float] = {"mezo": 1.0, "ip-sgd": 0.0, **dict.fromkeys(BASELINES, 0.0)}


@dataclass
class AddaxArguments:
    """How Addax trains. `None` means not given: the DeepSpeed JSON or the default decides."""

    method: Method = field(
        default="addax",
        metadata={
            "help": "addax: long sequences zeroth-order, short ones first-order. addax-wa: both "
            "from all data. mezo: zeroth-order only. ip-sgd: first-order only, in place. sgd, "
            "adamw: for comparison, torch's under ZeRO-3, with fp32 master weights."
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the zeroth-order gradient, between 0 and 1 (default 1e-3; mezo is "
            "1, methods without zeroth-order steps are 0)."
        },
    )
    zo_eps: float | None = field(
        default=None, metadata={"help": "Perturbation scale of the zeroth-order passes (1e-3)."}
    )
    length_threshold: int | str | None = field(
        default=None,
        metadata={
            "help": "L_T in tokens, median, or auto: longer sequences are zeroth-order (default "
            "median). auto is the largest that fits into memory, and needs --max_steps."
        },
    )
    device_memory: float | None = field(
        default=None,
        metadata={
            "help": "GB (1e9 bytes) of a rank that tensors may take, for --length_threshold auto "
            "(default: what is free, on a GPU less 4)."
        },
    )
    per_device_zo_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of a zeroth-order micro-batch (default: --per_device_train_batch_size)."
        },
    )
    rounding: Rounding | None = field(
        default=None,
        metadata={"help": "Rounding of bf16 and fp16 weight updates (default stochastic)."},
    )
    desync_check_steps: int = field(
        default=100,
        metadata={
            "help": "Steps between two comparisons of the ranks' weights and step values, which "
            "read the weights twice; 0 for none."
        },
    )


@dataclass(frozen=True)
class AddaxSettings:
    """The arguments of Addax, settled.

    Attributes:
        method: one of `Method`.
        alpha: α, the weight of the zeroth-order gradient: 1 for mezo, 0 where there is none.
        zo_eps: ε, the perturbation scale.
        length_threshold: L_T in tokens, "median", or "auto" (until a plan has
            found it); `None` where the data is not partitioned.
        rounding: "stochastic" or "nearest".
        seed: seed of z and of stochastic rounding.
        per_device_zo_batch_size: rows of a zeroth-order micro-batch; 0 where there is none.
        gradient_accumulation_steps: micro-batches of a step and rank, in either stream.
        max_grad_norm: norm that the first-order gradient is clipped to; 0 if it is not.
        desync_check_steps: steps between two comparisons of the ranks; 0 for none.
        device_memory: GB of a rank that tensors may take; `None` where it is not given.
    """

    method: Method
    alpha: float
    zo_eps: float
    length_threshold: int | Literal["median", "auto"] | None
    rounding: Rounding
    seed: int
    per_device_zo_batch_size: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 0.0
    desync_check_steps: int = 0
    device_memory: float | None = None


def resolve(
    addax_args: AddaxArguments,
    training_args: TrainingArguments,
    json_params: Mapping[str, Any],
    where: str = "the DeepSpeed config",
) -> AddaxSettings:
    """Settle the arguments of Addax against `optimizer.params` of the DeepSpeed JSON.

    A value in the JSON that is not "auto" wins over a default and must agree with an argument that
    was given.

    Args:
        addax_args: as parsed.
        training_args: `seed`, the type of the weights, `per_device_train_batch_size`,
            `gradient_accumulation_steps` and `max_grad_norm` are read.
        json_params: `optimizer.params` of the JSON, empty without DeepSpeed.
        where: what to call the JSON in messages.

    Raises:
        UserError: a value out of range, a flag without effect for the method, or a contradiction,
            which names both places and both values.
    """
    settings = settle_arguments(addax_args, training_args, json_params, where)
    if addax_args.rounding is not None and weights_dtype(training_args) is torch.float32:
        logger.warning("--rounding has no effect on fp32 weights, whose updates are not rounded.")
    if settings.method == "mezo" and training_args.max_grad_norm > 0.0:
        logger.warning("--max_grad_norm has no effect with --method mezo: there is no gradient.")
    in_place = settings.method not in BASELINES
    if in_place and settings.max_grad_norm > 0.0 and settings.gradient_accumulation_steps == 1:
        logger.warning(
            "--max_grad_norm %g: the norm is known only after a backward, so each step runs its "
            "first-order forward and backward twice; 0 does not clip.",
            settings.max_grad_norm,
        )
    return settings


def check_can_resume(method: Method) -> None:
    """Raise `UserError` for a method whose checkpoints hold the weights alone."""
    if method in BASELINES:
        raise UserError(
            f"--method {method} cannot resume, its checkpoints hold the weights without the "
            "optimizer's state: remove --resume_from_checkpoint."
        )


def settle_arguments(
    args: AddaxArguments, training: Any, json_params: Mapping[str, Any], where: str
) -> AddaxSettings:
    """`resolve` without its warnings, on anything that has the training arguments it reads."""
    _check_addax_arguments(args)
    if args.method in BASELINES and training.fp16:
        raise UserError(f"--method {args.method} trains in bf16 or fp32: remove --fp16.")
    _check_step(training)
    raise_problems(f"{where}:", list(optimizer_problems(json_params, "optimizer.params.")))
    fixed_alpha = _FIXED_ALPHA.get(args.method)

    def settle(name: str, given: Any, default: Any, argument: str = "") -> Any:
        names = (argument or f"--{name}", f"optimizer.params.{name}")
        return pick(json_params.get(name), given, default, names, where)

    if fixed_alpha is None:
        alpha = settle("alpha", args.alpha, OPTIMIZER_DEFAULTS["alpha"])
        if not 0 < alpha < 1:
            instead = "mezo" if alpha == 1 else "ip-sgd"
            raise UserError(
                f"--method {args.method} needs an alpha between 0 and 1, and it is {alpha:g}: "
                f"that is --method {instead}."
            )
    else:
        alpha = settle("alpha", fixed_alpha, None, f"alpha of --method {args.method}")
    seed = settle("seed", training.seed, None)
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: Trainer needs a seed from 0 to 2**32 - 1.")
    zo_batch_size = args.per_device_zo_batch_size or training.per_device_train_batch_size
    threshold = _length_threshold(args.length_threshold) if args.method == "addax" else None
    if threshold == "auto" and training.max_steps <= 0:
        raise UserError(
            "--length_threshold auto needs --max_steps: L_T decides how many steps an epoch has, "
            "and is final only after the first passes."
        )
    return AddaxSettings(
        method=args.method,
        alpha=float(alpha),
        zo_eps=float(settle("zo_eps", args.zo_eps, OPTIMIZER_DEFAULTS["zo_eps"])),
        length_threshold=threshold,
        rounding=settle("rounding", args.rounding, OPTIMIZER_DEFAULTS["rounding"]),
        seed=seed,
        per_device_zo_batch_size=zo_batch_size if alpha else 0,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_grad_norm=0.0 if args.method == "mezo" else float(training.max_grad_norm),
        desync_check_steps=args.desync_check_steps,
        device_memory=args.device_memory,
    )


def _check_step(training: Any) -> None:
    """Raise `UserError` for values of the training arguments that no step can have."""
    problems = []
    if training.gradient_accumulation_steps < 1:
        problems.append(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps}: it must be at "
            "least 1."
        )
    if not 0 <= training.max_grad_norm < math.inf:
        problems.append(f"--max_grad_norm {training.max_grad_norm}: it must be at least 0.")
    raise_problems("These training arguments cannot be used:", problems)


def _check_addax_arguments(args: AddaxArguments) -> None:
    """Raise `UserError` for values out of range and for flags that the method ignores."""
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: it must be one of {', '.join(METHODS)}.")
    problems = list(optimizer_problems(vars(args), "--"))
    if args.per_device_zo_batch_size is not None and args.per_device_zo_batch_size < 1:
        problems.append("--per_device_zo_batch_size must be at least 1.")
    if args.desync_check_steps < 0:
        problems.append("--desync_check_steps must be at least 0.")
    if args.device_memory is not None and args.length_threshold != "auto":
        problems.append("--device_memory has no effect without --length_threshold auto; remove it.")
    elif args.device_memory is not None and not args.device_memory > 0:
        problems.append(f"--device_memory {args.device_memory:g}: it must be above 0.")
    fixed_alpha = _FIXED_ALPHA.get(args.method, args.alpha)
    if args.alpha not in (None, fixed_alpha):
        problems.append(
            f"--alpha {args.alpha:g} contradicts --method {args.method}, whose alpha is "
            f"{fixed_alpha:g}: remove --alpha, or use --method addax or addax-wa."
        )
    ignored = {"addax": (), "addax-wa": ("length_threshold",), "mezo": ("length_threshold",)}.get(
        args.method, ("length_threshold", "zo_eps", "per_device_zo_batch_size")
    )
    if args.method in BASELINES:
        ignored = (*ignored, "rounding")
    problems += [
        f"--{name} has no effect with --method {args.method}; remove it."
        for name in ignored
        if getattr(args, name) is not None
    ]
    raise_problems("These arguments of Addax cannot be used:", problems)


def _length_threshold(value: int | str | None) -> int | Literal["median", "auto"]:
    if value is None or value == "median":
        return "median"
    if value == "auto":
        return "auto"
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise UserError(
        f"--length_threshold {value}: it must be a number of tokens above 0, median or auto."
    )
