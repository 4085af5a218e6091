"""Training rows as a step needs them: how long they are, which one is where, and batches of them.

`EncodedRows` are examples of this package, `CollatedRows` the rows of any map-style data set, of
which a collator makes batches.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from addax_ds.data.examples import NO_LOSS, Example, data_digest, lengths_of, target_counts_of
from addax_ds.reading.shapes import listed
from addax_ds.utils.errors import UserError

_IDS = "_ids"


class MapDataset(Protocol):
    """What `torch.utils.data.Dataset`, `datasets.Dataset` and a list of rows have in common."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a row."""
        ...


def check_map_style(dataset: Any, name: str, why: str) -> None:
    """Check that a data set is map-style (`MapDataset`).

    Raises:
        UserError: with ``why`` one is needed, and with what makes one of a data frame or a dict.
    """
    kind = type(dataset)
    library = kind.__module__.partition(".")[0]
    if library in ("pandas", "polars"):
        raise UserError(
            f"{name} is a {kind.__name__} of {library}; {why} rows by number: give "
            f"datasets.Dataset.from_{library}(...) of it"
        )
    if isinstance(dataset, Mapping) and 0 not in dataset:
        raise UserError(
            f"{name} is a {kind.__name__} of [{listed(map(str, dataset))}]; {why} rows by number: "
            "if these are columns, give datasets.Dataset.from_dict(...) of it; if splits, one of "
            "them"
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"{name} is a {kind.__name__}, whose rows come one after the other; {why} a data set "
            "with a length and rows by number (datasets: load it without streaming)"
        )


class TrainRows(ABC):
    """Rows to train on.

    Attributes:
        lengths: int32, shape [rows]: tokens of each row, by which the streams are divided.
        target_counts: int32, shape [rows]: predicted tokens of each row; None if only a batch
            tells.
        has_dummy: whether there is a row without loss, to fill up a batch.
    """

    lengths: NDArray[np.int32]
    target_counts: NDArray[np.int32] | None
    has_dummy: bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    @abstractmethod
    def batch(self, indices: NDArray[np.int32], *, dummy: bool = False) -> dict[str, Any]:
        """Return the batch of some rows.

        Args:
            indices: of the rows.
            dummy: whether to add a row without loss.
        """

    @abstractmethod
    def origin(self, index: int) -> str:
        """Return where a row comes from, for messages."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """16 hex digits for the rows and their order."""


class EncodedRows(TrainRows):
    """Examples, padded on the right.

    Args:
        examples: the rows.
        pad_token_id: what to pad with.
    """

    target_counts: NDArray[np.int32]
    has_dummy = True

    def __init__(self, examples: Sequence[Example], pad_token_id: int) -> None:
        self.examples = examples
        self._pad_token_id = pad_token_id
        self.lengths = lengths_of(examples)
        self.target_counts = target_counts_of(examples)

    def batch(self, indices: NDArray[np.int32], *, dummy: bool = False) -> dict[str, Any]:
        """Return `pad`'s tensors; a dummy is `dummy_example`."""
        rows = [self.examples[index] for index in indices]
        return pad(
            [*rows, dummy_example(self._pad_token_id)] if dummy else rows, self._pad_token_id
        )

    def origin(self, index: int) -> str:
        """Return where an example comes from."""
        return self.examples[index].origin

    @cached_property
    def digest(self) -> str:
        """`data_digest` of the examples."""
        return data_digest(self.examples)


class CollatedRows(TrainRows):
    """Rows of a map-style data set, each read once to see how long it is.

    Args:
        dataset: the rows.
        collator: makes a batch of a list of rows.
        row_length: tokens of a row.

    Raises:
        UserError: the data set has no rows, no length, or rows of which nothing says how long they
            are.
    """

    target_counts = None
    has_dummy = False

    def __init__(
        self,
        dataset: MapDataset,
        collator: Callable[[list[Any]], Any],
        row_length: Callable[[Any], int],
    ) -> None:
        self._dataset = dataset
        self._collator = collator
        digest = hashlib.sha256()
        lengths = []
        for index in range(len(dataset)):
            row = dataset[index]
            lengths.append(row_length(row))
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
        self.lengths = np.array(lengths, np.int32)
        self._digest = digest.hexdigest()[:16]

    def batch(self, indices: NDArray[np.int32], *, dummy: bool = False) -> dict[str, Any]:
        """Return what the collator makes of rows; without a dummy, as any row may have a loss."""
        assert not dummy, "an epoch ends before a batch that it cannot fill"
        return dict(self._collator([self._dataset[int(index)] for index in indices]))

    def origin(self, index: int) -> str:
        """Return the row's number."""
        return f"row {index}"

    @property
    def digest(self) -> str:
        """16 hex digits for numbers, texts and arrays in the rows, and their order."""
        return self._digest


def row_length(row: Any) -> int:
    """Return the tokens of a row: of ``input_ids``, or else of all its columns of token ids.

    Of a pair of answers these are ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, say.

    Raises:
        UserError: it has no such column.
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"a row of the training data is a {type(row).__name__}; expected columns by name"
        )
    if row.get("input_ids") is not None:
        return len(row["input_ids"])
    columns = [name for name in row if name.endswith(_IDS) and row[name] is not None]
    if not columns:
        raise UserError(
            f"a row of the training data has the columns {', '.join(map(str, row)) or 'none'} and "
            "no input_ids, so nothing says how many tokens it has: tokenise the data set, or "
            "override row_length(row) in the trainer"
        )
    return sum(len(row[name]) for name in columns)


def pad(rows: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Collate examples, padded on the right to the longest of them.

    There is no attention mask: tokens attend to what comes before them, and padding comes after.
    So attention runs by faster kernels, and keeps no mask for backward, unless the model has one of
    its own (a sliding window's, or ALiBi).

    Returns:
        "input_ids" and "labels" (`NO_LOSS` on padding), each int64 of shape [rows, longest].
    """
    shape = len(rows), max(row.length for row in rows)
    input_ids = np.full(shape, pad_token_id, np.int64)
    labels = np.full(shape, NO_LOSS, np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : row.length] = row.input_ids
        labels[index, : row.length] = row.labels
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def dummy_example(pad_token_id: int) -> Example:
    """Return one token without loss."""
    return Example(np.array([pad_token_id], np.int32), np.array([NO_LOSS], np.int32), "padding")


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a mapping, an array, a tensor or an image.

    Of others only the type.
    """
    if isinstance(value, Mapping):  # as a tokenizer returns it, a BatchEncoding
        return dict(value)
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return [str(value.dtype), value.shape, hashlib.sha256(flat.numpy().tobytes()).hexdigest()]
    array = np.asarray(value)
    if array.dtype == object:
        return type(value).__name__
    return [str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()]
