"""Damage, a full disk, SIGTERM, and a rank that hangs.

Each scenario gets a complete training to compare with and an empty folder, and returns what it has
seen; what must not happen is a `Failure`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.training import Failure, Training, send
from tests.support.ranks import ROOT

HANG_TIMEOUT_SECONDS = 15
LAUNCHERS_GRACE_SECONDS = 30.0
"""After which the launchers kill a rank that does not end."""


# ---- damage ------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "truncated file": (_cut, "model.safetensors", "the file is cut off"),
    "flipped bit": (_flip, "model.safetensors", "the file was altered"),
    "missing file": (Path.unlink, "rng_state_1.pth", "the file is missing"),
}


def damage(reference: Training, folder: Path, kind: str) -> dict[str, Any]:
    """Damage the newest checkpoint; the one before is used, and that is said."""
    act, name, message = DAMAGE[kind]
    training = replace(reference, output=folder / "output")
    with training.launch() as launch:
        launch.until(lambda: len(training.checkpoints()) == 2 and training.checkpoints()[0] > 2)
        launch.kill_everything()
        launch.wait_until_gone()
    previous, newest = training.intact_checkpoints()
    path = training.output / f"checkpoint-{newest}" / name
    act(path)
    said = training.finish().said()
    require_said(said, "skipping a checkpoint that is damaged", f"{path}: {message}")
    training.require_same_result(reference)
    return {"damaged": newest, "resumed from": previous}


# ---- full disk ---------------------------------------------------------------------------------


def full_disk(reference: Training, folder: Path) -> dict[str, Any]:
    """Run `full_disk_here` in a mount namespace of its own."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"]).returncode:
        return {"not run": "this system allows no mount namespace"}
    command = [sys.executable, "-m", "tests.faults.full_disk", str(folder)]
    arguments = [str(reference.output), str(reference.data), reference.back_end, reference.steps]
    outcome = subprocess.run(
        [*unshare, *command, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if outcome.returncode:
        raise Failure(f"full disk: {outcome.stdout}")
    return json.loads(outcome.stdout.splitlines()[-1])


def full_disk_here(reference: Training, folder: Path) -> dict[str, Any]:
    """Save to a tmpfs with room for two checkpoints and a half, which stays mounted."""
    output = folder / "output"
    output.mkdir()
    checkpoint = next(reference.output.glob("checkpoint-*"))
    room = sum(-(-file.stat().st_size // 4096) * 4096 for file in checkpoint.iterdir())
    _mount(output, f"size={room * 5 // 2}")
    training = replace(reference, output=output)
    with training.launch() as launch:
        status = launch.wait()
        said, seconds = launch.said(), launch.wait_until_gone()
    if status == 0:
        raise Failure("the launcher says that all is well")
    require_said(said, "addax_ds: error: ", "cannot be written: ", "No space left on device")
    if f'File "{ROOT / "addax_ds"}' in said:  # launchers have tracebacks of their own
        raise Failure(f"a full disk is no reason for a traceback:\n{said}")
    kept = training.intact_checkpoints()
    if len(kept) != 2 or training.staging.exists():
        raise Failure(f"left are the checkpoints {kept}, {os.listdir(output)}")
    _mount(output, f"remount,size={room * 10}")
    training.finish()
    training.require_same_result(reference)
    return {"status": status, "seconds": seconds, "kept": kept}


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


# ---- signals -----------------------------------------------------------------------------------


def sigterm(reference: Training, folder: Path, target: str) -> dict[str, Any]:
    """SIGTERM: all ranks save after the same step and end, and training goes on from there.

    Args:
        reference: complete.
        folder: empty.
        target: "one rank", "all ranks", or "launcher": the process that has started the ranks,
            which passes the signal on, and then reports an error whatever the ranks report.
    """
    training = replace(reference, output=folder / "output", more=("--save_steps=1000",))
    with training.launch() as launch:
        launch.until(lambda: "'loss'" in launch.said())
        ranks = launch.ranks()
        parent = ranks[1].parent()
        assert parent is not None
        receivers = {"one rank": ranks[1:], "all ranks": ranks, "launcher": [parent]}
        for receiver in receivers[target]:
            send(receiver, signal.SIGTERM)
        seconds = launch.wait_until_gone()
        status, said = launch.status, launch.said()
    if status != 0 and target != "launcher":
        raise Failure(f"SIGTERM to {target}: launcher {status}:\n{said}")
    saved = training.intact_checkpoints()
    if not saved:
        raise Failure(f"SIGTERM to {target}: there is no checkpoint:\n{said}")
    require_said(said, f"Stopped by SIGTERM after step {saved[-1]}")
    replace(training, more=()).finish()
    training.require_same_result(reference)
    return {"status": status, "saved": saved[-1], "seconds": seconds}


def hang(reference: Training, folder: Path) -> dict[str, Any]:
    """SIGSTOP of rank 1: rank 0 ends after ``--ddp_timeout``, and the launcher ends the rest."""
    more = (f"--ddp_timeout={HANG_TIMEOUT_SECONDS}",)
    training = replace(reference, output=folder / "output", more=more)
    with training.launch() as launch:
        launch.until(lambda: len(training.checkpoints()) == 2)
        send(launch.ranks()[1], signal.SIGSTOP)
        longest = HANG_TIMEOUT_SECONDS + LAUNCHERS_GRACE_SECONDS + 30
        seconds, status = launch.wait_until_gone(longest), launch.status
    if status == 0:
        raise Failure("the launcher says that all is well")
    kept = training.intact_checkpoints()
    replace(training, more=()).finish()
    training.require_same_result(reference)
    return {"seconds": seconds, "status": status, "kept": kept}


def require_said(said: str, *parts: str) -> None:
    for part in parts:
        if part not in said:
            raise Failure(f"nobody says {part!r}:\n{said}")


EVERYWHERE = ("zero3", "fsdp2", "none")
SCENARIOS: dict[str, tuple[tuple[str, ...], Callable[[Training, Path], dict[str, Any]]]] = {
    "truncated file": (("zero3",), partial(damage, kind="truncated file")),
    "flipped bit": (("fsdp2",), partial(damage, kind="flipped bit")),
    "missing file": (("none",), partial(damage, kind="missing file")),
    "full disk": (EVERYWHERE, full_disk),
    "SIGTERM to one rank": (EVERYWHERE, partial(sigterm, target="one rank")),
    "SIGTERM to all ranks": (EVERYWHERE, partial(sigterm, target="all ranks")),
    "SIGTERM to the launcher": (EVERYWHERE, partial(sigterm, target="launcher")),
    "a rank hangs": (EVERYWHERE, hang),
}
"""By name: the back ends it is played on (what a file looks like depends on none), and how."""
