"""The largest L_T for which the first-order pass fits into a GPU.

Addax trains sequences of at most L_T tokens with a backward, which keeps activations, and longer
ones without. The larger L_T is, the more of the data gets an exact gradient (Addax, arXiv
2410.06441, section 3.2), so the largest one that fits is the one to take.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from addax_ds.planner.memory import Inputs, step_memory
from addax_ds.planner.trace import Batch


@dataclass(frozen=True)
class Threshold:
    """A division of the data that fits.

    Attributes:
        length: L_T in tokens: a length that occurs in the data.
        zeroth_order: number of examples longer than L_T.
        first_order: number of the others.
        rows: rows of a first-order batch on each rank.
        total: bytes that a rank needs for the whole step.
    """

    length: int
    zeroth_order: int
    first_order: int
    rows: int
    total: int


def largest_threshold(
    inputs: Inputs,
    lengths: Sequence[int],
    budget: int,
    targets: int | None = None,
    leave_longer: bool = True,
) -> Threshold | None:
    """Return the largest L_T for which the whole step fits.

    Args:
        inputs: the run; the rows of both batches are read, their lengths are not.
        lengths: tokens of each example.
        budget: bytes that a rank has for tensors.
        targets: predicted positions of a sequence at most; None for all.
        leave_longer: whether some examples have to be longer than L_T, as Addax needs some for its
            zeroth-order batch.

    Returns:
        None if not even the shortest examples fit, or the zeroth-order pass does not.
    """
    assert inputs.first_order is not None
    ordered = sorted(lengths)
    candidates = sorted(set(lengths))
    if leave_longer:
        candidates = candidates[:-1]
    if inputs.zeroth_order is not None:
        longest = batch(inputs.zeroth_order.rows, ordered[-1], targets)
        if step_memory(replace(inputs, zeroth_order=longest, first_order=None)).total > budget:
            return None
    rows = inputs.first_order.rows
    without_zeroth = replace(inputs, zeroth_order=None)

    def total(length: int) -> int:
        return step_memory(replace(without_zeroth, first_order=batch(rows, length, targets))).total

    number = _last(candidates, lambda length: total(length) <= budget)
    if number is None:
        return None
    length = candidates[number]
    shorter = sum(1 for own in ordered if own <= length)
    whole = replace(inputs, first_order=batch(rows, length, targets))
    if inputs.zeroth_order is not None:
        whole = replace(whole, zeroth_order=longest)
    return Threshold(length, len(ordered) - shorter, shorter, rows, step_memory(whole).total)


def largest_batch(
    inputs: Inputs, length: int, budget: int, limit: int, targets: int | None = None
) -> int:
    """Return the most rows, ``limit`` at most, of a first-order batch that fits; 0 if none does.

    With the rows of all ranks and micro-batches together it is K1.

    Args:
        inputs: the run; the batch itself is not read.
        length: tokens of each row, L_T.
        budget: bytes that a rank has for tensors.
        limit: number of rows not to exceed.
        targets: predicted positions of a sequence at most; None for all.
    """
    alone = replace(inputs, zeroth_order=None)

    def fits(rows: int) -> bool:
        one = batch(rows, length, targets)
        return step_memory(replace(alone, first_order=one)).total <= budget

    found = _last(range(1, limit + 1), fits)
    return 0 if found is None else found + 1


def batch(rows: int, length: int, targets: int | None) -> Batch:
    """Return a batch whose sequences have at most ``targets`` targets, or all that there can be."""
    most = max(length - 1, 1)
    return Batch(rows, length, most if targets is None else min(targets, most))


def _last(candidates: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the position of the last candidate that fits; the ones before it do, too."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle + 1
        else:
            high = middle
    return low - 1 if low else None
