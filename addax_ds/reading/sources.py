"""Where rows come from: files and data sets, by what the arguments name.

`open_rows` returns `Rows`, of which `addax_ds.reading.records` makes text. JSON and CSV files are
read by `addax_ds.reading.text_files`, all else by `datasets`.
"""

from __future__ import annotations

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from addax_ds.reading.shapes import Renamed
from addax_ds.reading.text_files import (
    JsonArray,
    JsonLines,
    Table,
    begins_with,
    identity_of,
    open_regular,
)
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import on_one_line, shown

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # rows of a data set that are read at once


class Rows(Protocol):
    """Rows of one source, in a fixed order.

    An instance can be pickled, and is cheap to open in another process. One that has been asked
    for its length does not scan its files again there.
    """

    @property
    def name(self) -> str:
        """What to call the rows in messages: "train.jsonl", "imdb, train[:1000]"."""
        ...

    @property
    def identity(self) -> str:
        """Equal for equal rows, found without reading them.

        It has the real path, size and time of change of each file, or the fingerprint of a data
        set, and the names that columns get.
        """
        ...

    def __len__(self) -> int:
        """Return the number of rows; files may be scanned for it, once."""
        ...

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (origin, columns) of the rows from ``start`` to before ``stop``, in order.

        Raises:
            UserError: a row cannot be read; the message names its file, and its line or number.
        """
        ...


def open_rows(
    files: Sequence[str] = (),
    *,
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Return the rows of files, or of a split of a data set.

    Args:
        files: paths of files, patterns of such paths, and folders.
        dataset: name on the hub, or folder, instead of files.
        config: of the data set.
        split: of the data set, with the slices of `datasets`: "train[:1000]".
        columns: of `parse_columns`.

    Raises:
        UserError: there is no such thing, or it is nothing that has rows.
    """
    rows = _open_files(files) if dataset is None else _open_dataset(dataset, config, split)
    return Renamed(rows, columns) if columns else rows


def _open_files(words: Sequence[str]) -> Rows:
    parts = [_open_file(path) for path in find_files(words)]
    if len(parts) == 1:
        return parts[0]
    named = ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
    return _Joined(named if len(words) == len(parts) else f"{len(parts)} files of {named}", parts)


def _open_dataset(name: str, config: str | None, split: str) -> Rows:
    label = f"{name} {config}" if config else name
    return _Loaded(f"{label}, {split}", partial(_load_split, name, config, split))


# ---- files ---------------------------------------------------------------------------------------


def _open_json(path: Path) -> Rows:
    return JsonArray(path) if begins_with(path) == b"[" else JsonLines(path)


def _open_arrow(builder: str, path: Path) -> Rows:
    open_regular(path).close()
    return _Loaded(str(path), partial(_load_file, builder, str(path.absolute())), path)


_FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": _open_json,
    ".csv": partial(Table, delimiter=","),
    ".tsv": partial(Table, delimiter="\t"),
    ".parquet": partial(_open_arrow, "parquet"),
    ".arrow": partial(_open_arrow, "arrow"),
}
_KNOWN = (
    f"known are files that end in {', '.join(_FORMATS)} (all but the last two also with .gz), "
    "JSON Lines of any name, and folders that save_to_disk wrote"
)
_SAVED = "state.json"  # in a folder of one data set that save_to_disk wrote
_SAVED_SPLITS = "dataset_dict.json"  # in one of several splits
_SPLIT = re.compile(r"(?<![a-z])(?:(train)|(valid|validation|val|dev)|(test|eval))(?![a-z])")


def find_files(words: Sequence[str]) -> list[Path]:
    """Return the files, and folders of `save_to_disk`, that paths, patterns and folders stand for.

    Those of one pattern or folder are sorted by path. Of a folder they are the files with a known
    ending, and none of the folders in it.

    Raises:
        UserError: there is none, a file is named twice, or a pattern or folder has files of several
            formats or splits.
    """
    found = [path for word in words for path in _files_of(word)]
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise UserError(f"{path} is named twice")
        seen.add(path.resolve())
    return found


def _files_of(word: str) -> list[Path]:
    path = Path(word)
    if os.path.isdir(word):
        if (path / _SAVED).is_file():
            return [path]
        if (path / _SAVED_SPLITS).is_file():
            raise UserError(
                f"{word}: holds several splits that save_to_disk wrote; name one of its folders, "
                f"or give --dataset_name {word}"
            )
        return _of_one_kind(word, path, list(_inside(path)))
    if os.path.exists(word):
        return [path]
    if not glob.has_magic(word):
        raise UserError(f"{shown(word, 200)}: there is no such file")
    files = [Path(file) for file in sorted(glob.glob(word, recursive=True))]
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    return _of_one_kind(word, fixed, [file for file in files if not file.is_dir()])


def _inside(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder with a known ending, unless "." or "_" comes first."""
    try:
        for path in sorted(folder.iterdir()):
            if path.is_file() and _format(path) and not path.name.startswith((".", "_")):
                yield path
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error


def _format(path: Path) -> str | None:
    """Return the known ending of a file, without that of gzip."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] not in ([".parquet"], [".arrow"]):
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _shown_format(path: Path) -> str:
    known = _format(path)
    return "no known ending" if known is None else known + path.suffix.lower().removeprefix(known)


def _of_one_kind(word: str, folder: Path, files: list[Path]) -> list[Path]:
    """Return the files of a pattern or folder, if they are of one format and one split."""
    if not files:
        raise UserError(
            f"{word}: no files of rows there (folders in a folder are not read); {_KNOWN}"
        )
    formats = sorted({_shown_format(file) for file in files})
    if len(formats) > 1:
        raise UserError(
            f"{word}: files of several formats there ({', '.join(formats)}), which may hold the "
            "same rows; name those that are meant"
        )
    names = (str(file.relative_to(folder)).lower() for file in files)
    splits = {match.lastindex: match[0] for match in map(_SPLIT.search, names) if match}
    if len(splits) > 1:
        raise UserError(
            f"{word}: files of several splits there ({', '.join(splits.values())}); name those "
            "that are meant, or give the folder as --dataset_name, with --train_split"
        )
    return files


def _open_file(path: Path) -> Rows:
    if path.is_dir():
        return _Loaded(str(path), partial(_load_saved, str(path.absolute())))
    ending = _format(path)
    if ending is not None:
        return _FORMATS[ending](path)
    if begins_with(path) not in (b"{", b""):
        raise UserError(f"{path}: neither of a known ending nor JSON Lines; {_KNOWN}")
    return JsonLines(path)


class _Joined:
    """Rows of several sources, one after the other."""

    def __init__(self, name: str, parts: Sequence[Rows]) -> None:
        self.name = name
        self._parts = parts

    @property
    def identity(self) -> str:
        return "\n".join(part.identity for part in self._parts)

    @cached_property
    def _ends(self) -> list[int]:
        empty = next((part.name for part in self._parts if not len(part)), None)
        if empty is not None:
            raise UserError(f"{empty}: there are no rows")
        return list(accumulate(len(part) for part in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(bisect_right(self._ends, start), len(self._parts)):
            before = self._ends[index - 1] if index else 0
            if before >= stop:
                return
            yield from self._parts[index].read(max(start - before, 0), stop - before)


# ---- datasets ------------------------------------------------------------------------------------


class _Loaded:
    """Rows of a `datasets.Dataset`, which is loaded when it is first asked.

    An origin is ``name: row i``, counted from 0.

    Args:
        name: what to call the rows.
        load: makes the data set.
        path: of the file that it is made of, if it is one.
    """

    def __init__(self, name: str, load: Callable[[], Dataset], path: Path | None = None) -> None:
        self.name = name
        self._load = load
        self._path = path

    @property
    def identity(self) -> str:
        if self._path is not None:
            return identity_of(self._path)
        # A fingerprint may be that of the program that made the data, which has read others since.
        files = [identity_of(Path(file["filename"])) for file in self._data.cache_files]
        return "\n".join([self.name, self._data._fingerprint, *files])

    @cached_property
    def _data(self) -> Dataset:
        try:
            return self._load()
        except UserError:
            raise
        except Exception as error:  # of datasets, the hub's client, Arrow, the disk
            raise _not_loaded(self.name, error) from error

    def __len__(self) -> int:
        return len(self._data)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        stop = min(stop, len(self))
        for first in range(start, stop, _BATCH):
            try:
                batch: Any = self._data[first : min(first + _BATCH, stop)]
            except Exception as error:
                raise _not_loaded(f"{self.name}: row {first}", error) from error
            for index, values in enumerate(zip(*batch.values(), strict=True), first):
                row = dict(zip(batch, values, strict=True))
                yield f"{self.name}: row {index}", without_nested_nulls(row)


def without_nested_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the keys that Arrow has added to its objects.

    Arrow gives all objects of a column the same keys: of a message without ``tool_calls`` these are
    null, and a chat template would write them.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _load_file(builder: str, path: str) -> Dataset:
    from datasets import load_dataset

    return load_dataset(builder, data_files=[glob.escape(path)], split="train")


def _load_saved(path: str) -> Dataset:
    from datasets import Dataset

    return Dataset.load_from_disk(path)


def _load_split(name: str, config: str | None, split: str) -> Dataset:
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_dataset

    path = Path(name)
    if path.is_file():
        raise UserError(f"{name} is a file; give it as --train_file")
    if (path / _SAVED).is_file():
        raise UserError(f"{name} is one data set that save_to_disk wrote; give it as --train_file")
    if not (path / _SAVED_SPLITS).is_file():
        return load_dataset(name, config, split=split)
    saved = DatasetDict.load_from_disk(name)
    sizes = {key: len(data) for key, data in saved.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    chosen: list[Dataset] = [saved[p.splitname].select(range(p.from_, p.to)) for p in parts]
    return concatenate_datasets(chosen)


def _not_loaded(name: str, error: Exception) -> UserError:
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__  # datasets says that it failed, and that why
    said = on_one_line(str(error)) or type(error).__name__
    return UserError(f"{name}: cannot be read: {said}")
