"""The training that is interrupted, and control over its processes."""

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.support.launcher import start_ranks
from tests.support.tiny import repeatable, rows, write_model, write_rows

SCRIPT = "launch/train.py"
BACK_ENDS = {
    "zero3": ("deepspeed", "--deepspeed=ds_configs/zero3.json"),
    "fsdp2": ("torchrun", "--sharding=fsdp2"),
    "none": ("accelerate", "--sharding=none"),
}
"""Launcher and flag by back end."""

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 120.0


class Failure(Exception):
    """Something was lost, or hung."""


@dataclass(frozen=True)
class Training:
    """One training in a folder of its own; starting it again resumes it.

    Attributes:
        back_end: one of `BACK_ENDS`.
        data: folder with model and rows, see `write_data`.
        output: where it saves.
        steps: its length.
        more: further flags.
    """

    back_end: str
    data: Path
    output: Path
    steps: int
    more: tuple[str, ...] = ()

    def flags(self) -> list[str]:
        values = {
            "model_name_or_path": self.data / "model",
            "train_file": self.data / "train.jsonl",
            "output_dir": self.output,
            "max_steps": self.steps,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 1,
            "bf16": True,
            "alpha": 0.01,
            "learning_rate": 0.05,
            "length_threshold": 12,
            "per_device_train_batch_size": 2,
            "per_device_zo_batch_size": 1,
            "seed": 3,
            "report_to": "none",
            "disable_tqdm": True,
        }
        given = [f"--{name}={value}" for name, value in values.items()]
        if self.checkpoints():
            given.append("--resume_from_checkpoint=True")
        return [BACK_ENDS[self.back_end][1], *given, *self.more]

    def launch(self) -> "Launch":
        return Launch(BACK_ENDS[self.back_end][0], self.flags(), self.output.with_suffix(".log"))

    def finish(self) -> "Launch":
        """Let it run to its end, undisturbed; the launch is over when this returns."""
        with self.launch() as launch:
            status = launch.wait()
            if status != 0:
                raise Failure(f"exit status {status}:\n{launch.said()}")
        return launch

    @property
    def staging(self) -> Path:
        """Exists while a checkpoint is written or removed."""
        return self.output / "_unfinished"

    def checkpoints(self) -> list[int]:
        """Steps of the folders that call themselves checkpoints."""
        found = self.output.glob("checkpoint-*")
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)

    def intact_checkpoints(self) -> list[int]:
        """The same, each one checked with ``sha256sum``."""
        steps = self.checkpoints()
        for step in steps:
            require_intact(self.output / f"checkpoint-{step}")
        return steps

    def result(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Final weights and log, less the times."""
        require_intact(self.output / "model")
        state = json.loads((self.output / "trainer_state.json").read_text())
        weights = load_file(self.output / "model" / "model.safetensors")
        return weights, repeatable(state["log_history"])

    def require_same_result(self, reference: "Training") -> None:
        """Compare weights and log bit by bit."""
        (weights, log), (wanted, wanted_log) = self.result(), reference.result()
        if weights.keys() != wanted.keys():
            raise Failure(f"other weights: {sorted(weights.keys() ^ wanted.keys())}")
        bits = {2: torch.int16, 4: torch.int32}
        for name, tensor in wanted.items():
            kind = bits[tensor.element_size()]
            if not torch.equal(tensor.view(kind), weights[name].view(kind)):
                raise Failure(f"{name} differs from the weights of the uninterrupted training")
        if log != wanted_log:
            raise Failure("the log differs from that of the uninterrupted training")


def write_data(folder: Path) -> Path:
    """Write a model that draws dropout masks, and rows for an epoch of 8 steps."""
    write_model(folder / "model", "opt", dtype=torch.bfloat16, dropout=0.1)
    write_rows(folder / "train.jsonl", rows(32, 32))
    return folder


def require_intact(folder: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if outcome.returncode:
        raise Failure(f"{folder} is not complete: {outcome.stdout}{outcome.stderr}")


class Launch:
    """A launcher and its ranks; none of them outlives the ``with`` block."""

    def __init__(self, launcher: str, flags: list[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as output:
            self._started = start_ranks(launcher, [SCRIPT, *flags], output=output)

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: object) -> None:
        self._started.end()
        self._started.process.wait()

    # ---- watching ------------------------------------------------------------------------------

    @property
    def status(self) -> int | None:
        """Exit status of the launcher, None while it runs."""
        return self._started.process.poll()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The ranks that have been started, in their order."""
        ranks = {}
        for process in psutil.Process(self._started.process.pid).children(recursive=True):
            # Those that are just starting, or ending, are none.
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                environment, parent = process.environ(), process.parent()
                if "RANK" in environment and parent and "RANK" not in parent.environ():
                    ranks[int(environment["RANK"])] = process
        return [ranks[rank] for rank in sorted(ranks)]

    def until(self, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait for a condition; return False if the launcher ends before.

        Raises:
            Failure: the time is up.
        """
        deadline = time.monotonic() + seconds
        while self.status is None:
            if condition():
                return True
            if time.monotonic() > deadline:
                raise Failure(f"nothing happens for {seconds} s:\n{self.said()[-4000:]}")
            time.sleep(POLL_SECONDS)
        return False

    def runs_for(self, seconds: float) -> bool:
        """Let it run; return False if the launcher ends before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until the launcher has ended and return its exit status."""
        self.until(lambda: False, seconds)
        assert self.status is not None
        return self.status

    def wait_until_gone(self, seconds: float = PATIENCE_SECONDS) -> float:
        """Wait until no process is left; return after how many seconds that was.

        Raises:
            Failure: the time is up.
        """
        start = time.monotonic()
        while self.status is None or self._started.running():
            if time.monotonic() > start + seconds:
                left = [process.cmdline()[:4] for process in self._started.running()]
                raise Failure(f"still there after {seconds} s: {left}\n{self.said()[-4000:]}")
            time.sleep(0.02)
        return time.monotonic() - start

    # ---- striking ------------------------------------------------------------------------------

    def kill_everything(self) -> None:
        """SIGKILL to the launcher, its helpers and all ranks."""
        for process in [psutil.Process(self._started.process.pid), *self._started.running()]:
            send(process, signal.SIGKILL)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
