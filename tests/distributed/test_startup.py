"""DeepSpeed's start waits for a compilation in progress, and not for one that was killed."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from addax_ds import UserError
from addax_ds.distributed import startup
from addax_ds.distributed.startup import wait_for_compilation


@pytest.fixture
def lock(tmp_path) -> Path:
    path = tmp_path / "lock"
    path.touch()
    return path


def make_old(lock: Path) -> None:
    os.utime(lock, (0, 0))


@contextmanager
def released_later(lock: Path) -> Iterator[threading.Event]:
    """Remove a lock after a while, as a compilation does when it is over."""
    released = threading.Event()

    def release() -> None:
        released.set()
        lock.unlink()

    timer = threading.Timer(0.5, release)
    timer.start()
    try:
        yield released
    finally:
        timer.join()


def test_no_lock_is_not_waited_for(tmp_path):
    wait_for_compilation(tmp_path / "no-folder" / "lock")


def test_a_compilation_is_waited_for(lock):
    with released_later(lock) as released:
        wait_for_compilation(lock)
        assert released.is_set()


def test_a_long_one_is_waited_for_while_its_process_lives(lock):
    make_old(lock)
    with lock.open(), released_later(lock) as released:
        wait_for_compilation(lock)
        assert released.is_set()


def test_a_killed_one_is_an_error(lock):
    make_old(lock)
    with pytest.raises(UserError, match=f"^{lock} says .* was killed. Delete the file"):
        wait_for_compilation(lock)
    assert lock.exists()


def test_one_that_ends_as_it_is_looked_at_is_no_error(lock, monkeypatch):
    make_old(lock)

    def ends(path: Path) -> bool:
        path.unlink()
        return False

    monkeypatch.setattr(startup, "_is_open", ends)
    wait_for_compilation(lock)
