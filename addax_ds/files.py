"""Reading configuration files of a user's."""

import stat
from pathlib import Path


def read_regular(path: Path, encoding: str) -> str:
    """Read a text file.

    Raises:
        OSError: it cannot be read, or is not a regular file (a pipe would wait for a writer).
        ValueError: it is not text, or the path is no name of a file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is not a regular file")
    return path.read_text(encoding=encoding)
