"""Support of Transformers' and DeepSpeed's settings: works, restricted, or without effect.

`training_arguments` and `deepspeed_keys` hold these rules, so that no flag is ignored in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(Enum):
    """Treatment of a setting that a user gives."""

    WORKS = "works"
    RESTRICTED = "restricted"
    NO_EFFECT = "no effect"


@dataclass(frozen=True)
class Rule:
    """Treatment of one setting.

    Attributes:
        status: what happens to the setting.
        note: why other values are refused, or why the setting has no effect, and what to do.
        allowed: the values that a `RESTRICTED` setting may have; with none it is refused.
    """

    status: Status
    note: str = ""
    allowed: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether a user may give `value`."""
        if self.status is not Status.RESTRICTED:
            return True
        # To Python true is 1 and false is 0; to whoever wrote 1 step or 0 stages they are not.
        return any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in self.allowed
        )


def works(names: str) -> dict[str, Rule]:
    """Settings that do what their owner documents; names are separated by spaces."""
    return dict.fromkeys(names.split(), Rule(Status.WORKS))


def only(allowed: tuple[Any, ...], notes: Mapping[str, str]) -> dict[str, Rule]:
    """Settings that may have the values `allowed` alone; `notes` maps names to the reason."""
    return _spread(notes, Status.RESTRICTED, allowed)


def no_effect(notes: Mapping[str, str]) -> dict[str, Rule]:
    """Settings that are accepted with a warning; `notes` maps names to why they change nothing."""
    return _spread(notes, Status.NO_EFFECT)


def nested(block: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the rules of the entries of a block under their dotted paths."""
    return {f"{block}.{name}": rule for name, rule in rules.items()}


def _spread(
    notes: Mapping[str, str], status: Status, allowed: tuple[Any, ...] = ()
) -> dict[str, Rule]:
    """Return a rule for each name in the keys, which hold several, separated by spaces."""
    return {
        name: Rule(status, note, allowed) for names, note in notes.items() for name in names.split()
    }
