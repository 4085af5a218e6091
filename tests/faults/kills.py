"""SIGKILL at random moments, and what has to be true after each of them."""

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from tests.faults.training import Failure, Launch, Training, send

MOMENTS = ("starting", "stepping", "saving", "saving", "saving")
"""Where a kill is aimed at; saves are what matters most."""

TARGETS = ("one rank", "all ranks", "launcher and ranks")

# Ranges that delays are drawn from. Tiny models start in about 8 s and save in about 0.05 s.
START_SECONDS = 10.0
STEP_SECONDS = 2.0
SAVE_SECONDS = 0.06


@dataclass(frozen=True)
class Kill:
    """What is going to be killed, and when.

    Attributes:
        moment: one of `MOMENTS`.
        target: one of `TARGETS`.
        rank: that is killed, if it is one.
        delay: seconds from the start, or from the first save of this launch.
        into_save: seconds from the beginning of a save, if the moment is one.
    """

    moment: str
    target: str
    rank: int
    delay: float
    into_save: float

    @classmethod
    def draw(cls, random: Random, moment: str | None = None, target: str | None = None) -> "Kill":
        moment = moment or random.choice(MOMENTS)
        longest = START_SECONDS if moment == "starting" else STEP_SECONDS
        return cls(
            moment,
            target or random.choice(TARGETS),
            random.randrange(2),
            random.uniform(0.0, longest),
            random.uniform(0.0, SAVE_SECONDS),
        )


@dataclass(frozen=True)
class Strike:
    """What a kill has done.

    Attributes:
        back_end: of the training.
        kill: what was planned.
        while_saving: whether files were being written, or removed, at that instant.
        seconds: until no process was left.
        status: of the launcher.
        checkpoints: steps of those that were there afterwards, all complete.
    """

    back_end: str
    kill: Kill
    while_saving: bool
    seconds: float
    status: int | None
    checkpoints: list[int]

    def __str__(self) -> str:
        kill = self.kill
        who = f"rank {kill.rank}" if kill.target == "one rank" else kill.target
        where = "in a save" if self.while_saving else "outside saves"
        return (
            f"{self.back_end}: SIGKILL of {who}, {kill.moment}, {where}: gone in "
            f"{self.seconds:.1f} s, launcher {self.status}, intact {self.checkpoints}"
        )

    def content(self) -> dict[str, Any]:
        return asdict(self)


def interrupt(training: Training, kills: list[Kill], tell: Callable[[Strike], None]) -> None:
    """Start a training and kill it, as often as planned, then let it run to its end.

    Kills that come after the end are left out.

    Raises:
        Failure: a process stays, or a checkpoint is not complete or lost.
    """
    for kill in kills:
        before = training.intact_checkpoints()
        with training.launch() as launch:
            struck = strike(training, launch, kill)
            if struck is None:
                status = launch.wait()
                if status != 0:
                    raise Failure(f"exit status {status}, but nobody killed it:\n{launch.said()}")
                return
            seconds, status = launch.wait_until_gone(), launch.status
        after = training.intact_checkpoints()
        if before and max(after, default=0) < before[-1]:
            raise Failure(f"of the checkpoints {before} only {after} are left")
        if status == 0:
            raise Failure("the launcher says that all is well")
        tell(Strike(training.back_end, kill, struck, seconds, status, after))
    training.finish()


def strike(training: Training, launch: Launch, kill: Kill) -> bool | None:
    """Kill; return whether files were being written, or None if the training ended before."""
    newest = training.checkpoints()[-1:]
    if kill.moment != "starting" and not (
        # Staging of an earlier, killed launch is removed at the start and is no save.
        launch.until(lambda: training.checkpoints()[-1:] > newest)
    ):
        return None
    if not launch.runs_for(kill.delay):
        return None
    if not launch.until(lambda: len(launch.ranks()) == 2):
        return None
    ranks = launch.ranks()
    if kill.moment == "saving" and not (
        launch.until(training.staging.exists) and launch.runs_for(kill.into_save)
    ):
        return None
    if len(ranks) != 2 or (training.output / "model").exists():
        return None
    saving = kill.moment != "starting" and training.staging.exists()
    if kill.target == "launcher and ranks":
        launch.kill_everything()
    else:
        for rank in ranks if kill.target == "all ranks" else [ranks[kill.rank]]:
            send(rank, signal.SIGKILL)
    return saving
