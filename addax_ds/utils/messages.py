"""Texts of error messages."""

import difflib
from collections.abc import Iterable, Sequence

from addax_ds.utils.errors import UserError


def did_you_mean(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ` Did you mean 'x'?` for the nearest candidate, or an empty string.

    Args:
        name: what was given.
        candidates: what could have been meant.
        cutoff: how like it a candidate has to be, 0 to 1.
    """
    # The search takes quadratic time, and no candidate is this long.
    matches = difflib.get_close_matches(name[:100], list(candidates), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def shown(text: str, limit: int = 60) -> str:
    """Return a user's text for a message: what cannot be printed escaped, cut to `limit`."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def on_one_line(text: str) -> str:
    """Return what an exception of another program says, for a message."""
    return shown(" ".join(text.split()), 300)


def raise_problems(title: str, problems: Sequence[str]) -> None:
    """Raise one `UserError` that lists every problem; do nothing when there is none."""
    if problems:
        raise UserError("\n".join([title, *(f"  - {problem}" for problem in problems)]))
