"""Hyperparameters of the optimizer: for each one its default, its range and where it may be given.

A new one is a field of the three classes below, and the code that uses it. `Addax`, the DeepSpeed
JSON, the command line, `addax_ds.AddaxConfig`, checkpoints and the comparison of ranks go through
`HYPERPARAMETERS`.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

from addax_ds.optim.update import ROUNDINGS, Rounding
from addax_ds.utils.command_line import flag
from addax_ds.utils.messages import raise_problems, shown

OnResume = Literal["fixed", "announced", "free"]


@dataclass(frozen=True)
class Hyperparameter:
    """Facts about one hyperparameter.

    Attributes:
        name: keyword argument of `Addax`.
        default: used where nobody gives a value; `dataclasses.MISSING` if somebody has to.
        accepts: whether a value lies in the range.
        expected: the range, in words that follow "it must be".
        on_resume: a "fixed" value must be that of the checkpoint, a change of an "announced" one is
            logged, and a "free" one follows a schedule.
        flag: argument of the command line and of `addax_ds.AddaxConfig`.
        json_key: dotted key of the DeepSpeed JSON.
        by_group: whether parameter groups may differ in it, as those of any optimizer.
        zeroth_order: whether it has an effect on the zeroth-order part alone.
    """

    name: str
    default: Any
    accepts: Callable[[Any], bool]
    expected: str
    on_resume: OnResume
    flag: str
    json_key: str
    by_group: bool
    zeroth_order: bool

    def problems(self, value: Any, called: str) -> Iterator[str]:
        """Yield a sentence if a value lies outside the range."""
        if not self.accepts(value):
            yield f"{called} = {shown(repr(value))}: it must be {self.expected}."


def _number(value: Any, least: float = -math.inf, most: float = sys.float_info.max) -> bool:
    """Return whether a value is a number in a range; NaN, infinities and booleans are not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    # NumPy would round the bounds to its own type, and those of float32 reach infinity.
    number: Any = value if isinstance(value, Integral) else float(value)
    return least <= number <= most


def _known(
    default: Any = MISSING,
    *,
    accepts: Callable[[Any], bool],
    expected: str,
    on_resume: OnResume = "announced",
    flag: str = "",
    json_key: str = "",
    by_group: bool = False,
    zeroth_order: bool = False,
) -> Any:
    """Declare a field with the facts of `Hyperparameter`; flag and key default to its name."""
    facts = {"accepts": accepts, "expected": expected, "on_resume": on_resume, "flag": flag}
    facts |= {"json_key": json_key, "by_group": by_group, "zeroth_order": zeroth_order}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class Hyperparameters:
    """Values of all hyperparameters, each in its range.

    Raises:
        UserError: lists every value outside its range.
    """

    lr: float = _known(
        accepts=lambda value: _number(value, 0),
        expected="a number of at least 0",
        on_resume="free",
        flag="learning_rate",
        by_group=True,
    )
    alpha: float = _known(
        1e-3,
        accepts=lambda value: _number(value, 0, 1),
        expected="a number from 0 to 1",
    )
    zo_eps: float = _known(
        1e-3,
        accepts=lambda value: _number(value) and value > 0,
        expected="a number above 0",
        zeroth_order=True,
    )
    weight_decay: float = _known(
        0.0,
        accepts=lambda value: _number(value, 0),
        expected="a number of at least 0",
        by_group=True,
    )
    seed: int = _known(
        0,
        accepts=lambda value: isinstance(value, Integral) and _number(value, 0, 2**64 - 1),
        expected="an integer from 0 to 2**64 - 1",
        on_resume="fixed",
    )
    rounding: Rounding = _known(  # noqa: RUF009 - a field, as the others are
        "stochastic",
        accepts=lambda value: value in ROUNDINGS,
        expected="'stochastic' or 'nearest'",
    )
    max_grad_norm: float = _known(
        0.0,
        accepts=lambda value: _number(value, 0),
        expected="a number of at least 0",
        json_key="gradient_clipping",
    )
    zo_directions: int = _known(
        1,
        # q directions make 2 q passes; a number above 1024 is a mistake.
        accepts=lambda value: isinstance(value, Integral) and _number(value, 1, 1024),
        expected="an integer from 1 to 1024",
        zeroth_order=True,
    )

    def __post_init__(self) -> None:
        raise_problems("Addax cannot have these values:", list(problems(asdict(self))))
        for known in HYPERPARAMETERS:
            value = getattr(self, known.name)
            if isinstance(value, Real) and not isinstance(value, int | float):
                # NumPy's numbers: a checkpoint notes values as JSON, which has Python's alone.
                plain = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, known.name, plain)


@dataclass
class HyperparameterFlags:
    """Hyperparameters that have no argument in `transformers.TrainingArguments`.

    `None` means not given: the DeepSpeed JSON or the default decides.
    """

    alpha: float | None = flag(
        None,
        "Weight of the zeroth-order gradient, between 0 and 1 (default 1e-3; mezo is "
        "1, methods without zeroth-order steps are 0).",
    )
    zo_eps: float | None = flag(
        None, "Perturbation scale of the zeroth-order passes (default 1e-3)."
    )
    rounding: Rounding | None = flag(
        None, "Rounding of bf16 and fp16 weight updates (default stochastic)."
    )
    zo_directions: int | None = flag(
        None,
        "Independent directions z of a step, whose two-sided differences are averaged "
        "(default 1). Each costs two forward passes, and no memory.",
    )


class HyperparameterKwargs(TypedDict, total=False):
    """Keyword arguments of `Addax` and `addax_ds.ds_config` beside ``lr``."""

    alpha: float
    zo_eps: float
    weight_decay: float
    seed: int
    rounding: Rounding
    max_grad_norm: float
    zo_directions: int


def _declared(item: Field[Any]) -> Hyperparameter:
    facts = dict(item.metadata)
    facts["flag"] = facts["flag"] or item.name
    facts["json_key"] = facts["json_key"] or f"optimizer.params.{item.name}"
    return Hyperparameter(name=item.name, default=item.default, **facts)


HYPERPARAMETERS: tuple[Hyperparameter, ...] = tuple(map(_declared, fields(Hyperparameters)))
BY_NAME: dict[str, Hyperparameter] = {known.name: known for known in HYPERPARAMETERS}
IN_JSON_PARAMS: tuple[Hyperparameter, ...] = tuple(
    known for known in HYPERPARAMETERS if known.json_key == f"optimizer.params.{known.name}"
)
"""Those that DeepSpeed hands to `Addax` from the ``optimizer`` block of its JSON."""


def problems(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a sentence for each value outside its range; other names than ours are left alone.

    Args:
        values: by the names of hyperparameters.
        prefix: of the names in the sentences.
    """
    for known in HYPERPARAMETERS:
        if known.name in values:
            yield from known.problems(values[known.name], f"{prefix}{known.name}")


def runs_twice_to_clip(max_grad_norm: float, micro_batches: int) -> bool:
    """Return whether a step runs its first-order forward and backward twice.

    Weights change while a backward runs, so the norm of its gradient has to be known before. Of
    several micro-batches the sum is kept, and clipped.
    """
    return max_grad_norm > 0.0 and micro_batches == 1
