"""What a setting of Transformers or DeepSpeed does here: it works, is restricted, or has no effect.

`training_arguments` and `deepspeed_keys` are tables of these rules, one for every setting that the
two libraries know, so that a flag is never ignored in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(Enum):
    """What happens to a setting that a user gives."""

    WORKS = "works"
    RESTRICTED = "restricted"
    NO_EFFECT = "no effect"


@dataclass(frozen=True)
class Rule:
    """How one setting is treated.

    Attributes:
        status: what happens to the setting.
        note: for `RESTRICTED` why other values are refused and what to do instead; for `NO_EFFECT`
            why it does nothing; for `WORKS` what a user may want to know.
        allowed: the values that a `RESTRICTED` setting may have. `None` stands for the default of
            the table's owner.
    """

    status: Status
    note: str = ""
    allowed: tuple[Any, ...] | None = None

    def accepts(self, value: Any, default: Any = None) -> bool:
        """Whether a user may give `value`; `default` is used where `allowed` is `None`."""
        if self.status is not Status.RESTRICTED:
            return True
        allowed = (default,) if self.allowed is None else self.allowed
        # To Python true is 1 and false is 0; to whoever wrote 1 step or 0 stages they are not.
        return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def works(note: str = "") -> Rule:
    """The setting does what its owner documents."""
    return Rule(Status.WORKS, note)


def only(*allowed: Any, note: str) -> Rule:
    """Only the values `allowed` are accepted; none at all when it is empty."""
    return Rule(Status.RESTRICTED, note, allowed)


def default_only(note: str) -> Rule:
    """Only the owner's default is accepted."""
    return Rule(Status.RESTRICTED, note, None)


def no_effect(note: str) -> Rule:
    """The setting is accepted with a warning and changes nothing."""
    return Rule(Status.NO_EFFECT, note)


def markdown_table(header: str, rules: Mapping[str, Rule], defaults: Mapping[str, Any]) -> str:
    """Render rules as a Markdown table, in the table's own order.

    Args:
        header: the title of the first column.
        rules: the table.
        defaults: the owner's defaults, for the rules whose `allowed` is `None`.
    """
    lines = [f"| {header} | status | note |", "|---|---|---|"]
    for name, rule in rules.items():
        status = rule.status.value
        if rule.status is Status.RESTRICTED:
            allowed = (defaults.get(name),) if rule.allowed is None else rule.allowed
            shown = ", ".join(f"`{_show(value)}`" for value in allowed)
            status = f"only {shown}" if shown else "refused"
        lines.append(f"| `{name}` | {status} | {rule.note.replace('|', '/')} |")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value) if value != "" else "''"
