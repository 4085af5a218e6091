"""Folders that appear complete or not at all, and whose damage shows.

A folder is written beside its place, in ``_unfinished/``, sealed with the SHA-256 of each of its
files, flushed to the disk, and then renamed. What a run that died has left is still in
``_unfinished``, which is emptied when the next folder is begun. A seal is a file for ``sha256sum
-c``::

    # 1234 bytes
    <SHA-256 of the file>  model.safetensors
    ...
    # SHA-256 of the lines above: ...

Lengths find what was cut off before anything is hashed; the last line tells a whole list from one
that ends early.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from addax_ds.distributed.collectives import all_gather_object, get_rank, raise_on_all_ranks
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import sha256_of

SEAL = "SHA256SUMS"
UNFINISHED = "_unfinished"  # ``push_to_hub`` leaves out what begins so

_REPLACED = ".replaced"

_ENTRY = re.compile(r"# (\d+) bytes\n([0-9a-f]{64})  ([^\n]+)\n")
_END = "# SHA-256 of the lines above: {}\n"


class DamagedError(UserError):
    """A sealed folder is not what it was."""


# ---- writing -----------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `UserError` with the path that could not be written, whatever library failed.

    Raises:
        UserError: with the path and the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A full disk is an OSError, torch's RuntimeError, or the plain Exception of tokenizers.
        if isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception:
            raise UserError(f"{path}: cannot be written: {error}") from error
        raise


@contextmanager
def atomic_folder(folder: Path, writers: Sequence[int]) -> Iterator[Path]:
    """Yield an empty folder to write to; once the body is done on all ranks, it is ``folder``.

    Every rank has to enter, and local errors of the body have to reach all ranks
    (`raise_on_all_ranks`). A ``folder`` that exists is replaced when the new one is complete. If
    anything fails, on any rank, what was written is removed and ``folder`` is as it was.

    Args:
        folder: where to.
        writers: the ranks that have this rank's file system; the first one makes and renames the
            folder, and they share out the hashing. Ranks of other nodes name their own, or these
            if they write nothing.

    Raises:
        UserError: on all ranks, if one of them cannot write.
    """
    leads = get_rank() == writers[0]
    staging = folder.parent / UNFINISHED / folder.name
    try:
        with raise_on_all_ranks(), writing(staging):
            if leads:
                remove_unfinished(folder.parent)
        with raise_on_all_ranks(), writing(staging):
            if leads:
                _make(staging)
        yield staging
        _seal(staging, writers)
        with raise_on_all_ranks(), writing(folder):
            if leads:
                _move(staging, folder)
    finally:
        if leads:
            with contextlib.suppress(OSError):
                remove_unfinished(folder.parent)


def remove_unfinished(parent: Path) -> None:
    """Remove what a run that died while it wrote has left in ``parent``.

    A folder that was about to be replaced gets its name back.
    """
    unfinished = parent / UNFINISHED
    if not unfinished.exists():
        return
    for replaced in unfinished.glob(f"*{_REPLACED}"):
        folder = parent / replaced.name.removesuffix(_REPLACED)
        if not folder.exists():
            replaced.rename(folder)
    shutil.rmtree(unfinished)


def discard(folder: Path) -> None:
    """Remove a folder so that it disappears whole, even if this process dies meanwhile."""
    remove_unfinished(folder.parent)
    doomed = folder.parent / UNFINISHED / folder.name
    try:
        doomed.parent.mkdir()
        folder.rename(doomed)
    finally:
        remove_unfinished(folder.parent)


def _make(staging: Path) -> None:
    try:
        staging.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except FileExistsError as error:
        raise UserError(
            f"{staging}: another process writes there too. If nodes share this file system, leave "
            "out --save_on_each_node; if this is another run, give each its own --output_dir"
        ) from error


def _seal(folder: Path, writers: Sequence[int]) -> None:
    """Hash and flush all files; their writers share them out."""
    rank = get_rank()
    names: list[str] = []
    with raise_on_all_ranks(), writing(folder):
        if rank == writers[0]:
            names = _files(folder)
    names = all_gather_object(names)[writers[0]]
    lines: dict[str, str] = {}
    with raise_on_all_ranks(), writing(folder):
        if rank in writers:
            mine = names[writers.index(rank) :: len(writers)]
            lines = {name: _entry(folder, name) for name in mine}
    by_rank = all_gather_object(lines)
    with raise_on_all_ranks(), writing(folder / SEAL):
        if rank == writers[0]:
            found = {name: line for writer in writers for name, line in by_rank[writer].items()}
            body = "".join(found[name] for name in sorted(names))
            (folder / SEAL).write_text(body + _end(body), encoding="utf-8")
            _flush(folder / SEAL)
            for path in (folder, *folder.rglob("*")):
                if path.is_dir():
                    _flush(path)


def _files(folder: Path) -> list[str]:
    """Return the files by name, the largest first, so that every n-th is a fair share."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (-path.stat().st_size, path))
    return [path.relative_to(folder).as_posix() for path in files]


def _entry(folder: Path, name: str) -> str:
    path = folder / name
    _flush(path)
    return f"# {path.stat().st_size} bytes\n{sha256_of(path)}  {name}\n"


def _move(staging: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(staging.with_name(f"{staging.name}{_REPLACED}"))
    staging.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- verifying ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Entry of a seal for one file."""

    size: int
    sha256: str


def read_seal(folder: Path) -> dict[str, Entry]:
    """Return what the files of a sealed folder have to be, by name.

    Raises:
        DamagedError: if the seal is missing or is not as it was written.
    """
    try:
        text = (folder / SEAL).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DamagedError(
            f"{folder}: there is no {SEAL}: it was not written to the end, or by another program"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{folder / SEAL}: the file is damaged: {error}") from error
    body = text[: -len(_end(""))]
    entries = {name: Entry(int(size), sha256) for size, sha256, name in _ENTRY.findall(body)}
    if text != body + _end(body) or any(_leaves(name) for name in entries):
        raise DamagedError(f"{folder / SEAL}: the file is damaged: it is not as it was written")
    return entries


def verify(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Check the lengths of all files, and the checksums of every ``shares``-th from ``share`` on.

    Files that the seal does not name are not looked at.

    Raises:
        DamagedError: names the file and what is wrong with it.
    """
    entries = read_seal(folder)
    for name, entry in entries.items():
        with _reading(folder / name):
            size = (folder / name).stat().st_size
        if size != entry.size:
            what = "cut off" if size < entry.size else "too long"
            raise DamagedError(f"{folder / name}: the file is {what}: {size} of {entry.size} bytes")
    names = sorted(entries, key=lambda name: (-entries[name].size, name))
    for name in names[share::shares]:
        with _reading(folder / name):
            digest = sha256_of(folder / name)
        if digest != entries[name].sha256:
            raise DamagedError(f"{folder / name}: the file was altered: its checksum differs")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: the file is missing") from error
    except OSError as error:
        raise DamagedError(f"{path}: the file cannot be read: {error}") from error


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _end(body: str) -> str:
    return _END.format(hashlib.sha256(body.encode()).hexdigest())
