"""Seconds by phase of a step, from exclusive timers on a stack."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PERTURB, GATHER, FORWARD, BACKWARD = "perturb", "gather", "forward", "backward"
REDUCE, UPDATE, WAIT, OTHER = "reduce", "update", "wait", "other"

PHASES = (PERTURB, GATHER, FORWARD, BACKWARD, REDUCE, UPDATE, WAIT, OTHER)
"""Every moment of a step belongs to one of them; ``other`` is what no other one claims."""


class PhaseTimer:
    """Charges each moment of a step to the innermost phase that is open, and to no other.

    Entering a phase pauses the one around it, so the phases of a step add up to its time. There is
    one stack: hooks that autograd runs on a thread of its own nest in the backward that waits for
    them.

    Args:
        clock: seconds, from any origin.
        synchronize: waits for the device, at every boundary between two phases. What a phase has
            queued is then charged to it, and nothing overlaps any more: the total of such a step is
            not that of a step without a timer.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock = clock
        self._synchronize = synchronize
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    def start(self) -> None:
        """A step begins."""
        assert not self._open
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._synchronize()
        self._since = self._clock()
        self._open.append(OTHER)

    def stop(self) -> dict[str, float]:
        """A step ends; return its seconds by phase."""
        assert self._open == [OTHER]
        self._charge()
        self._open.clear()
        return self._seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge what the body takes to a phase; between steps nobody is charged."""
        if not self._open:
            yield
            return
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        self._synchronize()
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
