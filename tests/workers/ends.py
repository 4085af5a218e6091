"""Runs the recipe, which the last rank ends in a way of its own: ``ends.py HOW FOLDER FLAG ...``.

It writes the ids of its data loaders' workers to ``FOLDER/workers``.
"""

import hashlib
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import psutil

from addax_ds.cli.train import main
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils import signals


def fail() -> None:
    raise RuntimeError("this rank alone")


def terminate() -> None:
    """As a launcher does that signals all processes of the rank."""
    for process in (*psutil.Process().children(), psutil.Process()):
        process.send_signal(signal.SIGTERM)


def interrupt() -> None:
    """As a terminal does, and torchrun once more."""
    for _ in range(2):
        for process in (*psutil.Process().children(), psutil.Process()):
            process.send_signal(signal.SIGINT)


def interrupt_twice() -> None:
    """The second time in a call that Python has to wait for."""
    signals._ONE_PRESS_SECONDS = 0.1
    interrupt()
    Timer(1.0, interrupt).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


# A method of the trainer, which is interrupted in the second step or right before it.
WAYS: dict[str, tuple[str, Callable[[], None]]] = {
    "fail": ("training_step", fail),
    "terminate": ("prediction_step", terminate),
    "interrupt": ("training_step", interrupt),
    "interrupt-twice": ("training_step", interrupt_twice),
}


def end_once(how: str, note: Path) -> None:
    name, act = WAYS[how]
    method = getattr(AddaxTrainer, name)

    def interrupted(self: AddaxTrainer, *arguments: Any, **options: Any) -> Any:
        last = self.args.process_index == self.args.world_size - 1
        if self.state.global_step == 1 and last and not note.exists():
            note.write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
            act()
        return method(self, *arguments, **options)

    setattr(AddaxTrainer, name, interrupted)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # as in a program of its own
    how, folder, *flags = sys.argv[1:]
    end_once(how, Path(folder) / "workers")
    main(flags)
    print("ended in order", flush=True)
