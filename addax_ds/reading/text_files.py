"""Rows of JSON and CSV files, plain or gzip'd, read by their place in the file.

`datasets` reads these formats, too, but gives other rows: a null for a missing key, one type for
all values of a column, and nothing for "NA" in a CSV file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json
from addax_ds.utils.messages import on_one_line, shown

_UTF8_BOM = b"\xef\xbb\xbf"
_LONGEST_ROW = 64 << 20  # bytes: one object without line ends, or no text at all, fills the memory
_CHUNK = 16 << 20  # bytes of a read that looks for line ends
_UNREADABLE = (OSError, EOFError, zlib.error)  # the last two of damaged gzip files
_SPACE = re.compile(r"[ \t\r\n]*")

# The gzip'd file that this process has read from last: to seek forward in it costs less than to
# start again. By process, as one that is forked would move the place at which its parent reads.
_idle: dict[tuple[int, str], BinaryIO] = {}


@dataclass(frozen=True)
class _Index:
    """Where the rows of a file are.

    Attributes:
        spans: int64, shape [rows, 2]: first byte of a row, and the one after its last.
        numbers: int64, shape [rows]: number of a row, or of its line, for messages.
        header: names of the columns, of a file that names them once.
    """

    spans: NDArray[np.int64]
    numbers: NDArray[np.int64]
    header: tuple[str, ...] = ()

    @classmethod
    def of(cls, spans: list[tuple[int, int]], numbers: list[int], *header: str) -> _Index:
        shaped = np.array(spans, np.int64).reshape(-1, 2)
        return cls(shaped, np.array(numbers, np.int64), header)


class TextRows(ABC):
    """Rows of one file (`addax_ds.reading.sources.Rows`), which is scanned when it is first asked.

    Args:
        path: of the file; one that ends in ``.gz`` is gzip'd.

    Attributes:
        name: the path.
        identity: its real path, its size in bytes, and its time of change in nanoseconds.

    Raises:
        UserError: there is no such regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        open_regular(path).close()
        self.identity = identity_of(path)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._index.numbers)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (origin, columns) of the rows from ``start`` to before ``stop``.

        Raises:
            UserError: the file or a row cannot be read; the message names both.
        """
        index = self._index
        with self._open() as file:
            for row in range(start, min(stop, len(self))):
                origin = self._origin(int(index.numbers[row]))
                yield origin, self._parse(self._content(file, index.spans[row], origin), origin)

    @cached_property
    def _index(self) -> _Index:
        with self._open() as file:
            return self._scan(file)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        if self._path.suffix.lower() != ".gz":
            with open_regular(self._path) as plain:
                yield plain
            return
        key = os.getpid(), self.identity
        file = _idle.pop(key, None) or _unzipped(open_regular(self._path))
        yield file
        _idle.clear()  # a process has few files open, and reads them one after the other
        _idle[key] = file

    def _content(self, file: BinaryIO, span: NDArray[np.int64], origin: str) -> bytes:
        start, stop = span.tolist()
        if stop - start > _LONGEST_ROW:
            raise _too_long(origin)
        try:
            file.seek(start)
            return _bare(file.read(stop - start), start)
        except _UNREADABLE as error:
            raise _unreadable(origin, error) from error

    def _origin(self, number: int) -> str:
        return f"{self.name}:{number}"

    @abstractmethod
    def _scan(self, file: BinaryIO) -> _Index:
        """Find the rows of the file, from its beginning."""

    @abstractmethod
    def _parse(self, content: bytes, origin: str) -> dict[str, Any]:
        """Return the columns of a row."""


class _JsonRows(TextRows):
    """Rows that are JSON objects."""

    def _parse(self, content: bytes, origin: str) -> dict[str, Any]:
        return _object(content, origin)


class JsonLines(_JsonRows):
    """Rows of a JSON Lines file: UTF-8, one object of at most 64 MiB a line; blank lines are none.

    An origin is ``path:line``.
    """

    def _scan(self, file: BinaryIO) -> _Index:
        edges, doubtful = self._edges(file)
        spans = np.stack([edges[:-1], edges[1:]], axis=1)
        kept = np.ones(len(spans), np.bool_)
        for line in np.searchsorted(edges, doubtful).tolist():
            start, stop = spans[line].tolist()
            file.seek(start)
            kept[line] = bool(_bare(file.read(min(stop - start, _LONGEST_ROW)), start).strip())
        return _Index(spans[kept], np.flatnonzero(kept) + 1)

    def _edges(self, file: BinaryIO) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where lines begin, and the end of the file; and where those that may be blank."""
        ends, doubtful = [np.zeros(1, np.int64)], [np.zeros(0, np.int64)]
        size, lines, unfinished = 0, 0, False
        file.seek(0)
        while chunk := self._chunk(file, lines + 1):
            data = np.frombuffer(chunk, np.uint8)
            found = np.flatnonzero(data == ord("\n")) + 1
            starts = np.concatenate([[] if unfinished else [0], found]).astype(np.int64)
            starts = starts[starts < len(data)]
            # Only of these a first byte says that there is something: space, and the BOM's.
            doubtful.append(starts[np.isin(data[starts], list(b" \t\r\n\v\f\xef"))] + size)
            ends.append(found + size)
            size, lines = size + len(data), lines + len(found)
            unfinished = not chunk.endswith(b"\n")
        ends.append(np.full(int(unfinished), size, np.int64))
        return np.concatenate(ends), np.concatenate(doubtful)

    def _chunk(self, file: BinaryIO, line: int) -> bytes:
        try:
            return file.read(_CHUNK)
        except _UNREADABLE as error:
            raise _unreadable(self._origin(line), error) from error


class JsonArray(_JsonRows):
    """Rows of a JSON file that is one array of objects.

    An origin is ``path: row i``, counted from 0. The file is parsed as a whole when it is scanned.
    """

    def _origin(self, number: int) -> str:
        return f"{self.name}: row {number}"

    def _scan(self, file: BinaryIO) -> _Index:
        text = self._text(file)
        decoder = json.JSONDecoder()
        spans: list[tuple[int, int]] = []
        offset, position = 0, 0  # in bytes, in characters

        def skip(end: int) -> None:
            nonlocal offset, position
            offset, position = offset + len(text[position:end].encode()), end

        def skip_space() -> str:
            skip(_SPACE.match(text, position).end())  # type: ignore[union-attr]
            return text[position : position + 1]

        skip(text.index("[") + 1)
        following = skip_space()
        try:
            while following != "]":
                start = offset
                skip(decoder.raw_decode(text, position)[1])
                spans.append((start, offset))
                following = skip_space()
                if following == ",":
                    skip(position + 1)
                    following = skip_space()
                    problem = "Expecting value" if following == "]" else ""
                else:
                    problem = "" if following == "]" else "Expecting ',' or ']'"
                if problem:
                    raise json.JSONDecodeError(problem, text, position)
            skip(position + 1)
            if skip_space():
                raise json.JSONDecodeError("Extra data", text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.name}:{error.lineno}: not valid JSON (column {error.colno}: {error.msg}); "
                "expected one array of objects"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._origin(len(spans))}: not valid JSON ({error})") from None
        return _Index.of(spans, list(range(len(spans))))

    def _text(self, file: BinaryIO) -> str:
        try:
            file.seek(0)
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}: not UTF-8 (byte {error.start + 1})") from None
        except _UNREADABLE as error:
            raise _unreadable(self.name, error) from error


class Table(TextRows):
    """Rows of a CSV file (UTF-8, RFC 4180), whose first row names the columns. All are strings.

    An origin is ``path:line``, with the line in which the row begins.

    Args:
        path: see `TextRows`.
        delimiter: between columns.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self._delimiter = delimiter

    def _scan(self, file: BinaryIO) -> _Index:
        file.seek(0)
        lines = _Lines(file, self.name)
        spans: list[tuple[int, int]] = []
        numbers: list[int] = []
        header: list[str] = []
        reader = self._reader(lines)
        while True:
            start, number = lines.offset, lines.number + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{self._origin(number)}: not valid CSV ({error})") from None
            if fields is None:
                return _Index.of(spans, numbers, *header)
            if not fields:
                continue
            if not header:
                header = self._checked(fields, self._origin(number))
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{self._origin(number)}: {len(fields)} fields, and the first row names "
                    f"{len(header)} columns"
                )
            spans.append((start, lines.offset))
            numbers.append(number)

    def _checked(self, header: list[str], origin: str) -> list[str]:
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(f"{origin}: the column {shown(twice[0])!r} is named twice")
        return header

    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        csv.field_size_limit(_LONGEST_ROW)  # of the process; else fields end at 128 KiB
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _parse(self, content: bytes, origin: str) -> dict[str, Any]:
        (fields,) = self._reader(io.StringIO(content.decode("utf-8"), newline=""))
        return dict(zip(self._index.header, fields, strict=True))


class _Lines:
    """Lines of a file as text, with what has been read: their number, and their bytes."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.number, self.offset = 0, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        origin = f"{self._name}:{self.number + 1}"
        try:
            line = self._file.readline(_LONGEST_ROW + 1)
            if not line:
                raise StopIteration
            if len(line) > _LONGEST_ROW:
                raise _too_long(origin)
            start = self.offset
            self.number, self.offset = self.number + 1, start + len(line)
            return _bare(line, start).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{origin}: not UTF-8 (byte {error.start + 1} of the line)") from None
        except _UNREADABLE as error:
            raise _unreadable(origin, error) from error


def identity_of(path: Path) -> str:
    """Return a file's real path, size in bytes, and time of change in nanoseconds."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def begins_with(path: Path) -> bytes:
    """Return the first byte of a file that is not space, nor of a BOM; none of an empty file."""
    with open_regular(path) as plain:
        file = _unzipped(plain) if path.suffix.lower() == ".gz" else plain
        try:
            return _bare(file.read(4096), 0).lstrip()[:1]
        except _UNREADABLE as error:
            raise _unreadable(f"{path}:1", error) from error


def _bare(content: bytes, start: int) -> bytes:
    """Return what begins at a byte of a file, without a byte-order mark at the first one."""
    return content.removeprefix(_UTF8_BOM) if start == 0 else content


def _object(content: bytes, origin: str) -> dict[str, Any]:
    """Return the JSON object of one row."""
    expected = "expected one object a line"
    try:
        row = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{origin}: not valid JSON (column {error.colno}: {error.msg}); {expected}"
        ) from None
    except ValueError as error:
        raise UserError(f"{origin}: not valid JSON ({error}); {expected}") from None
    if not isinstance(row, dict):
        raise UserError(f"{origin}: expected a JSON object, got a {type(row).__name__}")
    return row


def _unzipped(file: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]


def _too_long(origin: str) -> UserError:
    return UserError(
        f"{origin}: longer than {_LONGEST_ROW >> 20} MiB; expected one row a line, or one array"
    )


def _unreadable(origin: str, error: Exception) -> UserError:
    said = getattr(error, "strerror", None) or on_one_line(str(error))
    return UserError(f"{origin}: the file cannot be read: {said}")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; opening a pipe would wait for a writer.

    Raises:
        UserError: it is none, or cannot be opened.
    """
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
    raise UserError(f"{path}: is {kind}; expected a file of rows")
