"""Models in a GGUF file: unpacked once into an ordinary bf16 model folder, which is cached."""

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
from addax_ds.utils.files import cache_folder, sha256_of
from addax_ds.utils.messages import shown

SUFFIX = ".gguf"

_RECIPE = 1  # Raise it when convert() writes something new: older caches are then ignored.

logger = logging.getLogger(__name__)


def unpacked(source: Path, label: str, cache_dir: str | Path | None = None) -> Path:
    """Return a folder that ``AutoModelForCausalLM.from_pretrained`` loads, made on first use.

    All ranks may call this at the same time: one converts, and holds the whole model meanwhile; the
    others wait.

    Args:
        source: the GGUF file.
        label: begins the folder's name.
        cache_dir: where the folder is kept; ``$ADDAX_CACHE`` or ``~/.cache/addax_ds`` by default.
            The folder's name holds a digest of the file and of the versions involved, so that a
            folder made from anything else is never returned.

    Raises:
        UserError: the package gguf is missing, the file cannot be converted, or the cache cannot be
            written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{source.name} needs the package gguf: pip install 'addax_ds[demo]'")
    cache = Path(cache_dir) if cache_dir else cache_folder()
    folder = cache / f"{label}-bf16-{_digest(source)}"
    if folder.is_dir():
        return folder
    logger.info("Unpacking %s, dequantised to bf16, into %s, once", source.name, folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                logger.debug("Process %d unpacks", os.getpid())
                _convert_in_subprocess(source, folder)
    except OSError as error:
        raise UserError(
            f"cannot unpack {source.name} into {cache} ({error}): set ADDAX_CACHE to a folder that "
            "can be written and has room for 2 bytes a weight"
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


def _digest(source: Path) -> str:
    """Hash everything that decides what the converted folder holds."""
    versions = (importlib.metadata.version(name) for name in ("transformers", "gguf"))
    parts = _RECIPE, *versions, sha256_of(source)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _convert_in_subprocess(source: Path, folder: Path) -> None:
    """Run ``convert`` in a process of its own and put the complete result in place at once.

    A process of its own, because in this one ZeRO-3 may be on for every model that Transformers
    makes, and because the unpacked copies would raise this rank's peak memory.
    """
    partial = Path(f"{folder}.partial")  # One name: whoever holds the lock owns it.
    shutil.rmtree(partial, ignore_errors=True)
    code = "import sys; from addax_ds.models.gguf import convert; convert(*sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(source.resolve()), str(partial.resolve())],
        cwd=Path(__file__).parents[2],  # With -c, the folder that addax_ds is imported from.
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        logger.debug("%s", result.stderr)
        reason = result.stderr.strip().splitlines()[-1:] or [f"status {result.returncode}"]
        raise UserError(f"{source} cannot be unpacked: {shown(reason[0], 300)}")
    os.replace(partial, folder)
