"""Where things that are made once a machine are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$ADDAX_CACHE``, or ``~/.cache/addax_ds``; the folder may not exist yet."""
    return Path(os.environ.get("ADDAX_CACHE") or "~/.cache/addax_ds").expanduser()
