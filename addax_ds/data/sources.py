"""Where rows come from: files and data sets, by what the arguments name.

`open_rows` returns `Rows`, of which `addax_ds.data.records` makes text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from addax_ds.data.text_files import JsonLines


class Rows(Protocol):
    """Rows of one source, in a fixed order.

    An instance can be pickled, and is cheap to open in another process. One that has been asked
    for its length does not scan its files again there.

    Attributes:
        name: what to call the rows in messages: "train.jsonl", "imdb, train[:1000]".
        identity: equal for equal rows, without reading them: real path, size and time of change
            of each file, or the fingerprint of a data set.
    """

    name: str
    identity: str

    def __len__(self) -> int:
        """Return the number of rows; files may be scanned for it, once."""
        ...

    def read(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (origin, columns) of the rows from ``start`` to before ``stop``, in order.

        Raises:
            UserError: a row cannot be read; the message names its file, and its line or number.
        """
        ...


def open_rows(files: Sequence[str]) -> Rows:
    """Return the rows of files.

    Args:
        files: paths.

    Raises:
        UserError: there is no such file.
    """
    (file,) = files
    return JsonLines(Path(file))
