"""Versions of this package and of what it computes with."""

import platform
from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of this package and of what it computes with, without importing it."""
    libraries = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    return {"addax_ds": __version__, **libraries, "python": platform.python_version()}
