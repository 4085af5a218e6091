"""Saves checkpoint-2 beside checkpoint-1, over and over, while one of the ranks cannot write.

``python -m tests.workers.ckpt_faults FOLDER CASE ...``: each change of a file by each rank fails in
turn, and no file may be longer than this or that. ``FOLDER/CASE-<rank>.json`` lists what came
of each save.
"""

import json
import logging
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from addax_ds import UserError
from addax_ds.checkpoint import weights
from addax_ds.checkpoint.atomic import DamagedError, atomic_folder, verify
from addax_ds.distributed.collectives import all_gather_object
from tests.faults.disk import disk_is_full, fault
from tests.workers.teardown import shut_down
from tests.workers.trainer_cases import CASES, arguments, make_trainer, write_models

EACH_CHANGE = "resume"
"""The case in which each change fails once; the others have the files of certain lengths fail."""

NEVER = 10**9


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse longer files, as it refuses those for which there is no room."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


class Saves:
    def __init__(self, folder: Path, case: str) -> None:
        self.output = folder / case
        options = {"max_steps": 1, "save_steps": 1, "save_total_limit": 1, "warmup_steps": 0}
        args = arguments(CASES[case], self.output, "fsdp2", 2, **options)
        self.trainer = make_trainer(case, folder, "fsdp2", args)
        self.trainer.train()
        self.trainer.state.global_step = 2
        self.old = folder / f"{case}-old"
        if dist.get_rank() == 0:
            shutil.copytree(self.output / "checkpoint-1", self.old)

    def save(self, context: Any) -> dict[str, Any]:
        """Save under some restriction; say what each rank was told, and what is there then."""
        error = ""
        with context as count:
            try:
                self.trainer._save_checkpoint(self.trainer.model, None)
            except UserError as raised:
                error = str(raised)
        found = {
            "errors": all_gather_object(error),
            "there": sorted(path.name for path in self.output.iterdir()),
            "damaged": [],
            "changes": all_gather_object(count() if callable(count) else 0),
            "sizes": [],
        }
        for path in self.output.glob("checkpoint-*"):
            found["sizes"] = sorted({p.stat().st_size for p in path.rglob("*") if p.is_file()})
            try:
                verify(path)
            except DamagedError as damage:
                found["damaged"].append(str(damage))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.output)
            shutil.copytree(self.old, self.output / "checkpoint-1")
        dist.barrier()
        return found


def run(saves: Saves, each_change: bool) -> list[dict[str, Any]]:
    rank = dist.get_rank()
    whole = saves.save(fault(NEVER, disk_is_full))
    found = [whole]
    for bad, changes in enumerate(whole["changes"]):
        for at in range(changes if each_change else 0):
            context = fault(at if rank == bad else NEVER, disk_is_full)
            found.append({"bad": bad, "at": at, **saves.save(context)})
        for size in whole["sizes"][::3]:
            context = longest_file(size - 1) if rank == bad else nullcontext()
            found.append({"bad": bad, "longest": size - 1, **saves.save(context)})
    return [*found, saves.save(nullcontext())]


def two_nodes(folders: list[Path]) -> dict[str, Any]:
    """Let each rank write a folder of its own, as the nodes of ``save_on_each_node`` do."""
    rank, error = dist.get_rank(), ""
    try:
        with atomic_folder(folders[rank], [rank]) as staging:
            (staging / "file").write_text("content")
    except UserError as raised:
        error = str(raised)
    errors = all_gather_object(error)
    return {"errors": errors, "there": [folder.is_dir() for folder in folders]}


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        write_models(folder)
    dist.barrier()
    logging.disable(logging.CRITICAL)  # a message must not meet the limit
    # Several files, so that the other rank writes, too.
    weights.save_weights = partial(weights.save_weights, max_file_size="20KB")
    for case in cases:
        found = run(Saves(folder, case), each_change=case == EACH_CHANGE)
        (folder / f"{case}-{rank}.json").write_text(json.dumps(found))
    nodes = {
        "own": two_nodes([folder / "node-0" / "new", folder / "node-1" / "new"]),
        "shared": two_nodes([folder / "shared" / "new"] * 2),
    }
    (folder / f"nodes-{rank}.json").write_text(json.dumps(nodes))
    AcceleratorState._reset_state()
    shut_down()


if __name__ == "__main__":
    main()
