"""Rows of JSON and CSV files, read by their place in the file.

`datasets` reads these formats, too, but gives other rows: it makes a null of a missing key, one
type of the values of a column, and of "NA" in a CSV file nothing.
"""

from __future__ import annotations

import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json
from addax_ds.utils.messages import shown

_UTF8_BOM = b"\xef\xbb\xbf"
_LONGEST_ROW = 64 << 20  # bytes: one object without line ends, or no text at all, fills the memory
_CHUNK = 16 << 20  # bytes of a read that looks for line ends


@dataclass(frozen=True)
class _Index:
    """Where the rows of a file are.

    Attributes:
        spans: int64, shape [rows, 2]: first byte of a row, and the one after its last.
        numbers: int64, shape [rows]: number of a row, or of its line, for messages.
    """

    spans: NDArray[np.int64]
    numbers: NDArray[np.int64]


class TextRows(ABC):
    """Rows of one file (`addax_ds.data.sources.Rows`), which is scanned when it is first asked.

    Args:
        path: of the file.

    Attributes:
        name: the path.
        identity: its real path, its size in bytes, and its time of change in nanoseconds.

    Raises:
        UserError: there is no such regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        with _open(path) as file:
            status = os.fstat(file.fileno())
        self.identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._index.numbers)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (origin, columns) of the rows from ``start`` to before ``stop``.

        Raises:
            UserError: the file or a row cannot be read; the message names both.
        """
        index, origin = self._index, self.name
        with _open(self._path) as file:
            for row in range(start, min(stop, len(self))):
                first, end = index.spans[row].tolist()
                origin = self._origin(int(index.numbers[row]))
                if end - first > _LONGEST_ROW:
                    raise UserError(
                        f"{origin}: the line is longer than {_LONGEST_ROW >> 20} MiB; expected one "
                        "object a line"
                    )
                try:
                    file.seek(first)
                    content = file.read(end - first)
                except OSError as error:
                    raise _unreadable(origin, error) from error
                yield origin, self._parse(content, origin)

    @cached_property
    def _index(self) -> _Index:
        with _open(self._path) as file:
            return self._scan(file)

    def _origin(self, number: int) -> str:
        return f"{self.name}:{number}"

    @abstractmethod
    def _scan(self, file: BinaryIO) -> _Index:
        """Find the rows of the file."""

    @abstractmethod
    def _parse(self, content: bytes, origin: str) -> dict[str, Any]:
        """Return the columns of a row."""


class JsonLines(TextRows):
    """Rows of a JSON Lines file: UTF-8, one object of at most 64 MiB a line; blank lines are none.

    An origin is ``path:line``.
    """

    def _scan(self, file: BinaryIO) -> _Index:
        ends, blank = [], []
        size, lines, at_start = 0, 0, True
        while chunk := self._chunk(file, lines):
            data = np.frombuffer(chunk, np.uint8)
            found = np.flatnonzero(data == ord("\n"))
            starts = np.append([0] if at_start else [], found + 1).astype(np.int64)
            starts = starts[starts < len(data)]
            ends.append(found + size + 1)
            blank.append(starts[np.isin(data[starts], list(b" \t\r\n\v\f\xef"))] + size)
            size += len(data)
            lines += len(found)
            at_start = chunk.endswith(b"\n")
        edges = np.concatenate([[0], *ends, [] if at_start else [size]]).astype(np.int64)
        spans = np.stack([edges[:-1], edges[1:]], axis=1)
        kept = np.ones(len(spans), np.bool_)
        for line in np.searchsorted(edges, np.concatenate([[], *blank])).tolist():
            kept[line] = not self._is_blank(file, *spans[line].tolist())
        return _Index(spans[kept], np.flatnonzero(kept) + 1)

    def _chunk(self, file: BinaryIO, lines: int) -> bytes:
        try:
            return file.read(_CHUNK)
        except OSError as error:
            raise _unreadable(self._origin(lines + 1), error) from error

    def _is_blank(self, file: BinaryIO, start: int, stop: int) -> bool:
        file.seek(start)
        content = file.read(min(stop - start, _LONGEST_ROW))
        return not (content.removeprefix(_UTF8_BOM) if start == 0 else content).strip()

    def _parse(self, content: bytes, origin: str) -> dict[str, Any]:
        if origin == self._origin(1):
            content = content.removeprefix(_UTF8_BOM)
        try:
            row = parse_json(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{origin}: not UTF-8 (byte {error.start + 1} of the line)") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{origin}: not valid JSON (column {error.colno}: {error.msg}); expected one "
                "object a line"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{origin}: not valid JSON ({error}); expected one object a line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{origin}: expected a JSON object, got a {type(row).__name__}")
        return row


def _unreadable(origin: str, error: OSError) -> UserError:
    return UserError(f"{origin}: the file cannot be read: {error.strerror}")


def _open(path: Path) -> BinaryIO:
    """Open a regular file; opening a pipe would wait for a writer."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{shown(str(path))}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a null byte or half a surrogate pair
        raise UserError(f"{shown(str(path))}: is no name of a file: {error}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
    raise UserError(f"{path}: is {kind}; expected a JSON Lines file")
