"""Runs the recipe, which the last rank ends in a way of its own: ``ends.py HOW FOLDER FLAG ...``.

It writes the ids of its data loader's workers to ``FOLDER/workers``.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from addax_ds.cli.train import main
from addax_ds.training.trainer import AddaxTrainer


def fail() -> None:
    raise RuntimeError("this rank alone")


def terminate() -> None:
    """As a launcher does that signals all processes of the rank."""
    for process in (*psutil.Process().children(), psutil.Process()):
        process.send_signal(signal.SIGTERM)


WAYS = {"fail": fail, "terminate": terminate}


def end_in_second_step(how: str, folder: Path) -> None:
    step = AddaxTrainer.training_step

    def ends(self: AddaxTrainer, *arguments: Any) -> Any:
        if self.state.global_step == 1 and self.args.process_index == self.args.world_size - 1:
            workers = [str(child.pid) for child in psutil.Process().children()]
            (folder / "workers").write_text(" ".join(workers))
            WAYS[how]()
        return step(self, *arguments)

    AddaxTrainer.training_step = ends  # type: ignore[method-assign]


if __name__ == "__main__":
    multiprocessing.set_start_method("fork", force=True)  # as in a program of its own
    how, folder, *flags = sys.argv[1:]
    end_in_second_step(how, Path(folder))
    main(flags)
    print("ended in order", os.getpid(), flush=True)
