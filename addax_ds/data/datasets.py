"""Rows of any map-style data set as examples: tokenised ones, or text of the known shapes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from addax_ds.data.encoding import encode, learnt_ends
from addax_ds.data.examples import NO_LOSS, Example
from addax_ds.reading.records import log_unused, read_records
from addax_ds.reading.sources import without_nested_nulls
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from addax_ds.data.train_rows import MapDataset

_INT32_NUMBERS = 2**31
"""Token ids that an example can hold, where nobody knows how many the model has."""

_LOSS_MASKS = ("completion_mask", "assistant_masks")
_OF_PACKED_ROWS = ("position_ids", "seq_idx", "seq_lengths")


def as_examples(
    dataset: MapDataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    model_positions: int | None = None,
    vocabulary_size: int | None = None,
    now: datetime | None = None,
) -> Sequence[Example]:
    """Return the examples of a data set, whose first row decides how the others are read.

    Args:
        dataset: rows that are examples; that have ``input_ids`` (`_tokens` says with what else); or
            that have one of `shapes.SHAPES`.
        name: what to call the data set in messages.
        tokenizer: for rows of text.
        model_positions: see `encode`.
        vocabulary_size: see `encode`.
        now: date and time that chat templates read.

    Returns:
        The examples; `Conversations` if a chat template has written them.

    Raises:
        UserError: there are no rows, or one cannot be used; the message names its number.
    """
    if not len(dataset):
        raise UserError(f"{name} holds no rows")
    first = dataset[0]
    if isinstance(first, Example):
        if isinstance(dataset, Sequence):
            return dataset
        return [dataset[index] for index in range(len(dataset))]
    if not isinstance(first, Mapping):
        raise UserError(f"{name}: row 0 is a {type(first).__name__}; expected columns by name")
    if "input_ids" in first:
        positions, vocabulary = model_positions or math.inf, vocabulary_size or _INT32_NUMBERS
        found: list[Example] = []
        unused: set[str] = set()
        for index in range(len(dataset)):
            row, origin = dataset[index], f"{name}: row {index}"
            columns = _tokens(row, origin)
            found.append(_example(columns, origin, positions, vocabulary))
            unused.update(key for key in row.keys() - columns.keys() if row[key] is not None)
        log_unused(name, unused)
        return found
    if tokenizer is None:
        raise UserError(f"{name} holds text: give the trainer its tokenizer as processing_class")
    records = read_records(_MapRows(dataset, name), tokenizer, now=now)
    examples, _ = encode(
        records,
        tokenizer,
        max_length=None,
        model_positions=model_positions,
        vocabulary_size=vocabulary_size,
    )
    written_by_template = not records[0].add_special_tokens
    return Conversations(examples) if written_by_template else examples


class Conversations(list[Example]):
    """Examples of conversations.

    Attributes:
        turn_ends: `learnt_ends` of all.
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        super().__init__(examples)
        self.turn_ends = frozenset(learnt_ends(self))


@dataclass(frozen=True)
class _MapRows:
    """Rows (`addax_ds.reading.sources.Rows`) of a map-style data set."""

    dataset: MapDataset
    name: str
    identity: str = ""

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        of_arrow = isinstance(self.dataset, _arrow_dataset())
        for index in range(start, min(stop, len(self))):
            row = self.dataset[index]
            yield f"{self.name}: row {index}", without_nested_nulls(row) if of_arrow else row


def _arrow_dataset() -> Any:
    """Return the class of Arrow's data sets; if nobody has imported it, no data set is one."""
    return getattr(sys.modules.get("datasets"), "Dataset", ())


def _tokens(row: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the columns of a tokenised row that are used, each int64 of shape [tokens].

    Tokens that ``attention_mask`` marks with 0 are left out. ``labels`` are not shifted, and -100
    where a token carries no loss. Without them, a token carries loss where ``completion_mask`` and
    ``assistant_masks`` both say so, or whichever there is, as in TRL. A null is a missing column.

    Raises:
        UserError: a column holds other things, not as many, or says that the row is packed; or
            there are no ``input_ids``.
    """
    if row.get("input_ids") is None:
        raise UserError(f"{origin}: no input_ids (or null), a column of the first row")
    for column in _OF_PACKED_ROWS:
        if row.get(column) is not None:
            raise UserError(
                f"{origin}: {column} is of packed rows, whose sequences would be read as one: give "
                "a row for each sequence, or a data_collator that makes position_ids; if the row "
                "is one sequence, remove the column"
            )
    learnt = ("labels",) if row.get("labels") is not None else _LOSS_MASKS
    present = [name for name in ("attention_mask", *learnt) if row.get(name) is not None]
    columns = {name: _integers(row, name, origin) for name in ("input_ids", *present)}
    if len({len(values) for values in columns.values()}) > 1:
        counts = ", ".join(f"{len(values)} in {name}" for name, values in columns.items())
        raise UserError(f"{origin}: the columns have a value for each token, but {counts}")
    return columns


def _example(columns: Mapping[str, Any], origin: str, positions: float, vocabulary: int) -> Example:
    """Return the example of `_tokens`."""
    ids = columns["input_ids"]
    labels = columns.get("labels", ids)
    for mask in _LOSS_MASKS:
        if mask in columns:
            labels = np.where(columns[mask] != 0, labels, NO_LOSS)
    if "attention_mask" in columns:
        attended = columns["attention_mask"] != 0
        ids, labels = ids[attended], labels[attended]
    if len(ids) > positions:
        raise UserError(
            f"{origin}: {len(ids)} tokens, and the model takes {positions:.0f}: shorten the row"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise UserError(
            f"{origin}: input_ids from {ids.min()} to {ids.max()}, and the model has embeddings "
            f"for {vocabulary}: the tokenizer is another model's"
        )
    targets = labels[labels != NO_LOSS]
    if len(targets) and not 0 <= targets.min() <= targets.max() < vocabulary:
        raise UserError(
            f"{origin}: labels from {targets.min()} to {targets.max()}, and the model has "
            f"embeddings for {vocabulary}: a label is a token, or {NO_LOSS} where there is no loss"
        )
    example = Example(ids.astype(np.int32), labels.astype(np.int32), origin)
    if not example.target_count:
        raise UserError(
            f"{origin}: no token after the first has a label, so there is nothing to learn from it"
        )
    return example


def _integers(row: Mapping[str, Any], column: str, origin: str) -> Any:
    values = np.asarray(row[column])
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise UserError(
            f"{origin}: {column} must be integers, one a token, and not {values.dtype} of shape "
            f"{values.shape}"
        )
    return values.astype(np.int64)
