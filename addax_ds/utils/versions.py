"""Versions of this package and of what it computes with."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of this package and of what it computes with, without importing it.

    Libraries that are not installed are left out.
    """
    found = {"addax_ds": __version__}
    for name in ("torch", "deepspeed", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "python": platform.python_version()}
