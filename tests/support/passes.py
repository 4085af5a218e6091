"""The zeroth-order part of a step by itself."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from addax_ds.optim.addax import unwrap


def measured_g0(optimizer: Any, closure: Callable[[], Tensor]) -> float:
    """Begin a step whose first-order loss the caller computes, and return its g0.

    Args:
        optimizer: Addax, or what DeepSpeed has made of it.
        closure: computes the zeroth-order loss.
    """
    optimizer.measure(closure, None)
    begun = unwrap(optimizer)._running
    return begun.g0 if begun else 0.0
