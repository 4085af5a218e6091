"""``--length_threshold auto``, first half: the largest L_T for which a step should fit.

`addax_ds.planner` predicts it from the model's configuration, before the model is loaded;
`rehearsal` then runs the worst step, and lowers it where memory runs out all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from addax_ds.config.addax_config import AddaxConfig, global_batches
from addax_ds.data.examples import Example, lengths_of
from addax_ds.distributed.collectives import all_gather_object, raise_on_all_ranks
from addax_ds.distributed.nodes import ranks_of_node
from addax_ds.planner.constants import GB
from addax_ds.planner.memory import Memory, StepSpec, step_memory
from addax_ds.planner.threshold import largest_threshold
from addax_ds.planner.trace import Batch, PlanError
from addax_ds.sharding.layout import Layout
from addax_ds.training.memory import free_memory, spec_of_run
from addax_ds.utils.errors import UserError

FLAG = "--length_threshold auto"


@dataclass(frozen=True)
class AutoThreshold:
    """Result of the planner.

    Attributes:
        length: L_T in tokens.
        lengths: every L_T that leaves each stream a global batch, ascending.
        parts: how many times fewer rows a micro-batch has than was asked for.
        predicted: bytes that a rank needs for a step.
        limit: bytes that tensors may take if that was stated, None if it was detected.
        reason: why L_T is not larger, in words.
    """

    length: int
    lengths: tuple[int, ...]
    parts: int
    predicted: int
    limit: int | None
    reason: str


def plan_threshold(
    config: PreTrainedConfig,
    attention: str | None,
    layout: Layout,
    examples: Sequence[Example],
    args: AddaxConfig,
    fixed: int | None = None,
) -> AutoThreshold:
    """Find the largest L_T whose step should fit on every rank; all ranks have to call it.

    Where not even the shortest sequences fit, micro-batches get fewer rows and become more, so that
    K0 and K1 stay; `addax_ds.config.addax_config.divide_batches` does it.

    Args:
        config: of the model.
        attention: attention kernel, None for the model's own choice.
        layout: of the weights.
        examples: the training data.
        args: of the run.
        fixed: L_T of the checkpoint that the run goes on from: rows alone are to be found.

    Returns:
        The same on all ranks.

    Raises:
        UserError: on all ranks, if no step fits, no L_T leaves each stream a batch, memory cannot
            be detected, or the planner cannot follow the model.
    """
    stated = args.device_memory
    node = ranks_of_node(args)
    with raise_on_all_ranks():
        limit = None if stated is None else int(stated * GB)
        try:
            device, host = free_memory(args.device, len(node), limit)
        except UserError as error:
            raise UserError(f"{FLAG}: {error}: give --device_memory") from error
    budget, host = min(all_gather_object(device)), min(all_gather_object(host))
    plan = None
    with raise_on_all_ranks():
        if args.process_index == 0:
            # Rows of either stream may be the longest ones, which L_T decides.
            both = examples, examples
            try:
                spec = spec_of_run(config, attention, layout, both, args)
            except UserError as error:
                raise UserError(f"{FLAG}: {error}: give a number of tokens") from error
            search = _Search(spec, examples, args, (budget, host), fixed)
            try:
                plan = search.run(limit)
            except PlanError as error:
                raise UserError(f"{FLAG}: {error}, and give that number of tokens") from error
    found = all_gather_object(plan)[0]
    assert found is not None
    return found


class _Search:
    """Looks for the fewest parts of a batch, and then the largest L_T, that fit."""

    def __init__(
        self,
        spec: StepSpec,
        examples: Sequence[Example],
        args: AddaxConfig,
        free: tuple[int, int],
        fixed: int | None,
    ) -> None:
        assert spec.zeroth_order is not None
        assert spec.first_order is not None
        self._k0, self._k1 = global_batches(args)
        self._spec = spec
        self._free, self._free_host = free
        self._fixed = fixed
        self._targets = spec.zeroth_order.targets
        every = np.sort(lengths_of(examples))
        self._every, self._longest = every, int(every[-1])
        self._lengths = dividing_lengths(every, self._k0, self._k1)
        if not self._lengths:
            raise UserError(
                f"{FLAG}: no L_T leaves K0 = {self._k0} longer sequences and K1 = {self._k1} "
                f"others: there are {len(every)}, of {every[0]} to {every[-1]} tokens. Lower "
                "--per_device_train_batch_size or --per_device_zo_batch_size, or use --method "
                "addax-wa"
            )

    def run(self, limit: int | None) -> AutoThreshold:
        """Return what fits.

        Raises:
            UserError: if nothing does.
        """
        assert self._spec.zeroth_order is not None
        assert self._spec.first_order is not None
        first, zeroth = self._spec.first_order.rows, self._spec.zeroth_order.rows
        shortest = self._fixed or self._lengths[0]
        common = math.gcd(first, zeroth)
        for parts in (divisor for divisor in range(1, common + 1) if common % divisor == 0):
            needed = self._memory(shortest, parts)
            budget = self._budget(needed)
            if needed.total <= budget:
                length, reason = self._largest(parts, budget)
                total = self._memory(length, parts).total
                return AutoThreshold(length, tuple(self._lengths), parts, total, limit, reason)
        flags = "--per_device_train_batch_size", "--per_device_zo_batch_size"
        if needed.stage == "zeroth-order":
            left, length = zeroth // parts, self._longest
        else:
            left, length = first // parts, shortest
        advice = "Use more ranks with ZeRO-3 or FSDP2, --activation_checkpointing, or --max_length"
        if left > 1:
            advice = f"Fewer rows need a greatest common divisor of {' and '.join(flags)} above 1"
        raise UserError(
            f"{FLAG}: a step does not fit into the {gigabytes(budget)} of a rank. Its "
            f"{needed.stage} pass over {left} row(s) of up to {length} tokens needs "
            f"{gigabytes(needed.total)}, so {gigabytes(needed.total - budget)} are missing. "
            f"{advice}; launch/plan.py says what fits where"
        )

    def _budget(self, needed: Memory) -> int:
        """Return the bytes that tensors on the device may take.

        Raises:
            UserError: offloaded shards do not fit into host memory.
        """
        if not self._spec.cuda:  # there shards that are offloaded lie beside the others
            return max(self._free - needed.host, 0)
        if needed.host > self._free_host:
            raise UserError(
                f"{FLAG}: the offloaded weights take {gigabytes(needed.host)} of host memory a "
                f"rank, and {gigabytes(self._free_host)} are free: use more nodes, or ZeRO-3's "
                'offload_param with "pin_memory": false, without which torch rounds each weight up '
                "to a power of two"
            )
        return self._free

    def _largest(self, parts: int, budget: int) -> tuple[int, str]:
        """Return L_T and why it is not larger."""
        if self._fixed is not None:
            return self._fixed, "the checkpoint was written with it"
        lengths = [*self._lengths, self._longest]
        found = largest_threshold(self._divided(parts), lengths, budget, self._targets)
        assert found is not None  # the shortest one fits
        place = self._lengths.index(found) + 1
        if place == len(self._lengths):
            reason = f"a larger one leaves fewer than K0 = {self._k0} longer sequences"
            if self._memory(self._longest, parts).total <= budget:
                reason += (
                    f". These, {(self._every > found).sum()} of {len(self._every)}, "
                    "should fit first-order, too: --method ip-sgd takes them so"
                )
            return found, reason
        larger = self._lengths[place]
        total = self._memory(larger, parts).total
        return found, f"{larger} would need {gigabytes(total)}"

    def _memory(self, length: int, parts: int) -> Memory:
        divided = self._divided(parts)
        assert divided.first_order is not None
        first = Batch.of(divided.first_order.rows, length, self._targets)
        return step_memory(replace(divided, first_order=first))

    def _divided(self, parts: int) -> StepSpec:
        zeroth, first = self._spec.zeroth_order, self._spec.first_order
        assert zeroth is not None
        assert first is not None
        return replace(
            self._spec,
            zeroth_order=replace(zeroth, rows=zeroth.rows // parts),
            first_order=replace(first, rows=first.rows // parts),
            accumulation=self._spec.accumulation * parts,
        )


def gigabytes(number: float) -> str:
    """Return a number of bytes in words."""
    return f"{number / GB:.4g} GB"


def dividing_lengths(lengths: Sequence[int] | NDArray[np.int32], k0: int, k1: int) -> list[int]:
    """Return every L_T that leaves K0 longer sequences and K1 others, ascending.

    Args:
        lengths: tokens of each example, ascending.
        k0: global zeroth-order batch.
        k1: global first-order batch.
    """
    ordered = np.asarray(lengths)
    counts = np.flatnonzero(ordered[:-1] < ordered[1:]) + 1  # of those that are first-order
    return ordered[counts[(counts >= k1) & (counts <= len(ordered) - k0)] - 1].tolist()
