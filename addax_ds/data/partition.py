"""Assignment of sequences to the zeroth- and the first-order stream, by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from addax_ds.optim.methods import BASELINES, METHODS, Method
from addax_ds.utils.errors import UserError

Lengths = Sequence[int] | NDArray[np.integer]
"""Tokens of each example."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Examples of each stream.

    Attributes:
        zeroth_order: D0, int32 indices, ascending; empty if there is no zeroth-order stream.
        first_order: D1, int32 indices, ascending; empty if there is no first-order stream.
        threshold: L_T in tokens; None for methods that do not divide by length.
        left_out: int32 indices, ascending, of what is in no stream.
    """

    zeroth_order: NDArray[np.int32]
    first_order: NDArray[np.int32]
    threshold: int | None
    left_out: NDArray[np.int32] = field(default_factory=lambda: np.arange(0, dtype=np.int32))

    def describe(self, lengths: Lengths) -> str:
        """Return the partition in words: size, longest sequence and L_T of each side, a line each.

        A third line says what is left out, if anything is.
        """
        above, below = "", ""
        if self.threshold is not None:
            above, below = f", longer than L_T = {self.threshold}", f", at most {self.threshold}"
        if len(self.left_out):
            above, left = "", [f"Left out{above}: {_side(self.left_out, lengths)}"]
        else:
            left = []
        return "\n".join(
            (
                f"D0 (zeroth-order{above}): {_side(self.zeroth_order, lengths)}",
                f"D1 (first-order{below}): {_side(self.first_order, lengths)}",
                *left,
            )
        )


def partition(
    lengths: Lengths, method: Method, threshold: int | Literal["median", "auto"] | None
) -> Partition:
    """Divide examples between the streams.

    Args:
        lengths: Tokens of each example.
        method: "addax": D0 = longer than L_T, D1 = the rest. "addax-wa" (without assignment):
            both are the whole set. "mezo": D0 is the whole set, D1 empty. The others: the reverse,
            but that "ip-sgd" with a threshold leaves out what "addax" has in D0.
        threshold: L_T in tokens for "addax" and, if it is to leave longer rows out, "ip-sgd"; or
            "median": the lower median, which never leaves D1 empty, and D0 only if no length
            exceeds it. None for other methods. "auto" is not for this function: it depends on more
            than lengths.

    Raises:
        UserError: No examples, a threshold that is missing or has no effect, or one that leaves a
            side empty.
    """
    if not len(lengths):
        raise UserError("there are no examples to train on")
    if method == "addax" or (method == "ip-sgd" and threshold is not None):
        if threshold is None:
            raise UserError("--method addax needs --length_threshold: a number of tokens or median")
        if threshold == "auto":
            raise UserError(
                "--length_threshold auto is found by plan_threshold, as the command does: give "
                "AddaxTrainer its result as planned and in the settings"
            )
        if threshold == "median":
            middle = (len(lengths) - 1) // 2
            threshold = int(np.partition(np.asarray(lengths), middle)[middle])
        return _by_length(lengths, threshold, method)
    if threshold is not None:
        raise UserError(f"--length_threshold has no effect with --method {method}; leave it out")
    whole, none = np.arange(len(lengths), dtype=np.int32), np.arange(0, dtype=np.int32)
    if method == "addax-wa":
        return Partition(whole, whole, None)
    if method == "mezo":
        return Partition(whole, none, None)
    if method in ("ip-sgd", *BASELINES):
        return Partition(none, whole, None)
    raise UserError(f"--method {method} is unknown; choose from {', '.join(METHODS)}")


def _by_length(lengths: Lengths, threshold: int, method: Method) -> Partition:
    longer = np.asarray(lengths) > threshold
    shortest, longest = int(np.min(lengths)), int(np.max(lengths))
    advice = (
        "all sequences are equally long, so nothing can be divided:"
        if shortest == longest
        else f"give a --length_threshold from {shortest} to {longest - 1}, or"
    )
    if longer.all():
        raise UserError(
            f"no sequence has at most L_T = {threshold} tokens (they have {shortest} to {longest}),"
            f" so the first-order stream D1 is empty; {advice} use --method addax-wa or mezo"
        )
    if not longer.any() and method == "ip-sgd":
        raise UserError(
            f"no sequence is longer than L_T = {threshold} tokens (they have {shortest} to "
            f"{longest}), so none would be left out: leave out --length_threshold"
        )
    if not longer.any():
        raise UserError(
            f"no sequence is longer than L_T = {threshold} tokens (they have {shortest} to "
            f"{longest}), so the zeroth-order stream D0 is empty; {advice} use --method addax-wa "
            "or ip-sgd"
        )
    first, zeroth = (np.flatnonzero(side).astype(np.int32) for side in (~longer, longer))
    if method == "ip-sgd":
        return Partition(zeroth[:0], first, threshold, left_out=zeroth)
    return Partition(zeroth, first, threshold)


def _side(indices: NDArray[np.int32], lengths: Lengths) -> str:
    if not len(indices):
        return "none"
    longest = int(np.asarray(lengths)[indices].max())
    plural = "s" if len(indices) > 1 else ""
    return f"{len(indices)} sequence{plural}, the longest of {longest} tokens"
