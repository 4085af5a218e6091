"""Lets the operating system refuse, or the process die, at the n-th thing that changes a disk."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NEEDS_ROOM = ("open", "os.mkdir", "os.rename")
_REMOVES = ("os.remove", "os.rmdir")
_inject: Callable[[str], None] | None = None
_installed: list[Any] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _inject is None or event not in _NEEDS_ROOM + _REMOVES:
        return
    if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _inject(event)


@contextmanager
def fault(at: int, act: Callable[[], None]) -> Iterator[Callable[[], int]]:
    """Call ``act`` in place of the ``at``-th change, from 0 on; yields how many there have been.

    A change is an open for writing, mkdir, rename or fsync; for `die` also a removal, which no full
    disk refuses. Libraries that open files without Python are not seen.
    """
    global _inject
    if not _installed:
        sys.addaudithook(_audit)  # for good: hooks cannot be removed
        _installed.append(_audit)
    count = 0
    fsync = os.fsync

    def inject(event: str) -> None:
        nonlocal count
        if act is die or event not in _REMOVES:
            count += 1
            if count == at + 1:
                act()

    def counted_fsync(descriptor: int) -> None:
        inject("os.fsync")
        fsync(descriptor)

    os.fsync, _inject = counted_fsync, inject
    try:
        yield lambda: count
    finally:
        os.fsync, _inject = fsync, None


def disk_is_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os._exit(9)
