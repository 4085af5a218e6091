"""DeepSpeed's start waits for a compilation in progress; one that was killed holds nobody up."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from addax_ds import UserError
from addax_ds.distributed import startup
from addax_ds.distributed.startup import compiling_alone


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
    with compiling_alone(tmp_path / "lock"):
        pass


def test_a_compilation_is_waited_for(lock):
    with released_later(lock) as released, compiling_alone(lock):
        assert released.is_set()


def test_a_long_one_is_waited_for_while_its_process_lives(lock):
    make_old(lock)
    with lock.open(), released_later(lock) as released, compiling_alone(lock):
        assert released.is_set()


def test_the_lock_of_a_killed_one_is_removed(lock, caplog):
    make_old(lock)
    with caplog.at_level(logging.WARNING, "addax_ds"), compiling_alone(lock):
        assert not lock.exists()
    assert f"Removing {lock}: no process here has it open" in caplog.text


def test_one_that_ends_as_it_is_looked_at_is_not_taken_over(lock, monkeypatch, caplog):
    make_old(lock)

    def ends(path: Path) -> bool:
        path.unlink()
        return False

    monkeypatch.setattr(startup, "_is_open", ends)
    with caplog.at_level(logging.WARNING, "addax_ds"), compiling_alone(lock):
        pass
    assert not caplog.text


class Hidden:
    """A process whose files may not be listed."""

    def __init__(self, user: int, pid: int = 2) -> None:
        self._user, self.pid = user, pid

    def open_files(self) -> list[Any]:
        raise psutil.AccessDenied(1)

    def uids(self) -> SimpleNamespace:
        return SimpleNamespace(effective=self._user)


def test_one_that_may_be_open_is_left_to_the_user(lock, monkeypatch):
    make_old(lock)
    monkeypatch.setattr(psutil, "process_iter", lambda: [Hidden(lock.stat().st_uid)])
    with (
        pytest.raises(UserError, match=r"s old, and no process .* Delete the file, unless"),
        compiling_alone(lock),
    ):
        pass
    assert lock.exists()


def test_init_and_processes_of_other_users_do_not_matter(lock, monkeypatch):
    make_old(lock)
    owner = lock.stat().st_uid
    monkeypatch.setattr(psutil, "process_iter", lambda: [Hidden(owner + 1), Hidden(owner, pid=1)])
    with compiling_alone(lock):
        assert not lock.exists()


def test_a_kernel_without_locks_is_named(lock, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked .*TORCH_EXTENSIONS_DIR"):  # noqa: SIM117
        with compiling_alone(lock):
            pytest.fail("others may compile, too")


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen[str]]:
    """Another process that compiles alone."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "addax_ds.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_one_process_at_a_time_compiles(lock, holder):
    """Even where the other has not made torch's file yet; killed, it holds nobody up."""
    make_old(lock)
    entered = threading.Event()

    def compile_alone() -> None:
        with compiling_alone(lock):
            entered.set()

    thread = threading.Thread(target=compile_alone)
    thread.start()
    assert not entered.wait(0.7)
    assert lock.exists()
    holder.kill()
    thread.join(60)
    assert entered.is_set()
    assert not lock.exists()


def test_two_processes_compile_one_after_the_other(tmp_path):
    began, ended = threading.Barrier(2), []

    def compile_alone() -> None:
        began.wait()
        with compiling_alone(tmp_path / "lock"):
            # torch takes its lock by O_EXCL: it would wait for ever if another one were here.
            (tmp_path / "lock").touch(exist_ok=False)
            time.sleep(0.2)
            (tmp_path / "lock").unlink()
        ended.append(True)

    threads = [threading.Thread(target=compile_alone) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == [True, True]


@pytest.mark.parametrize("variable", ["HOME", "TORCH_EXTENSIONS_DIR"])
def test_a_folder_for_builds_that_cannot_be_made_is_an_error(variable, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.raises(UserError, match=rf"compiled: .*{tmp_path}/file.* Set TORCH_EXTENSIONS_DIR"):
        startup.init_deepspeed()


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def acquire(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(startup.FileLock, "acquire", acquire)
    with (
        pytest.raises(UserError, match=r"addax_ds.lock cannot be locked \(no locks here\): set"),
        compiling_alone(tmp_path / "lock"),
    ):
        pass
