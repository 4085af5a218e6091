"""The largest L_T for which the first-order pass fits into a GPU.

Addax trains sequences of at most L_T tokens with a backward, which keeps activations, and longer
ones without. The larger L_T is, the more of the data gets an exact gradient (Addax, arXiv
2410.06441, section 3.2), so the largest one that fits is the one to take.
"""

import bisect
from collections.abc import Sequence
from dataclasses import replace

from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.trace import Batch


def largest_threshold(
    spec: StepSpec, lengths: Sequence[int], budget: int, targets: int | None = None
) -> int | None:
    """Return the largest L_T for which the whole step fits, and which leaves longer examples.

    Args:
        spec: the step; the rows of both batches are read, their lengths are not.
        lengths: tokens of each example.
        budget: bytes that a rank has for tensors.
        targets: predicted positions of a sequence at most; None for all.

    Returns:
        None if not even the shortest examples fit, or the zeroth-order pass does not.
    """
    assert spec.first_order is not None
    *shorter, longest = sorted(set(lengths))
    if spec.zeroth_order is not None:
        zeroth = Batch.of(spec.zeroth_order.rows, longest, targets)
        if step_memory(replace(spec, zeroth_order=zeroth, first_order=None)).total > budget:
            return None
    rows = spec.first_order.rows
    without_zeroth = replace(spec, zeroth_order=None)

    def is_too_long(length: int) -> bool:
        first = Batch.of(rows, length, targets)
        return step_memory(replace(without_zeroth, first_order=first)).total > budget

    fitting = bisect.bisect_left(shorter, True, key=is_too_long)
    return shorter[fitting - 1] if fitting else None
