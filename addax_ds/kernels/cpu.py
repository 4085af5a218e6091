"""The kernels in C++: `cpu.cpp`, compiled for this machine at first use and loaded by ctypes.

The library is kept in ``$ADDAX_CACHE`` (default ``~/.cache/addax_ds``). Its name holds a digest of
all that it depends on: source, command, compiler version and processor features. Its last bytes are
a digest of the rest, so that a damaged file is built anew instead of loaded. The ranks of a node
wait for the first one to build. ``CXX`` names another compiler than ``g++``.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from addax_ds.kernels.operation import Draw, Operation, Slice, offsets
from addax_ds.utils.files import cache_folder

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")

# Fused multiply-add or reordering would change the bits of z: both are off, whatever a compiler's
# default is. -fschedule-insns interleaves independent chains of instructions.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-fast-math", "-ffp-contract=off"),
    *("-fno-math-errno", "-fschedule-insns", "-fopenmp", "-shared", "-fPIC"),
)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BUILD_SECONDS = 300.0
_DIGEST_BYTES = 32


def gaussian(out: Tensor, draw: Draw, start: int) -> None:
    """See `addax_ds.kernels.gaussian`."""
    load().addax_gaussian(
        *(out.data_ptr(), start, out.numel()),
        *(draw.seed, draw.step, draw.parameter_id, draw.probe),
        torch.get_num_threads(),
    )


def fused(
    slices: Sequence[Slice],
    operation: Operation,
    out: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    kept: Tensor | None = None,
) -> None:
    """See `addax_ds.kernels.fused`."""
    dtype, draw, directions = slices[0].data.dtype, operation.draw, len(operation.c2)
    load().addax_fused(
        b"".join([each.row for each in slices]),
        len(slices),
        *((None, None) if out is None else (out.data_ptr(), _int64(offsets(slices)))),
        None if gradients is None else _int64([each.data_ptr() for each in gradients]),
        None if kept is None else kept.data_ptr(),
        _TYPES[dtype],
        gradients is not None and gradients[0].dtype == dtype,
        operation.stochastic,
        *(operation.c0, operation.c1, (ctypes.c_float * directions)(*operation.c2), directions),
        operation.zo_eps,
        *(draw.seed, draw.step, draw.probe),
        torch.get_num_threads(),
    )


def _int64(numbers: list[int]) -> bytes:
    return array("q", numbers).tobytes()


@functools.cache
def load() -> ctypes.CDLL:
    """Return the library, built before if need be.

    Raises:
        OSError: there is no compiler, or the library cannot be kept or loaded.
        RuntimeError: the compiler failed.
        subprocess.TimeoutExpired: the compiler hangs.
    """
    return open_library(_built())


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library made from `SOURCE`."""
    library = ctypes.CDLL(str(path))
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    u32, u64, f32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_float
    library.addax_gaussian.argtypes = [pointer, i64, i64, u64, u32, u32, u32, i32]
    library.addax_gaussian.restype = None
    library.addax_fused.argtypes = [
        *(ctypes.c_char_p, i64, pointer, ctypes.c_char_p, ctypes.c_char_p, pointer),
        *(i32, i32, i32),
        *(f32, f32, ctypes.POINTER(f32), i32, f32),
        *(u64, u32, u32),
        i32,
    ]
    library.addax_fused.restype = None
    return library


def _command() -> list[str]:
    return [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]


def _built() -> Path:
    """Return the path of the library, which is whole, building it if it is missing or damaged."""
    cache = cache_folder()
    path = cache / f"kernels-{_key(_command())}.so"
    if not _is_whole(path):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=_BUILD_SECONDS):
            if not _is_whole(path):
                logger.info("Compiling the CPU kernels into %s, once", path)
                _build(_command(), path)
    return path


def _build(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        result = Path(folder) / path.name
        _run([*command, str(SOURCE), "-o", str(result)])
        digest = hashlib.sha256(result.read_bytes()).digest()
        with result.open("ab") as file:
            file.write(digest)  # bytes after the end of an ELF image are ignored
        os.replace(result, path)


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _key(command: list[str]) -> str:
    """Digest of all that the library depends on."""
    parts = (SOURCE.read_text(), shlex.join(command), compiler_version(), _processor_features())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def compiler_version() -> str:
    """Version text of the compiler."""
    return _run([_command()[0], "--version"])


def _processor_features() -> str:
    """CPU flags (x86) or features (Arm), which determine ``-march=native``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = {line.split(":")[0].strip(): line for line in reversed(lines)}
    names = ("model name", "CPU part", "flags", "Features")
    return "\n".join([platform.machine(), *(first[name] for name in names if name in first)])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_BUILD_SECONDS
    )
    if done.returncode != 0:
        raise RuntimeError(f"`{shlex.join(command)}` failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
