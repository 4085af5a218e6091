"""Examples in Arrow files, which are mapped: their tokens are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from addax_ds.data.examples import Example

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "target_count": pa.int32(),
        "origin": pa.string(),
    }
)
"""Columns of a shard, a row an example."""


def record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as a batch of `SCHEMA`."""
    offsets = np.cumsum([0, *(example.length for example in examples)]).astype(np.int32)
    ids = np.concatenate([example.input_ids for example in examples])
    labels = np.concatenate([example.labels for example in examples])
    columns = [
        pa.ListArray.from_arrays(offsets, ids),
        pa.ListArray.from_arrays(offsets, labels),
        pa.array([example.target_count for example in examples], pa.int32()),
        pa.array([example.origin for example in examples], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class Part(NamedTuple):
    """Columns of some rows, in a mapped file.

    Attributes:
        offsets: int32, shape [rows + 1], of ``ids`` and ``labels``.
        ids: int32, shape [tokens].
        labels: int32, shape [tokens].
        target_counts: int32, shape [rows].
        origins: a string a row.
    """

    offsets: NDArray[np.int32]
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    target_counts: NDArray[np.int32]
    origins: pa.StringArray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> Part:
        """Return the columns of a batch."""
        ids, labels = batch.column("input_ids"), batch.column("labels")
        return cls(
            ids.offsets.to_numpy(),
            ids.values.to_numpy(),
            labels.values.to_numpy(),
            batch.column("target_count").to_numpy(),
            batch.column("origin"),
        )

    def example(self, row: int) -> Example:
        """Return an example, whose arrays are views."""
        own = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Example(self.ids[own], self.labels[own], self.origins[row].as_py())

    def examples(self) -> Iterator[Example]:
        """Yield all examples."""
        return map(self.example, range(len(self.origins)))


class Shard:
    """A shard, mapped at once, so that it may be deleted, and looked into when it is asked.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:
            self._content = file.read_buffer()

    @cached_property
    def parts(self) -> list[Part]:
        """Batches of the file."""
        return [Part.of(batch) for batch in pa.ipc.open_stream(self._content)]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(part.origins) for part in self.parts)])

    def __getitem__(self, row: int) -> Example:
        """Return an example of the file."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.parts[number].example(row - int(self._starts[number]))


class ArrowExamples(Sequence[Example]):
    """Examples in mapped files; their arrays are views of these, and cannot be written.

    An instance can be pickled, and holds no file open.

    Args:
        shards: files, in order, and how many examples each has.
        sizes: int32, shape [2, rows]: lengths and target counts.
        digest: see below.
        turn_ends: see below.

    Attributes:
        lengths: int32, shape [rows]: tokens of each.
        target_counts: int32, shape [rows]: predicted tokens of each.
        digest: `data_digest` of all.
        turn_ends: `learnt_ends` of all if they are conversations, else empty.
    """

    def __init__(
        self,
        shards: Mapping[Path, int],
        sizes: NDArray[np.int32],
        digest: str,
        turn_ends: frozenset[int],
    ) -> None:
        self._paths = list(shards)
        self._starts = np.cumsum([0, *shards.values()])
        self.lengths, self.target_counts = sizes
        self.digest = digest
        self.turn_ends = turn_ends
        self._shards = list(map(Shard, self._paths))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """Return an example, or a list of some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shards[number][row - int(self._starts[number])]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._shards = list(map(Shard, self._paths))
