"""Folders that appear whole: errors and deaths at every point, and damage to every byte."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from addax_ds import UserError
from addax_ds.checkpoint.atomic import (
    SEAL,
    UNFINISHED,
    DamagedError,
    atomic_folder,
    discard,
    read_seal,
    remove_unfinished,
    verify,
)
from tests.faults.disk import die, disk_is_full, fault

FILES = {
    "model.safetensors": b"weights" * 500,
    "config.json": b"{}",
    "sub/adapter.bin": b"\x00" * 9,
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    with atomic_folder(folder, [0]) as staging:
        assert not any(staging.iterdir())
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != SEAL}


def test_a_folder_appears_when_it_is_complete(tmp_path):
    folder = tmp_path / "new" / "checkpoint-4"
    with atomic_folder(folder, [0]) as staging:
        (staging / "file").write_text("content")
        assert not folder.exists()
    assert content(folder) == {"file": b"content"}
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-4"]


def test_the_seal_is_one_for_sha256sum(tmp_path):
    folder = write(tmp_path / "folder")

    def sha256sum() -> subprocess.CompletedProcess:
        command = ["sha256sum", "--check", "--strict", SEAL]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    result = sha256sum()
    assert result.returncode == 0
    assert result.stderr == ""
    assert sorted(result.stdout.splitlines()) == [f"{name}: OK" for name in sorted(FILES)]
    (folder / "config.json").write_bytes(b"[]")
    assert sha256sum().returncode != 0


def test_an_old_folder_is_replaced_as_a_whole(tmp_path):
    folder = write(tmp_path / "model", {"old.safetensors": b"old"})
    with atomic_folder(folder, [0]) as staging:
        (staging / "new.safetensors").write_bytes(b"new")
        assert content(folder) == {"old.safetensors": b"old"}
    assert content(folder) == {"new.safetensors": b"new"}
    assert not (tmp_path / UNFINISHED).exists()


def test_what_the_body_raises_is_raised_and_nothing_is_left(tmp_path):
    folder = write(tmp_path / "model", {"old": b"old"})
    with pytest.raises(TypeError), atomic_folder(folder, [0]) as staging:
        (staging / "half").write_text(b"not text")
    assert content(folder) == {"old": b"old"}
    assert not (tmp_path / UNFINISHED).exists()


def test_a_folder_takes_its_name_when_it_is_on_the_disk_and_keeps_it(tmp_path, monkeypatch):
    """A power cut after the rename finds all of it, and the name itself is flushed, too."""
    parent, events = tmp_path.resolve(), []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    write(parent / "folder")
    at = events.index("renamed")
    staging = parent / UNFINISHED / "folder"
    assert {staging, *(staging / name for name in (*FILES, "sub", SEAL))} <= set(events[:at])
    assert parent in events[at:]


# ---- errors and deaths -------------------------------------------------------------------------


def test_what_a_dead_run_has_left_is_removed(tmp_path):
    (tmp_path / UNFINISHED / "model.replaced").mkdir(parents=True)
    (tmp_path / UNFINISHED / "checkpoint-3").mkdir()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


OLD = pytest.mark.parametrize("old", [None, {"old": b"old"}], ids=["new", "replaced"])


@OLD
def test_a_full_disk_at_any_point_changes_nothing(old, tmp_path):
    found = []
    while True:
        output = tmp_path / str(len(found))
        if old is not None:
            write(output / "folder", old)
        with fault(len(found), disk_is_full) as count:
            try:
                write(output / "folder")
                error = ""
            except (UserError, OSError) as raised:
                error = str(raised)
        assert not (output / UNFINISHED).exists()
        if count() <= len(found):
            break
        assert not error or "No space left on device" in error
        found.append(intact(output / "folder"))
        assert found[-1] == FILES if not error else found[-1] in (old, FILES)
    assert found.count(old) > 10
    assert intact(output / "folder") == FILES


@OLD
@pytest.mark.slow
def test_death_at_any_point_leaves_the_old_or_the_new(old, tmp_path):
    found = []
    while True:
        output = tmp_path / str(len(found))
        if old is not None:
            write(output / "folder", old)
        if not dies(len(found), write, output / "folder"):
            break
        remove_unfinished(output)
        assert not (output / UNFINISHED).exists()
        found.append(intact(output / "folder"))
    turn = found.index(FILES)
    assert turn > 10
    assert found == [old] * turn + [FILES] * (len(found) - turn)


def test_a_folder_that_is_discarded_is_never_half_there(tmp_path):
    found = []
    while True:
        folder = write(tmp_path / f"checkpoint-{len(found)}")
        if not dies(len(found), discard, folder):
            break
        found.append(intact(folder))
    turn = found.index(None)
    assert found == [FILES] * turn + [None] * (len(found) - turn)
    assert len(found) - turn > len(FILES)
    assert not (tmp_path / UNFINISHED).exists()


def intact(folder: Path) -> dict[str, bytes] | None:
    """What is in a folder, which has to be complete if it exists."""
    if not folder.exists():
        return None
    verify(folder)
    return content(folder)


def dies(at: int, action: Callable[[Path], object], folder: Path) -> bool:
    """Act in a child that dies at a point; whether it has come so far."""
    child = os.fork()
    if child == 0:
        with fault(at, die):
            action(folder)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


# ---- damage ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "the file is cut off: {short} of {size} bytes"),
        (grow, "the file is too long: {long} of {size} bytes"),
        (flip, "the file was altered: its checksum differs"),
        (Path.unlink, "the file is missing"),
        (to_folder, "the file"),
    ],
)
def test_damage_to_a_file_is_named(damage: Callable, message, name, tmp_path):
    folder = write(tmp_path / "folder")
    verify(folder)
    damage(folder / name)
    size = len(FILES[name])
    with pytest.raises(DamagedError) as error:
        verify(folder)
    wanted = message.format(size=size, short=size - 1, long=size + 1)
    assert str(error.value).startswith(f"{folder / name}: {wanted}")


def test_damage_to_any_byte_of_the_seal_is_found(tmp_path):
    folder = write(tmp_path / "folder")
    whole = (folder / SEAL).read_bytes()
    for byte in range(len(whole)):
        flip(folder / SEAL, 8 * byte + byte % 8)
        with pytest.raises(DamagedError, match=SEAL):
            read_seal(folder)
        (folder / SEAL).write_bytes(whole)
    lines = [whole[:i].rfind(b"\n") + 1 for i in range(len(whole))]
    for length in {*lines, *range(0, len(whole), 7)}:
        (folder / SEAL).write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=SEAL):
            read_seal(folder)
    (folder / SEAL).unlink()
    with pytest.raises(DamagedError, match="there is no SHA256SUMS"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside", "sub/../../outside", "/outside"])
def test_a_seal_that_names_a_file_outside_its_folder_is_refused(name, tmp_path):
    """Though it is whole: who verifies a folder from elsewhere reads nothing beyond it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "inside", tmp_path / "outside"):
        path.write_bytes(b"content")

    def seal(name: str) -> None:
        body = f"# 7 bytes\n{hashlib.sha256(b'content').hexdigest()}  {name}\n"
        digest = hashlib.sha256(body.encode()).hexdigest()
        (folder / SEAL).write_text(f"{body}# SHA-256 of the lines above: {digest}\n")

    seal("inside")
    verify(folder)
    seal(name)
    with pytest.raises(DamagedError, match=f"{SEAL}: the file is damaged"):
        verify(folder)


def test_shares_find_all_damage_between_them(tmp_path):
    folder = write(tmp_path / "folder")
    for name in FILES:
        shutil.copytree(folder, tmp_path / "damaged", dirs_exist_ok=True)
        flip(tmp_path / "damaged" / name)
        found = []
        for share in range(3):
            try:
                verify(tmp_path / "damaged", share, 3)
            except DamagedError as error:
                found.append(str(error))
        assert len(found) == 1
        assert name in found[0]


def test_what_the_seal_does_not_name_is_left_alone(tmp_path):
    folder = write(tmp_path / "folder")
    (folder / "notes.txt").write_text("a user's")
    verify(folder)
