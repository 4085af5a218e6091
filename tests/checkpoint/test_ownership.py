"""Whose an output folder is: one run's at a time, and its checkpoints one run's for good."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from addax_ds import UserError
from addax_ds.checkpoint import atomic, folders, ownership
from addax_ds.checkpoint.state import STATE_NAME

OWN, OTHER = "0" * 32, "f" * 32


def alone(output_dir: Path, **more: Any) -> SimpleNamespace:
    values = {"output_dir": str(output_dir), "should_save": True, "save_on_each_node": False}
    return SimpleNamespace(**{**values, **more})


@pytest.fixture
def locked(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with the lock of another process, which need not be another one for the kernel."""
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.1)
    file = os.open(tmp_path / ownership.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    yield tmp_path
    os.close(file)


def write(root: Path, ids: dict[int, str | None]) -> Path:
    for step, run_id in ids.items():
        folder = folders.path_of(root, step)
        folder.mkdir(parents=True)
        if run_id is not None:
            folders.write_run_id(folder, run_id)
    return root


# ---- the lock ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each_node", "remedy"), [(False, "Wait until"), (True, "leave out --sav")]
)
def test_a_second_run_is_told_that_there_is_a_first(locked, each_node, remedy):
    (locked / "of the first").touch()
    (locked / atomic.UNFINISHED / "checkpoint-3").mkdir(parents=True)
    with (
        pytest.raises(UserError, match=f"--output_dir {locked}: another run is at work") as error,
        ownership.held(alone(locked, save_on_each_node=each_node)),
    ):
        pytest.fail("the folder is another run's")
    assert remedy in str(error.value)
    left = {str(path.relative_to(locked)) for path in locked.rglob("*")}
    unfinished = {atomic.UNFINISHED, f"{atomic.UNFINISHED}/checkpoint-3"}
    assert left == {ownership.LOCK, "of the first", *unfinished}


HOLDER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_run_that_was_killed_a_moment_ago_is_waited_for(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ownership.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        killed = threading.Timer(0.3, first.kill)
        killed.start()
        with ownership.held(alone(tmp_path)):
            assert first.wait(10) == -signal.SIGKILL
        killed.join()


def test_a_lock_keeps_others_out_until_the_last_of_its_run_leaves(tmp_path):
    def is_free() -> bool:
        with (tmp_path / ownership.LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    args = alone(tmp_path)
    with ownership.held(args):
        with ownership.held(args):
            assert not is_free()
        assert not is_free()
    assert list(tmp_path.iterdir()) == []
    with ownership.held(args):
        assert not is_free()


def test_what_a_run_that_died_was_writing_is_removed_when_the_next_begins(tmp_path):
    folder = tmp_path / atomic.UNFINISHED / "checkpoint-12"
    folder.mkdir(parents=True)
    args = alone(tmp_path)
    with ownership.held(args):
        assert not folder.parent.exists()
        folder.mkdir(parents=True)  # its own
        with ownership.held(args):
            assert folder.exists()


def test_a_folder_without_output_goes_as_it_came(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("new", "there", "used"):
        with ownership.held(alone(tmp_path / name)):
            if name == "used":
                (tmp_path / name / "log").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "used", "log"}


def test_a_rank_that_writes_nothing_touches_nothing(tmp_path):
    with ownership.held(alone(tmp_path / "new", should_save=False)):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()]
)
def test_a_file_system_without_locks_is_warned_of(error, tmp_path, monkeypatch, caplog):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), ownership.held(alone(tmp_path / "new")):
        (tmp_path / "new" / "output").touch()
    assert f"{tmp_path / 'new' / ownership.LOCK} cannot be locked" in caplog.text
    assert "nothing keeps a second run out" in caplog.text
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"output"}


def test_a_kernel_without_locks_refuses_no_run(tmp_path, monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(ownership, "WAIT_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), ownership.held(alone(tmp_path / "new")):
        assert "cannot be locked" in caplog.text
    assert not (tmp_path / "new").exists(), "nothing has been written"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "output"
    with (
        pytest.raises(UserError, match=f"{folder}: cannot be written"),
        ownership.held(alone(folder)),
    ):
        pytest.fail("there is no folder")


# ---- the id ------------------------------------------------------------------------------------


def test_a_run_from_the_start_has_an_id_of_its_own(tmp_path):
    found = [ownership.claim(alone(tmp_path), None) for _ in range(2)]
    assert found[0] != found[1]
    write(tmp_path, {2: found[0]})
    assert folders.read_run_id(tmp_path / "checkpoint-2") == found[0]
    assert ownership.claim(alone(tmp_path), None, found[0]) == found[0]


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("run_id", [OTHER, None])
def test_a_run_from_the_start_leaves_a_used_folder_alone(run_id, resumable, tmp_path):
    write(tmp_path, dict.fromkeys((2, 4, 6, 8), run_id))
    (tmp_path / "checkpoint-6" / STATE_NAME).touch()
    if resumable:
        (tmp_path / "checkpoint-8" / STATE_NAME).touch()
    remedy = "go on from them with --resume_from_checkpoint True, or" if resumable else "or"
    with pytest.raises(UserError) as error:
        ownership.claim(alone(tmp_path), None)
    assert str(error.value) == (
        f"--output_dir {tmp_path}: it holds checkpoint-8, checkpoint-6, checkpoint-4 and 1 more of "
        "another run, which this one would replace or delete. Give this one its own --output_dir, "
        f"{remedy} remove them"
    )


@pytest.mark.parametrize(
    ("resumed", "there", "refused"),
    [
        (OWN, {2: OWN, 4: OWN}, []),
        (OWN, {2: OWN, 9: OTHER}, ["checkpoint-9"]),
        (OWN, {9: OTHER, 8: OWN, 7: OTHER}, ["checkpoint-9", "checkpoint-7"]),
        # Damaged: it may be this run's.
        (OWN, {2: OWN, 9: None}, []),
    ],
)
def test_a_run_that_goes_on_keeps_its_id_and_its_own_folder(resumed, there, refused, tmp_path):
    source = write(tmp_path / "source", {3: resumed}) / "checkpoint-3"
    output = write(tmp_path / "output", there)
    if refused:
        with pytest.raises(UserError, match=f"it holds {', '.join(refused)} of another run"):
            ownership.claim(alone(output), source)
    else:
        assert ownership.claim(alone(output), source) == resumed


@pytest.mark.parametrize("content", [b"", b"0" * 31, b"\xff" * 32, b"0" * 32 + b"\n" + b"0"])
def test_a_damaged_id_is_none(content, tmp_path):
    (tmp_path / folders.RUN_ID_NAME).write_bytes(content)
    assert folders.read_run_id(tmp_path) is None


def test_a_limit_counts_and_removes_own_checkpoints_alone(tmp_path):
    write(tmp_path, {1: OTHER, 2: OWN, 3: None, 4: OWN, 5: OTHER, 6: OWN, 7: None})
    folders.rotate(tmp_path, 6, 2, None, OWN)
    assert sorted(folders.steps(tmp_path)) == [1, 3, 4, 5, 6, 7]
