"""``--length_threshold auto``, second half: the worst step is run, and L_T lowered till it fits.

A rehearsal (`Addax.rehearse`) changes nothing that a step reads, so one that runs out of memory can
be given up, as long as all ranks give it up at the same point.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from addax_ds.data.examples import NO_LOSS, Example, lengths_of, target_counts_of
from addax_ds.data.train_rows import pad
from addax_ds.distributed.collectives import collectives_begun, side_group
from addax_ds.training.length_threshold import FLAG, AutoThreshold, gigabytes
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import shown

logger = logging.getLogger(__name__)

WAIT_SECONDS = 120.0
"""Collective timeout during a rehearsal, in seconds."""

ROUNDS = 2
"""The first round records DeepSpeed's order of modules. The second prefetches along it, and starts
from a used allocator."""

_LOWER = 0.9
"""An L_T that does not fit is followed by one at most so many times as large."""


def rehearse_threshold(
    plan: AutoThreshold,
    rehearse: Callable[[int], None],
    device: torch.device,
    usual_wait: float,
) -> int:
    """Rehearse at the planned L_T and, while memory does not suffice, at lower ones.

    Every rank has to call it, and all return the same.

    Args:
        plan: says where to begin, and which L_T there are.
        rehearse: runs the worst step of an L_T.
        device: where it runs.
        usual_wait: seconds that a collective may wait for other ranks outside of rehearsals.

    Raises:
        UserError: on all ranks, if nothing fits, or if one rank has run out of memory where another
            one has not, so that the step cannot be given up together.
    """
    length = plan.length
    logger.info("Rehearsing the longest batches with L_T = %d", length)
    with side_group(WAIT_SECONDS, usual_wait) as agree:
        while True:
            outcome = _rehearse(partial(rehearse, length), plan.limit, device)
            outcomes = agree(outcome)
            lower = [other for other in plan.lengths if other <= _LOWER * length]
            _check_together(outcomes, length, lower)
            if outcome.error is not None:
                raise outcome.error
            failed = next((each.failed for each in outcomes if each.failed), None)
            if failed is not None:
                raise UserError(
                    f"stopped, as another rank had an error in the rehearsal of a step: {failed}"
                )
            short = next((each.short for each in outcomes if each.short), None)
            if short is None:
                break
            if not lower:
                raise UserError(
                    f"{FLAG}: the rehearsal of a step did not fit into memory ({short}), with "
                    f"L_T = {length}, below which there are too few sequences. Use fewer rows and "
                    "more --gradient_accumulation_steps, --activation_checkpointing, or more ranks"
                )
            logger.info("L_T = %d does not fit (%s): rehearsing %d", length, short, lower[-1])
            length = lower[-1]
    _report(plan, length, max(each.peak for each in outcomes))
    return length


@dataclass
class _Outcome:
    """Outcome of a rehearsal on one rank.

    Attributes:
        short: why memory did not suffice, in words; empty if it did.
        peak: most bytes of tensors, 0 on a CPU.
        collectives: how many were begun, by group.
        failed: another reason for which it has ended, in words.
        error: the same as an exception, which stays on its rank.
    """

    short: str = ""
    peak: int = 0
    collectives: list[int] = field(default_factory=list)
    failed: str = ""
    error: Exception | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "error": None}


def _rehearse(rehearse: Callable[[], None], limit: int | None, device: torch.device) -> _Outcome:
    """Run the rounds of one rehearsal, and free what they leave."""
    outcome = _Outcome()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(ROUNDS):
            rehearse()
        if on_gpu:
            torch.cuda.synchronize(device)
    except Exception as error:
        if is_out_of_memory(error):
            outcome.short = shown(" ".join(str(error).split()), 160) or type(error).__name__
        else:
            outcome.error, outcome.failed = error, f"{type(error).__name__}: {error}"
    outcome.collectives = collectives_begun()
    gc.collect()  # what frames of the failed pass hold goes in cycles
    if on_gpu:
        outcome.peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    if limit is not None and outcome.peak > limit and not outcome.short:
        outcome.short = f"{gigabytes(outcome.peak)} at the peak, of {gigabytes(limit)}"
    return outcome


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception is an out-of-memory error, of a GPU or of torch on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _check_together(outcomes: list[_Outcome], length: int, lower: list[int]) -> None:
    """Check that all ranks are at the same point if memory has run out on one.

    Raises:
        UserError: on all ranks.
    """
    short = [rank for rank, each in enumerate(outcomes) if each.short]
    begun = outcomes[0].collectives
    apart = any(each.failed or each.collectives != begun for each in outcomes)
    if short and apart:
        others = f"{lower[-1]}" if lower else "a smaller number"
        raise UserError(
            f"{FLAG}: in the rehearsal at L_T = {length} memory ran out on rank(s) "
            f"{', '.join(map(str, short))} ({outcomes[short[0]].short}) and not, or elsewhere, on "
            "the others, so that they cannot give up the step together: start again with "
            f"--length_threshold {others}, or a smaller --device_memory"
        )


def _report(plan: AutoThreshold, length: int, peak: int) -> None:
    stated = "" if plan.limit is None else f" of {gigabytes(plan.limit)}"
    reason = plan.reason if length == plan.length else f"{plan.length} was planned"
    logger.info(
        "L_T = %d is the largest that fits: %s. By the plan a rank needs %s%s with L_T = %d; "
        "the longest batches, rehearsed, %s.",
        length,
        reason,
        gigabytes(plan.predicted),
        stated,
        plan.length,
        f"needed {gigabytes(peak)}" if peak else "fit",
    )


def longest_batch(
    examples: Sequence[Example], indices: NDArray[np.int32], rows: int, pad_token_id: int
) -> dict[str, Tensor]:
    """Return the worst-case batch of a stream, the same on every rank.

    It has the longest rows. Their targets lie at as many different positions as possible, since
    logits are computed at every position where any row has one.

    Args:
        examples: all examples.
        indices: those of the stream.
        rows: of the batch.
        pad_token_id: what to pad with.
    """
    chosen = indices[np.argsort(-lengths_of(examples)[indices], kind="stable")[:rows]].tolist()
    batch = pad([examples[index] for index in chosen], pad_token_id)
    targets = int(target_counts_of(examples)[indices].max())
    labels = torch.full_like(batch["labels"], NO_LOSS)
    length = labels.shape[1]
    for row in range(len(chosen)):
        end = length - row * targets % max(length - 1, 1)
        own = slice(max(end - targets, 1), end)
        labels[row, own] = batch["input_ids"][row, own]
    return {**batch, "labels": labels}
