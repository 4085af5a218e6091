"""The examples of a step, and the tensors of a rank's share of them.

Everything here is a pure function of the global step number: `StepSchedule` says which examples
form the two global batches of a step, `StepBatches` turns a rank's share into batches, and the
loader only counts steps. Resuming therefore needs no state but the step number, and any world size
sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from addax_ds.data.loading import RankLoader
from addax_ds.data.train_rows import TrainRows
from addax_ds.utils.errors import UserError

STREAMS = ("zeroth_order", "first_order")
_ZEROTH_ORDER, _FIRST_ORDER = 0, 1  # streams, as counted into the permutations' key
_UINT64 = (1 << 64) - 1


@lru_cache(maxsize=4)  # of two streams, each of which may run over the border of two
def permutation(seed: int, stream: int, cycle: int, size: int) -> NDArray[np.int32]:
    """Return the permutation of `range(size)` for one pass of one stream over its examples.

    It sorts (stably) the first `size` words of NumPy's Philox4x64-10 bit generator with key
    (seed mod 2^64, 0) and counter (0, 0, stream, cycle). NumPy keeps the words of a bit generator
    stable over versions and platforms, which it does not promise for `Generator.permutation`.

    Returns:
        int32, shape [size], read-only as it is cached.
    """
    bits = np.random.Philox(
        key=np.array([seed & _UINT64, 0], np.uint64),
        counter=np.array([0, 0, stream, cycle], np.uint64),
    )
    order = np.argsort(bits.random_raw(size), kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


@dataclass(frozen=True, eq=False)
class StepSchedule:
    """The examples of every step, as a pure function of (seed, step).

    The first-order stream defines the epoch, one pass over D1 in a fresh permutation. The
    zeroth-order stream reads on through an endless row of permutations of D0, whatever the epoch.
    Without a first-order stream (MeZO) an epoch is as many steps as one pass over D0 takes.

    Attributes:
        zeroth_order: D0, indices of examples; empty if there is no zeroth-order stream.
        first_order: D1, indices of examples; empty if there is no first-order stream.
        zeroth_order_batch_size: K0, over all ranks; not used without a zeroth-order stream.
        first_order_batch_size: K1, over all ranks; not used without a first-order stream.
        seed: Keys the permutations.
        drop_last: Whether an epoch ends before a batch that it cannot fill, instead of with a
            short first-order batch.

    Raises:
        UserError: A stream has fewer examples than its global batch.
    """

    zeroth_order: NDArray[np.int32]
    first_order: NDArray[np.int32]
    zeroth_order_batch_size: int
    first_order_batch_size: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        _require_a_batch(
            len(self.zeroth_order),
            self.zeroth_order_batch_size,
            "zeroth-order stream D0",
            "--per_device_zo_batch_size",
        )
        _require_a_batch(
            len(self.first_order),
            self.first_order_batch_size,
            "first-order stream D1",
            "--per_device_train_batch_size",
        )
        if not len(self.zeroth_order) and not len(self.first_order):
            raise UserError("there are no examples to train on")

    @property
    def rows_per_step(self) -> int:
        """Rows of both batches of a step, of which a last one may have fewer."""
        zeroth_order = self.zeroth_order_batch_size if len(self.zeroth_order) else 0
        return zeroth_order + (self.first_order_batch_size if len(self.first_order) else 0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over D1, or over D0 if there is no first-order stream."""
        if len(self.first_order):
            size, batch = len(self.first_order), self.first_order_batch_size
        else:
            size, batch = len(self.zeroth_order), self.zeroth_order_batch_size
        return size // batch if self.drop_last else -(-size // batch)

    def zeroth_order_indices(self, step: int) -> NDArray[np.int32] | None:
        """Return the K0 examples of the step's zeroth-order batch; None without such a stream.

        They are positions step*K0 to (step+1)*K0 - 1 in the endless row of permutations, so a batch
        may run over the border of two of them.
        """
        size, batch = len(self.zeroth_order), self.zeroth_order_batch_size
        if not size:
            return None
        cycle, offset = divmod(step * batch, size)
        order = permutation(self.seed, _ZEROTH_ORDER, cycle, size)[offset : offset + batch]
        if len(order) < batch:  # K0 <= |D0|: one more permutation is enough
            rest = permutation(self.seed, _ZEROTH_ORDER, cycle + 1, size)[: batch - len(order)]
            order = np.concatenate([order, rest])
        return self.zeroth_order[order]

    def first_order_indices(self, step: int) -> NDArray[np.int32] | None:
        """Return the examples of the step's first-order batch; None without such a stream.

        There are K1 of them, or fewer in the last step of an epoch.
        """
        size, batch = len(self.first_order), self.first_order_batch_size
        if not size:
            return None
        epoch, index = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, _FIRST_ORDER, epoch, size)
        return self.first_order[order[index * batch : (index + 1) * batch]]


def _require_a_batch(size: int, batch: int, stream: str, flag: str) -> None:
    """Raise if a stream that exists cannot fill one global batch."""
    if size and batch < 1:
        raise UserError(f"the global batch of the {stream} is {batch}; {flag} must be at least 1")
    if 0 < size < batch:
        raise UserError(
            f"the {stream} holds {size} examples, fewer than its global batch of {batch} ({flag} "
            "times the number of ranks); lower that flag, use fewer ranks, or move "
            "--length_threshold so that the stream has more examples"
        )


class StepBatches(Dataset[dict[str, Any]]):
    """Maps a global step number to one rank's tensors; any step, in any order, without an end.

    An item holds, for each stream that exists,

    - "zeroth_order" / "first_order": a list with the batch of each micro-batch;
    - "zeroth_order_targets" / "first_order_targets": int, the number of predicted tokens in the
      *global* batch, by which the sum of all losses, over ranks and micro-batches, is divided. Only
      if the rows know it.

    Rows are dealt out to ranks and micro-batches as if each micro-batch had ranks of its own: the
    same rows are together on one rank with two micro-batches as on two ranks with one.

    All have equally many rows, at least one, and so run the same number of passes: where the
    global batch runs out, there is a dummy row that adds nothing to loss and count.

    Args:
        rows: all rows.
        schedule: which of them a step sees.
        rank: of this process.
        world_size: number of ranks.
        micro_batches: into how many a rank's rows are divided.
    """

    def __init__(
        self,
        rows: TrainRows,
        schedule: StepSchedule,
        rank: int,
        world_size: int,
        micro_batches: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        self.rows = rows
        self._schedule = schedule
        self._rank = rank
        self._world_size = world_size
        self._micro_batches = micro_batches

    @property
    def schedule(self) -> StepSchedule:
        """Examples of each step."""
        return self._schedule

    def reschedule(self, schedule: StepSchedule) -> None:
        """Show other examples from now on; a loader's workers, once started, do not learn of it."""
        self._schedule = schedule

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return this rank's part of the step; see the class."""
        item: dict[str, Any] = {}
        for stream in STREAMS:
            indices = self._indices(step, stream)
            if indices is None:
                continue
            shares = self._world_size * self._micro_batches
            own = [self.indices(step, stream, number) for number in range(self._micro_batches)]
            item[stream] = [
                self.rows.batch(part, dummy=len(part) * shares < len(indices)) for part in own
            ]
            if self.rows.target_counts is not None:
                item[f"{stream}_targets"] = int(self.rows.target_counts[indices].sum())
        return item

    def tokens(self, step: int) -> dict[str, int]:
        """Return how many tokens the step's global batches have, by stream, padding left out."""
        batches = {stream: self._indices(step, stream) for stream in STREAMS}
        return {
            stream: 0 if batch is None else int(self.rows.lengths[batch].sum())
            for stream, batch in batches.items()
        }

    def indices(self, step: int, stream: str, micro_batch: int) -> NDArray[np.int32]:
        """Return this rank's rows of a micro-batch of a stream that exists, int32."""
        indices = self._indices(step, stream)
        assert indices is not None
        shares = self._world_size * self._micro_batches
        return indices[micro_batch * self._world_size + self._rank :: shares]

    def _indices(self, step: int, stream: str) -> NDArray[np.int32] | None:
        if stream == "zeroth_order":
            return self._schedule.zeroth_order_indices(step)
        return self._schedule.first_order_indices(step)


class EpochSampler(Sampler[list[int]]):
    """Yields the global step numbers of one epoch, each as a list of one.

    It serves as a *batch* sampler: `accelerate.skip_first_batches`, by which Trainer resumes inside
    an epoch, wraps only those, and `Trainer` finds `set_epoch` through the wrapper.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield [step] for each step of the epoch."""
        first = self._epoch * self._steps_per_epoch
        for step in range(first, first + self._steps_per_epoch):
            yield [step]

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return self._steps_per_epoch


class StepLoader(RankLoader[dict[str, Any]]):
    """A loader over the steps of one epoch, which `set_epoch` chooses."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        assert isinstance(self.batch_sampler, EpochSampler)
        self.batch_sampler.set_epoch(epoch)


def train_dataloader(
    step_batches: StepBatches,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
) -> StepLoader:
    """Return a loader of `StepBatches` items, one a step, that Trainer can drive and resume.

    It is already this rank's own: it must not go through `accelerator.prepare`, which would share
    the steps out among the ranks. The other arguments are those of `DataLoader`.
    """
    return StepLoader(
        step_batches,
        batch_sampler=EpochSampler(step_batches.schedule.steps_per_epoch),
        collate_fn=_only,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        generator=torch.Generator(),  # else each epoch draws a number from the global generator
    )


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Unpack the batch of one that `EpochSampler` asks for."""
    (item,) = items
    return item
