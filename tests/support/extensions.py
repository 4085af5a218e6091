"""A folder of the suite's own for the operators that DeepSpeed compiles.

A compilation that is killed leaves torch's lock behind, and whoever compiles there next waits for
ever. So each session compiles in a new folder, which begins with the finished builds of earlier
sessions.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from subprocess import DEVNULL

_ROOT = Path(__file__).parents[2]
STORE = _ROOT / ".pytest_cache" / "torch_extensions" / f"{version('torch')}-{version('deepspeed')}"
"""Finished builds; nothing is ever compiled here."""


def is_worker() -> bool:
    """Whether another process, which spreads the tests over several, has begun the session."""
    return "PYTEST_XDIST_WORKER" in os.environ


def of_session() -> str:
    """Return the folder for ``TORCH_EXTENSIONS_DIR``, made unless this is one of many workers."""
    return os.environ["TORCH_EXTENSIONS_DIR"] if is_worker() else str(begin())


def begin(store: Path = STORE) -> Path:
    """Make the folder of a session."""
    folder = Path(tempfile.mkdtemp(prefix="addax-extensions-"))
    for build in _finished(store):
        shutil.copytree(build, folder / build.name)  # with times, by which ninja finds it done
    return folder


def compile_ahead(folder: Path) -> None:
    """Begin to compile DeepSpeed's collectives, for which ranks would wait; it takes a minute."""
    if not _finished(folder):
        code = "from addax_ds.distributed.startup import _compile_collectives as f; f()"
        subprocess.Popen([sys.executable, "-c", code], stdout=DEVNULL, stderr=DEVNULL)


def end(folder: Path, store: Path = STORE) -> None:
    """Store what the session has compiled, and remove its folder."""
    store.mkdir(parents=True, exist_ok=True)
    for build in _finished(folder):
        copy = Path(tempfile.mkdtemp(dir=store, prefix=".")) / build.name
        shutil.copytree(build, copy)
        with suppress(OSError):  # it is there already
            copy.rename(store / build.name)
        shutil.rmtree(copy.parent)
    shutil.rmtree(folder, ignore_errors=True)  # temporary folders are cleared by others, too


def _finished(folder: Path) -> list[Path]:
    builds = [path.parent for path in folder.glob("[!.]*/*.so")]
    return [build for build in builds if not (build / "lock").exists()]
