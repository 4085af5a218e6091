"""Files of the user's, and the folder of the cache."""

import os
import stat
from pathlib import Path


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
