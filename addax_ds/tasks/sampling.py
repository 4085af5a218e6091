"""Sampling of training, dev and test rows from a source."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from addax_ds.utils.errors import UserError

R = TypeVar("R")


@dataclass(frozen=True)
class SourceRow:
    """One row as its source has it, and where it stands there (for messages and predictions)."""

    origin: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Rows asked for. Without training rows there is nothing to choose, so dev is empty, too."""

    train: int = 1000
    dev: int = 500
    test: int = 1000

    def __post_init__(self) -> None:
        if self.train == 0:
            object.__setattr__(self, "dev", 0)


@dataclass(frozen=True)
class Drawn(Generic[R]):
    """The rows of a run; ``notes`` say where there were fewer than asked for."""

    description: str
    notes: tuple[str, ...]
    train: list[R]
    dev: list[R]
    test: list[R]


def draw(
    splits: Mapping[str, Sequence[SourceRow]], sizes: Sizes, seed: int, title: str
) -> Drawn[SourceRow]:
    """Draw the rows of a run from the splits of a source.

    From ``train`` and ``validation``, as MeZO draws them (arXiv 2305.17333, large models): training
    and dev rows are the first of NumPy's legacy permutation of the train split, dev being the last
    of these; test rows are the first of that of the validation split. The same seed gives the rows
    that MeZO's ``train_set_seed`` gives, if the source has its rows in the same order. Where there
    are too few, dev gets all it asks for, training and test what is left.

    One split alone is dealt by SHA-256 over (seed, origin), whatever the order of its rows:
    training rows from the front, test rows from the end, dev rows before those. Where there are too
    few, each gets its proportion.

    Raises:
        UserError: the splits are other ones, or no row is left to train or to test on.
    """
    if {"train", "validation"} <= splits.keys():
        drawn = _from_two(splits["train"], splits["validation"], sizes, seed, title)
    elif len(splits) == 1:
        ((name, rows),) = splits.items()
        drawn = _from_one(rows, sizes, seed, f"re-partitioned {title} {name} rows")
    else:
        raise UserError(
            f"{title}: found the splits [{', '.join(sorted(splits))}]; there must be train and "
            "validation, or one alone"
        )
    for name in ("train", "test"):
        if getattr(sizes, name) and not getattr(drawn, name):
            counts = " and ".join(f"{len(rows)} {split} rows" for split, rows in splits.items())
            raise UserError(
                f"{title}: of {counts} none is left for {name}. Asked for are {sizes.train} for "
                f"train, {sizes.dev} for dev and {sizes.test} for test: lower --num_train, "
                "--num_dev or --num_test"
            )
    return drawn


def _from_two(
    train: Sequence[SourceRow], test: Sequence[SourceRow], sizes: Sizes, seed: int, title: str
) -> Drawn[SourceRow]:
    first = _permutation(len(train), seed)[: sizes.train + sizes.dev]
    border = max(len(first) - sizes.dev, 0)
    chosen = _permutation(len(test), seed)[: sizes.test]
    return Drawn(
        title,
        (
            *_note("training", border, sizes.train, f"{len(train)} rows, {sizes.dev} of them dev"),
            *_note("test", len(chosen), sizes.test, f"{len(test)} rows in the validation split"),
        ),
        [train[int(index)] for index in first[:border]],
        [train[int(index)] for index in first[border:]],
        [test[int(index)] for index in chosen],
    )


def _from_one(
    rows: Sequence[SourceRow], sizes: Sizes, seed: int, description: str
) -> Drawn[SourceRow]:
    asked = sizes.train + sizes.dev + sizes.test
    dev, test = sizes.dev, sizes.test
    if asked > len(rows):
        dev, test = (len(rows) * size // asked for size in (dev, test))
    train = min(sizes.train, len(rows) - dev - test)
    dealt = sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row.origin}".encode()).digest())
    of_all = f"{len(rows)} rows in all"
    return Drawn(
        description,
        (
            *_note("training", train, sizes.train, of_all),
            *_note("dev", dev, sizes.dev, of_all),
            *_note("test", test, sizes.test, of_all),
        ),
        dealt[:train],
        dealt[len(dealt) - test - dev : len(dealt) - test],
        dealt[len(dealt) - test :],
    )


def _permutation(size: int, seed: int) -> np.ndarray:
    # Frozen since NumPy 1.16, unlike np.random.Generator's.
    return np.random.RandomState(seed).permutation(size)


def _note(kind: str, found: int, asked: int, why: str) -> tuple[str, ...]:
    return () if found == asked else (f"{found} {kind} rows, not {asked}: {why}",)
