"""A `DataLoader` whose workers live as long as their rank, and no longer."""

import os
from collections.abc import Callable
from ctypes import c_bool
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from addax_ds.utils.signals import Flag, ignore_signals_until

T = TypeVar("T")


class RankLoader(DataLoader[T]):
    """A `DataLoader` of one rank's batches, whatever way the rank ends.

    A launcher sends SIGTERM to workers, too, and a terminal SIGINT, while the rank saves a
    checkpoint, so they ignore both. Python ends what is left of them by SIGTERM when the rank ends,
    and waits for them. So the rank first tells them that it ends.

    Tensors of workers travel by value. torch would share their memory, for which each holds a file
    open, and an item may have hundreds: a step of many micro-batches.

    Args:
        dataset: see `DataLoader`.
        collate_fn: makes a `dict` of the items of a batch.
        num_workers: see `DataLoader`.
        **options: see `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        *,
        collate_fn: Callable[[list[Any]], dict[str, Any]],
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        if num_workers > 0:
            options["worker_init_fn"] = partial(ignore_signals_until, _flag_of_end(os.getpid()))
            collate_fn = partial(_by_value, collate_fn)
        super().__init__(dataset, collate_fn=collate_fn, num_workers=num_workers, **options)


@cache
def _flag_of_end(pid: int) -> Flag:
    """Return a flag that is set when this process ends, for its workers to see; one a process."""
    ends = RawValue(c_bool, False)  # without a lock: a signal may interrupt whoever reads it
    # What has a priority runs before Python ends the processes that are left.
    Finalize(None, partial(setattr, ends, "value", True), exitpriority=0)
    return ends


@dataclass(frozen=True)
class _Bytes:
    """A tensor as NumPy holds any dtype of it: its bytes."""

    data: NDArray[np.uint8]
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "_Bytes":
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        return cls(flat.numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.data).view(self.dtype).view(self.shape)


class _ByValue(dict[str, Any]):
    """A batch that another process gets as a plain one, with its own tensors."""

    def __reduce__(self) -> Any:
        return _converted, (dict(self), _Bytes, _Bytes.tensor)


def _by_value(collate_fn: Callable[[list[Any]], dict[str, Any]], items: list[Any]) -> _ByValue:
    # Here, where an error reaches the rank. In the thread that sends batches it would be lost.
    return _ByValue(_converted(dict(collate_fn(items)), Tensor, _Bytes.of))


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert what is of a kind in nested dicts and lists."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {name: _converted(inner, kind, convert) for name, inner in value.items()}
    if isinstance(value, list):
        return [_converted(inner, kind, convert) for inner in value]
    return value
