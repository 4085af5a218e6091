"""Which checkpoint a run goes on from, decided by two ranks together."""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from addax_ds import UserError
from addax_ds.checkpoint import resume
from addax_ds.checkpoint.atomic import SEAL, UNFINISHED, atomic_folder
from addax_ds.checkpoint.identity import Progress
from tests.checkpoint.test_checkpoint import RUN, run_with
from tests.support.ranks import run_ranks

FILES = {
    "model-00001-of-00002.safetensors": b"one" * 400,
    "model-00002-of-00002.safetensors": b"two" * 300,
    "model.safetensors.index.json": b"{}",
    "trainer_state.json": b'{"global_step": 0}',
    "addax_state.json": json.dumps(
        {
            "optimizer": {"param_groups": []},
            "run": dataclasses.asdict(RUN),
            "progress": dataclasses.asdict(Progress(0.0, 0.0, 0)),
        }
    ).encode(),
    "scheduler.pt": b"schedule",
    "rng_state_0.pth": b"generators",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    with atomic_folder(folder, [0]) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
    return folder


@functools.cache
def written(step: int) -> Path:
    """A checkpoint to copy: one that is flushed to the disk takes its time."""
    folder = Path(tempfile.mkdtemp()) / f"checkpoint-{step}"
    atexit.register(shutil.rmtree, folder.parent)
    return write(folder, {**FILES, "step": str(step).encode()})


def write_all(root: Path, steps: tuple[int, ...] = (2, 4, 10)) -> Path:
    for step in steps:
        shutil.copytree(written(step), root / f"checkpoint-{step}")
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE: dict[str, Callable[[Path], None]] = {"cut": cut, "flip": flip, "delete": Path.unlink}
REASONS = {"cut": "cut off", "flip": "altered", "delete": "missing"}

Scenario = Callable[[Path], Any]


def two_disks(root: Path, *other_steps: int) -> None:
    """The ranks are two nodes with a disk each."""
    write_all(root / "rank-0")
    write_all(root / "rank-1", other_steps)


def other_weights(root: Path) -> None:
    two_disks(root, 2, 4)
    name = "model-00001-of-00002.safetensors"
    write(root / "rank-1/checkpoint-10", {**FILES, name: b"not" * 400, "step": b"10"})


def leftover(root: Path) -> None:
    """A save that died when all but the rename was done."""
    write(write_all(root) / "checkpoint-12")
    (root / UNFINISHED).mkdir()
    (root / "checkpoint-12").rename(root / UNFINISHED / "checkpoint-12")


def wanting(*values: str) -> Scenario:
    def prepare(root: Path) -> None:
        write_all(root)
        flip(root / "checkpoint-4/model.safetensors.index.json")
        for rank, value in enumerate(values):
            (root / f"wanted-{rank}").write_text(value.format(root=root))

    return prepare


SCENARIOS: dict[str, Scenario] = {
    "intact": write_all,
    "leftover": leftover,
    "none": lambda root: (root / "model").mkdir(),
    "all-damaged": lambda root: flip(write_all(root, (3,)) / "checkpoint-3/step"),
    "empty-newest": lambda root: (write_all(root) / "checkpoint-12").mkdir(),
    "two-disks": lambda root: two_disks(root, 2, 4, 10),
    "rank-1-lacks-10": lambda root: two_disks(root, 2, 4),
    "rank-1-has-12": lambda root: two_disks(root, 2, 4, 10, 12),
    "rank-1-has-none": lambda root: (two_disks(root), (root / "rank-1").mkdir()),
    "other-weights": other_weights,
    "path": wanting("{root}/checkpoint-2", "{root}/checkpoint-2"),
    "damaged-path": wanting("{root}/checkpoint-4", "{root}/checkpoint-4"),
    "no-such-path": wanting("{root}/checkpoint-5", "{root}/checkpoint-5"),
    "unlike": wanting("{root}/checkpoint-2", "True"),
    "off": wanting("False", "False"),
}


def damaged(name: str, damage: str) -> Scenario:
    return lambda root: DAMAGE[damage](write_all(root) / "checkpoint-10" / name)


BY_FILE = {
    f"{damage} {name}": (name, damage) for name in (*FILES, "step", SEAL) for damage in DAMAGE
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What both ranks say to each scenario."""
    root = tmp_path_factory.mktemp("resume")
    prepare = {**SCENARIOS, **{key: damaged(*pair) for key, pair in BY_FILE.items()}}
    for name, scenario in prepare.items():
        (root / name).mkdir()
        scenario(root / name)
    run_ranks("ckpt_resume", 2, root, timeout=120)
    ranks = [json.loads((root / f"found-{rank}.json").read_text()) for rank in range(2)]
    shutil.rmtree(root / "none")
    return {name: [{**rank[name], "root": root / name} for rank in ranks] for name in prepare}


def both(found: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """What both ranks say, which has to be the same."""
    first, second = found[name]
    assert first.get("error") == second.get("error")
    assert first["warnings"] == second["warnings"]
    names = [Path(rank["found"]).name if rank.get("found") else None for rank in (first, second)]
    assert names[0] == names[1]
    return {**first, "name": names[0]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step"),
    [("intact", 10), ("leftover", 10), ("two-disks", 10), ("path", 2)],
)
def test_an_intact_checkpoint_is_taken_without_a_word(found, name, step):
    result = both(found, name)
    assert result["name"] == f"checkpoint-{step}"
    assert result["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize("key", BY_FILE)
def test_the_one_before_a_damaged_one_is_taken(found, key):
    name, damage = BY_FILE[key]
    result = both(found, key)
    assert result["name"] == "checkpoint-4"
    (warning,) = result["warnings"]
    path = result["root"] / "checkpoint-10" / name
    if name == SEAL:
        assert str(path) in warning or f"{path.parent}: there is no {SEAL}" in warning
    else:
        assert f"{path}: the file" in warning
        assert REASONS[damage] in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "reasons"),
    [
        ("empty-newest", 10, ["checkpoint-12: there is no checkpoint in this folder"]),
        ("rank-1-lacks-10", 4, ["checkpoint-10: there is no such folder (says rank 1)"]),
        ("rank-1-has-12", 10, ["checkpoint-12: there is no such folder (says rank 0)"]),
        ("other-weights", 4, ["checkpoint-10: ranks 0 and 1 see checkpoints with different"]),
    ],
)
def test_what_not_all_ranks_can_use_is_skipped(found, name, step, reasons):
    first, second = found[name]
    for rank in (first, second):
        assert Path(rank["found"]).name == f"checkpoint-{step}"
        for reason, warning in zip(reasons, rank["warnings"], strict=True):
            assert reason in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("none", ["--resume_from_checkpoint: there is no checkpoint in"]),
        (
            "all-damaged",
            ["there is no intact checkpoint in", "checkpoint-3/step: the file was alt"],
        ),
        ("rank-1-has-none", ["there is no intact checkpoint in", "no such folder (says rank 1)"]),
        (
            "damaged-path",
            [
                "--resume_from_checkpoint {root}/checkpoint-4/model.safetensors.index.json: the "
                "file was altered",
                "newest intact checkpoint beside it: {root}/checkpoint-10",
            ],
        ),
        (
            "no-such-path",
            [
                "--resume_from_checkpoint {root}/checkpoint-5: there is no such folder",
                "newest intact checkpoint beside it: {root}/checkpoint-10",
            ],
        ),
        ("unlike", ["the ranks were given different values: {root}/checkpoint-2, True"]),
    ],
)
def test_both_ranks_refuse(found, name, parts):
    for rank in found[name]:
        for part in parts:
            assert part.format(root=rank["root"]) in rank["error"]


@pytest.mark.slow
def test_false_is_no_checkpoint(found):
    assert both(found, "off")["found"] is None


def alone(output_dir: Path) -> SimpleNamespace:
    return SimpleNamespace(
        process_index=0,
        local_process_index=0,
        output_dir=str(output_dir),
        should_save=True,
        save_on_each_node=False,
    )


def test_a_checkpoint_of_another_run_is_refused_not_skipped(tmp_path):
    write_all(tmp_path)
    found = resume.find(True, alone(tmp_path))
    assert found == resume.Checkpoint(tmp_path / "checkpoint-10", RUN)
    found.check(RUN)
    with pytest.raises(UserError, match=r"checkpoint-10: the seed was 7, and is 8 .* --seed 7"):
        found.check(run_with("seed", 8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trainer_state.json": None}, "there is no checkpoint in this folder"),
        ({"addax_state.json": None}, "written with --save_only_model, or by another trainer"),
        ({"addax_state.json": b"{}"}, "addax_state.json: this is not the state of an Addax run"),
        ({"addax_state.json": b"{"}, "addax_state.json: this is not the state of an Addax run"),
    ],
)
def test_a_folder_that_is_intact_but_no_checkpoint_of_addax(changed, message, tmp_path):
    files = {name: text for name, text in {**FILES, **changed}.items() if text is not None}
    folder = write(tmp_path / "checkpoint-4", files)
    for wanted in (True, str(folder)):
        with pytest.raises(UserError, match=message) as error:
            resume.find(wanted, alone(tmp_path))
        assert str(error.value).startswith(f"--resume_from_checkpoint {folder}")


def test_a_checkpoint_without_checksums_is_not_verified(tmp_path):
    """As another program writes it."""
    folder = write_all(tmp_path, (4,)) / "checkpoint-4"
    (folder / SEAL).unlink()
    with pytest.raises(
        UserError, match="there is no SHA256SUMS: it was not written to the end, or"
    ):
        resume.find(str(folder), alone(tmp_path))
