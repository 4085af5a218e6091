"""Parts of a work in processes: their order, their errors, and that none is left behind."""

import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest

from addax_ds.data.workers import in_order
from addax_ds.utils.errors import UserError
from tests.data.test_loading import ends_in_time, lives
from tests.support.ranks import require_permission

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _permitted() -> None:
    require_permission()


def later_first(part: int) -> tuple[int, int]:
    time.sleep(0.05 * (part % 3 == 0))
    return part, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_results_come_in_the_order_of_the_parts(processes):
    found = list(in_order(later_first, range(10, 20), processes))
    assert [part for part, _ in found] == list(range(10, 20))
    pids = {pid for _, pid in found}
    assert pids == {os.getpid()} if processes == 1 else 1 < len(pids) <= processes
    assert ends_in_time(list(pids - {os.getpid()}))


def children() -> set[int]:
    """Of this process, which may have some of other tests."""
    return {child.pid for child in psutil.Process().children()}


def fails_from_4_on(part: int) -> int:
    if part == 4:
        time.sleep(0.3)  # so that 5 has failed before
    if part >= 4:
        raise UserError(f"row {part}")
    return part


def test_the_first_error_in_order_is_raised_and_what_came_before_is_there():
    others = children()
    found = in_order(fails_from_4_on, range(10), 3)
    assert [next(found) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"^row 4$"):
        next(found)
    assert children() == others


def is_a_mistake(part: int) -> int:
    return {}[part]


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"in is_a_mistake(.|\n)*KeyError: 0"):
        list(in_order(is_a_mistake, range(2), 2))


def is_killed(part: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_process_that_is_killed_is_a_sentence():
    with pytest.raises(UserError, match=r"ended with status -9; .* lower --dataset_num_proc"):
        list(in_order(is_killed, range(2), 2))


def never_ends(part: int) -> int:
    if part:
        time.sleep(600)
    return os.getpid()


def test_processes_end_when_their_results_are_no_longer_wanted():
    """As when the rank gets Ctrl-C, which the processes get, too, and leave to it."""
    others = children()
    found = in_order(never_ends, range(3), 3)
    next(found)
    pids = children() - others
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(map(lives, pids))
    found.close()
    assert not any(map(psutil.pid_exists, pids))


def hold(connection) -> None:
    """Begin a work with a thread and a handler for SIGTERM, as a rank has them."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

    def work(part: int) -> int:
        time.sleep(0.2)
        return part

    for _ in in_order(work, range(10_000), 2):
        connection.send([child.pid for child in psutil.Process().children()])


def test_processes_end_after_their_part_if_the_rank_is_killed():
    own, other = multiprocessing.Pipe()
    rank = multiprocessing.get_context("forkserver").Process(target=hold, args=(other,))
    rank.start()
    try:
        assert own.poll(60.0)
        pids = own.recv()
        assert len(pids) == 2
    finally:
        rank.kill()
    assert ends_in_time(pids)
