"""Whether the packages that carry the demo's model and data are installed."""

import importlib.metadata


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
