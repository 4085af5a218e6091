"""Processes that do the parts of a work side by side, and end with whoever asked for it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import TypeVar, cast

from addax_ds.utils.errors import UserError

T = TypeVar("T")

# A fork has what is loaded, in milliseconds. A process of its own would import torch and
# Transformers, which takes more than most data does. The forks use no thread of the rank, no
# accelerator and no process group, and leave without running the rank's exit handlers.
_FORK = multiprocessing.get_context("fork")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def in_order(
    work: Callable[[int], T], parts: Sequence[int], processes: int
) -> Generator[T, None, None]:
    """Yield what ``work`` returns for each part, in their order.

    With one process, or one part, this process does it. The others end when the iteration does,
    however it ends, and after their part if this process is killed.

    Args:
        work: for a part; what it returns can be pickled.
        parts: their numbers.
        processes: at most so many at a time.

    Raises:
        UserError: of the first part in order that has one; or a process was killed.
        OSError: of the first part in order that has one.
        RuntimeError: ``work`` has raised something else, in one of the processes.
    """
    count = min(processes, len(parts))
    if count <= 1:
        yield from map(work, parts)
        return
    with ExitStack() as stack:
        workers: dict[Connection, ForkProcess] = {}
        for _ in range(count):
            own, other = _FORK.Pipe()
            stack.callback(own.close)
            # What only this process holds is closed when it ends, which the others see.
            of_parent = [*workers, own]
            worker = _FORK.Process(target=_serve, args=(work, other, of_parent), daemon=True)
            with _blocked_signals():  # until the process has handlers of its own
                worker.start()
            other.close()
            stack.callback(worker.join)
            stack.callback(worker.terminate)
            workers[own] = worker
        yield from _share_out(parts, workers)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _share_out(parts: Sequence[int], workers: dict[Connection, ForkProcess]) -> Iterator[T]:
    waiting = iter(parts)
    given: dict[Connection, int] = {}

    def give(connection: Connection) -> None:
        part = next(waiting, None)
        if part is not None:
            given[connection] = part
            connection.send(part)

    done: dict[int, T | Exception] = {}
    for connection in workers:
        give(connection)
    for part in parts:
        while part not in done:
            for ready in wait(list(given)):
                connection = cast(Connection, ready)
                finished = given.pop(connection)
                try:
                    done[finished] = connection.recv()
                except (EOFError, ConnectionError):
                    workers[connection].join()
                    raise UserError(
                        "a process that tokenises has ended with status "
                        f"{workers[connection].exitcode}; if it was killed for want of memory, "
                        "lower --dataset_num_proc"
                    ) from None
                give(connection)
        result = done.pop(part)
        if isinstance(result, Exception):
            raise result
        yield result


@contextmanager
def _blocked_signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    work: Callable[[int], T], connection: Connection, of_parent: Sequence[Connection]
) -> None:
    """Do what the parent asks for until there is no parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    for other in of_parent:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads stayed in the parent
    gc.freeze()  # a collection would touch, and so copy, all that the parent holds
    result: T | Exception
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        try:
            result = work(part)
        except (UserError, OSError) as error:
            result = error
        except Exception as error:
            result = RuntimeError("".join(traceback.format_exception(error)))
        try:
            connection.send(result)
        except ConnectionError:
            return
