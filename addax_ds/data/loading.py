"""A `DataLoader` whose workers live as long as their rank, and no longer."""

from ctypes import c_bool
from functools import partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from addax_ds.utils.signals import ignore_sigterm_until

T = TypeVar("T")


class RankLoader(DataLoader[T]):
    """A `DataLoader` of one rank's batches, whatever way the rank ends.

    A launcher sends SIGTERM to workers, too, while the rank saves a checkpoint, so they ignore it.
    Python ends what is left of them by the same signal when the rank ends, and waits for them. So
    the rank first tells them that it ends.

    Args:
        dataset: see `DataLoader`.
        num_workers: see `DataLoader`.
        **options: see `DataLoader`.
    """

    def __init__(self, dataset: Dataset[T], *, num_workers: int = 0, **options: Any) -> None:
        if num_workers > 0:
            # Without a lock: a signal may interrupt whoever reads it.
            ends = RawValue(c_bool, False)
            # Python runs what has a priority before it ends the processes that are left.
            Finalize(self, partial(setattr, ends, "value", True), exitpriority=0)
            options["worker_init_fn"] = partial(ignore_sigterm_until, ends)
        super().__init__(dataset, num_workers=num_workers, **options)
