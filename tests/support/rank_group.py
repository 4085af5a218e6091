"""Ranks that stay: they run functions of a worker module one after the other, as tests ask.

A module's fixture makes a group for each topology and gives out its results as a `Lazy` mapping:
ranks start, and a case runs on them, when a selected test looks at its result, and at no other
time. One case of one topology costs one launch.
"""

import importlib
import io
import multiprocessing
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from tests.support.ranks import (
    GRACE_SECONDS,
    become_rank,
    rank_environment,
    require_permission,
)
from tests.workers.teardown import shut_down

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lazy(Mapping[K, V], Generic[K, V]):
    """Computes each value when it is first looked at; a failure stays one, and is not repeated."""

    def __init__(self, keys: Iterable[K], compute: Callable[[K], V]) -> None:
        self._keys = tuple(keys)
        self._compute = compute
        self._values: dict[K, V] = {}
        self._failures: dict[K, BaseException] = {}

    def __getitem__(self, key: K) -> V:
        if key not in self._keys:
            raise KeyError(key)
        if key in self._failures:
            raise self._failures[key]
        if key not in self._values:
            try:
                self._values[key] = self._compute(key)
            except Exception as error:
                self._failures[key] = error
                raise
        return self._values[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class RankGroup:
    """``tests.workers.<worker>`` on ranks with a process group, started by the first call.

    A worker has ``set_up()``, which makes the process group, and functions of picklable arguments.

    Attributes:
        output: what rank 0 wrote during the last call.
    """

    def __init__(self, worker: str, world_size: int, folder: Path) -> None:
        self._module = f"tests.workers.{worker}"
        self._logs = [folder / f"{worker}{rank}-of-{world_size}.log" for rank in range(world_size)]
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self.output = ""

    def call(self, function: str, *arguments: Any, timeout: float = 480.0) -> list[Any]:
        """Call a function of the worker on all ranks; return what it returns, by rank.

        Fails with the output of all ranks if it raises on one, or the time is up. The next call
        then starts new ranks.
        """
        if not self._processes:
            self._start()
        begin = self._logs[0].stat().st_size if self._logs[0].exists() else 0
        self._tell((function, arguments))
        results = self._receive(timeout)
        if len(results) < len(self._connections):
            codes = self._end()
            said = "\n".join(log.read_text() for log in self._logs)
            raise AssertionError(f"{function}{arguments}: exit codes {codes}\n{said}")
        with self._logs[0].open() as log:
            log.seek(begin)
            self.output = log.read()
        return [results[rank] for rank in range(len(results))]

    def close(self) -> None:
        """Let the ranks tear down their process group; fails if one of them does not end well."""
        if not self._processes:
            return
        self._tell(None)
        for process in self._processes:
            process.join(timeout=30.0)
        codes = self._end()
        said = "\n".join(log.read_text() for log in self._logs)
        assert codes == [0] * len(codes), f"exit codes {codes} at the end\n{said}"

    def _start(self) -> None:
        require_permission()
        context = multiprocessing.get_context("forkserver")
        environment = rank_environment(len(self._logs))
        for rank, log in enumerate(self._logs):
            of_rank = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(self._module, of_rank, log, other))
            process.start()
            other.close()  # or the end of the rank would not be the end of the connection
            self._processes.append(process)
            self._connections.append(own)

    def _tell(self, what: tuple[str, tuple[Any, ...]] | None) -> None:
        for connection in self._connections:
            with suppress(ConnectionError):  # a rank that died is found when it gives no answer
                connection.send(what)

    def _receive(self, timeout: float) -> dict[int, Any]:
        """Return the results by rank, without those of ranks that died or had no time left."""
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(self._connections))
        results = {}
        while pending:
            ready = wait(pending.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                try:
                    content = pending.pop(rank).recv_bytes()
                except (EOFError, ConnectionError):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                else:
                    results[rank] = torch.load(io.BytesIO(content), weights_only=False)
        return results

    def _end(self) -> list[int | None]:
        for process in self._processes:
            process.kill()  # those that have not ended
            process.join()
        codes = [process.exitcode for process in self._processes]
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        return codes


def _serve(module: str, environment: dict[str, str], log: Path, connection: Connection) -> None:
    """Be a rank that runs what it is told, until it is told nothing or nobody is there."""
    become_rank(environment, log)
    torch.set_num_threads(1)
    worker = importlib.import_module(module)
    worker.set_up()
    while (call := connection.recv()) is not None:
        function, arguments = call
        result = io.BytesIO()
        torch.save(getattr(worker, function)(*arguments), result)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(result.getvalue())
    shut_down()


@contextmanager
def ranks_by_size(
    worker: str,
    world_sizes: Iterable[int],
    cases: Iterable[Any],
    new_folder: Callable[[str], Path],
    *arguments: Any,
) -> Iterator[Mapping[int, Mapping[Any, list[Any]]]]:
    """Give out what ``run_case(case, *arguments)`` returns, by number of ranks, case and rank."""
    names = tuple(cases)
    with ExitStack() as stack:

        def of_size(world_size: int) -> Lazy[Any, list[Any]]:
            group = RankGroup(worker, world_size, new_folder(f"{worker}{world_size}"))
            stack.callback(group.close)
            return Lazy(names, lambda case: group.call("run_case", case, *arguments))

        yield Lazy(world_sizes, of_size)
