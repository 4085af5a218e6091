"""Files that are read, files that appear complete, and the folder of the cache."""

import hashlib
import json
import os
import socket
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from addax_ds.utils.messages import shown

UNFINISHED = ".unfinished"
"""End of the name of a file that is being written."""


def cache_folder() -> Path:
    """Return ``$ADDAX_CACHE``, or ``~/.cache/addax_ds``; the folder may not exist yet."""
    return Path(os.environ.get("ADDAX_CACHE") or "~/.cache/addax_ds").expanduser()


def read_regular(path: Path, encoding: str) -> str:
    """Read a text file.

    Raises:
        OSError: it cannot be read, or is not a regular file (a pipe would wait for a writer).
        ValueError: it is not text, or the path is no name of a file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.read_text(encoding=encoding)


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that gets its name when the body is done, and is removed if that fails."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str) -> Any:
    """Parse strict JSON: no name twice in an object, no NaN and no Infinity.

    Raises:
        ValueError: the text is something else (`json.JSONDecodeError` knows the line and column),
            or is nested deeper than Python recurses.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def refuse_duplicates(names: Iterable[str]) -> None:
    """Raise `ValueError` that lists the names, at most 20, that come more than once."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        more = [f"and {len(twice) - 20} more"] if len(twice) > 20 else []
        raise ValueError(f"duplicate keys: {', '.join([*map(shown, twice[:20]), *more])}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        refuse_duplicates(name for name, _ in pairs)
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def expand_home(value: Any) -> Any:
    """Put the home folder in place of a ``~`` in a path, or in several.

    No shell has seen one in an argument file, or behind the ``=`` of a flag.
    """
    if isinstance(value, list):
        return [expand_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value
