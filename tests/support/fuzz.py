"""How much is fuzzed, and with what. A long run, with other examples each time:

ADDAX_FUZZ_EXAMPLES=20000 pytest tests/*/test_*_fuzzed.py --timeout=0
"""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from addax_ds.utils.errors import UserError

_LONG = os.environ.get("ADDAX_FUZZ_EXAMPLES")


def examples(count: int) -> int:
    """Number of examples of a test that draws its own."""
    return int(_LONG or count)


def fuzzed(examples: int) -> settings:
    """The same examples in every run of the suite; others, and so many, in a long run."""
    return settings(
        max_examples=int(_LONG or examples),
        derandomize=_LONG is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What comes of a call, or None and what the refusal says, which is never long."""
    try:
        return call(), ""
    except UserError as error:
        message = str(error)
    assert len(message) < 5000
    return None, message


# Half surrogate pairs too, which JSON can spell.
TEXT = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cs"]),
        st.sampled_from('\0\t\r\n\v\x1b\x85\u2028\u2029\ufeff"\\{}[],:'),
    ),
    max_size=12,
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**400), 2**63, 2**64]),
    st.floats(),
    st.sampled_from(["", "auto", "true", "none", "cpu", "fp32", "x"]),
    TEXT,
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["enabled", "type", "params", "device"]) | TEXT, inner)
    ),
    max_leaves=6,
)
"""Anything that `json.loads` can return, NaN and infinities among it."""
FINITE_JSON = JSON.map(lambda value: _finite(value))


def _finite(value: object) -> object:
    """Replace what strict JSON has not, and numbers of more digits than Python reads."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return 0.5
    return value
