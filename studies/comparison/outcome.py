"""Outcome of a job, as its ``outcome.json`` keeps it."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.jobs import read_json, write_json

OUTCOME = "outcome.json"
WARM_UP_STEPS = 2  # the first backward passes take longer


@dataclass(frozen=True)
class Outcome:
    """One job that is over; the attributes are the keys of the file.

    Attributes:
        exit_code: of its process; other than 0 only if a training diverged.
        seconds: that the process took.
        flags: arguments of ``launch/train.py``, by which it is recognised.
        command: as it was started.
        circumstances: code, versions and machine.
        results: ``all_results.json``; empty if a training diverged.
        log: ``log_history`` of ``trainer_state.json``.
    """

    exit_code: int
    seconds: float
    flags: dict[str, str]
    command: list[str]
    circumstances: dict[str, Any]
    results: dict[str, Any]
    log: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Outcome | None":
        """Return that of a job's folder, or None if the job is not over."""
        content = read_json(folder / OUTCOME)
        return None if content is None else cls(**content)

    def write(self, folder: Path) -> None:
        """Write it; from then on the job is over."""
        write_json(folder / OUTCOME, asdict(self))

    @property
    def dev_curve(self) -> list[tuple[int, float, float]]:
        """Steps, accuracy and loss on dev, without what was evaluated after weights were lost."""
        return [
            (e["step"], e["eval_accuracy"], e["eval_loss"])
            for e in self.log
            if "eval_accuracy" in e and math.isfinite(e["eval_loss"])
        ]

    @property
    def dev_score(self) -> tuple[float, float] | None:
        """Best accuracy on dev, then minus the loss there; None if the training diverged."""
        if self.exit_code != 0:
            return None
        pairs = ((accuracy, -loss) for _, accuracy, loss in self.dev_curve)
        return max(pairs, default=None)


def seconds_a_step(outcomes: list[Outcome]) -> float | None:
    """Return the mean over timed trainings, each without its `WARM_UP_STEPS`.

    None if there are none; those that diverged are left out.
    """
    times = [
        [entry["train_seconds"] for entry in outcome.log if "loss" in entry]
        for outcome in outcomes
        if outcome.exit_code == 0
    ]
    warm = [time[WARM_UP_STEPS - 1 :] for time in times]
    steps = [(time[-1] - time[0]) / (len(time) - 1) for time in warm]
    return sum(steps) / len(steps) if steps else None
