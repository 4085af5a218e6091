"""Tokenised rows, one by one and all together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

NO_LOSS = -100
"""Label of a token that carries no loss, as everywhere in torch and Transformers."""


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One tokenised sequence.

    Attributes:
        input_ids: int32, shape [length].
        labels: int32, shape [length]: the token itself where it carries loss, else `NO_LOSS`. Not
            shifted: the model compares the output at position t with the label at t + 1.
        origin: Where the row comes from, for messages.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    origin: str

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def target_count(self) -> int:
        """Number of predicted tokens: nothing predicts position 0 in a causal model."""
        return int(np.count_nonzero(self.labels[1:] != NO_LOSS))


def data_digest(examples: Sequence[Example]) -> str:
    """Return 16 hex digits for tokens and labels of the examples, and for their order."""
    known: str | None = getattr(examples, "digest", None)
    if known is not None:
        return known
    digest = hashlib.sha256()
    add_to_digest(digest, examples)
    return digest.hexdigest()[:16]


def add_to_digest(digest: hashlib._Hash, examples: Iterable[Example]) -> None:
    """Add examples to what `data_digest` hashes."""
    for example in examples:
        digest.update(example.length.to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.input_ids).data)
        digest.update(np.ascontiguousarray(example.labels).data)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """Return the number of tokens of each example."""
    return _known(examples, "lengths", "length")


def target_counts_of(examples: Sequence[Example]) -> NDArray[np.int32]:
    """Return the number of predicted tokens of each example."""
    return _known(examples, "target_counts", "target_count")


def turn_ends_of(examples: Sequence[Example]) -> frozenset[int]:
    """Return the tokens that learnt turns end in; none if the examples are no conversations."""
    return getattr(examples, "turn_ends", frozenset())


def _known(examples: Sequence[Example], every: str, one: str) -> NDArray[np.int32]:
    """Return a number of each example, which a `Sequence` of them may have together."""
    known = getattr(examples, every, None)
    if known is not None:
        return known
    return np.fromiter(map(attrgetter(one), examples), np.int32, len(examples))
