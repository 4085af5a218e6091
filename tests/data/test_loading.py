"""Workers of a loader: they live as long as their rank, and leave no file open in it."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from addax_ds.data.loading import RankLoader
from tests.support.ranks import require_permission

pytestmark = pytest.mark.slow

_kept = []  # as a trainer keeps its loader, or a trace its frames
FILES = 100  # that a process may have open
SECONDS = 20.0  # torch's workers look every 5 s whether their rank still lives


def collate(items: list[int]) -> dict[str, Any]:
    """So many tensors that no process may hold a file open for each of those of four batches."""
    number = torch.tensor(items)
    return {"number": number, "more": [{"tensor": number + i} for i in range(FILES // 3)]}


class Numbers(Dataset[int]):
    """Counts; the number -1 is an error, in whatever process it is asked for."""

    def __init__(self, *last: int) -> None:
        self.numbers = [*range(40), *last]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        if self.numbers[index] < 0:
            raise ValueError("a worker's own")
        return self.numbers[index]


def number_of(batch: dict[str, Any]) -> int:
    number = int(batch["number"])
    others = [int(inner["tensor"]) for inner in batch["more"]]
    assert others == [number + i for i in range(FILES // 3)]
    return number


def returns() -> None:
    pass


def fails() -> None:
    raise RuntimeError("the rank's own")


def exits() -> None:
    sys.exit(3)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ENDS = {returns: 0, fails: 1, exits: 3, is_killed: -signal.SIGKILL}


def rank(end, persistent, connection) -> None:
    """Read, with signals to the workers in between, and end while there is more to read."""
    multiprocessing.set_start_method("fork", force=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    workers = {"num_workers": 2, "persistent_workers": persistent, "prefetch_factor": 2}
    batches = iter(RankLoader(Numbers(), batch_size=1, collate_fn=collate, **workers))
    read = [number_of(next(batches)) for _ in range(4)]
    workers = psutil.Process().children()
    for worker in workers:
        worker.terminate()
    read += [number_of(next(batches)) for _ in range(26)]
    connection.send((read, [worker.pid for worker in workers]))
    _kept.append(batches)
    end()


def start(target, *arguments) -> BaseProcess:
    require_permission()
    process = multiprocessing.get_context("forkserver").Process(target=target, args=arguments)
    process.start()
    return process


def ends_in_time(pids: list[int]) -> bool:
    """Whether processes of any parent are gone, or nobody has asked for their status yet."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if not any(map(lives, pids)):
            return True
        time.sleep(0.05)
    return False


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("end", "persistent"),
    [
        (returns, False),
        (returns, True),
        (fails, False),
        (fails, True),
        (exits, True),
        (is_killed, True),
    ],
)
def test_workers_outlive_a_signal_and_end_with_their_rank(end, persistent):
    own, other = multiprocessing.Pipe()
    process = start(rank, end, persistent, other)
    try:
        assert own.poll(SECONDS), "the rank stands still"
        read, workers = own.recv()
        process.join(SECONDS)
        assert process.exitcode == ENDS[end]
        assert ends_in_time(workers)
    finally:
        process.kill()
    assert read == list(range(30))
    assert len(workers) == 2


def test_an_error_in_a_worker_is_the_rank_s():
    loader = RankLoader(Numbers(-1), batch_size=1, collate_fn=collate, num_workers=1)
    with pytest.raises(ValueError, match="a worker's own"):
        list(loader)
    assert torch.equal(next(iter(loader))["number"], torch.tensor([0]))
