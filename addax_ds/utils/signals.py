"""Signals as wishes to stop: SIGTERM, which a cluster's scheduler sends, and Ctrl-C (SIGINT)."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as shells have it."""

_ONE_PRESS_SECONDS = 2.0


class Flag(Protocol):
    """A truth value, shared between processes."""

    value: bool


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, also while the interpreter ends, when handlers are gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ignore_signals_until(flag: Flag, *_: Any) -> None:
    """Ignore SIGINT, and SIGTERM until the flag is set; from then on end at once with status 0."""

    def handle(*_: Any) -> None:
        if flag.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def on_sigterm(act: Callable[[], None]) -> None:
    """Call ``act`` at each SIGTERM from now on, instead of ending the process.

    Until the process ends: launchers send the signal more than once, also while a rank is already
    saving or shutting down. Does nothing outside the main thread, where Python allows no handlers.

    Args:
        act: sets a flag; it runs between two instructions of whatever is running.
    """

    def handle(*_: Any) -> None:
        act()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)


class Interrupts:
    """Ctrl-C as a wish to stop, for a program that its process belongs to.

    Attributes:
        received: whether one has come while `noted` was entered.
    """

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def noted(self, act: Callable[[], None]) -> Iterator[None]:
        """Call ``act`` at the first SIGINT; at a later one end the process at once.

        A thread does both, also while the main thread waits for other ranks. What comes within two
        seconds is one press of the keys: a terminal signals all processes, and torchrun sends its
        ranks the signal once more. Does nothing outside the main thread, where Python allows no
        handlers.

        Args:
            act: is called in a thread of its own.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        source, sink = os.pipe()
        os.set_blocking(sink, False)
        threading.Thread(target=self._watch, args=(source, act), daemon=True).start()
        # Python writes the number of a signal as it arrives. Its handlers come later, when the main
        # thread is back from what it does.
        former_sink = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        former = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)
            signal.set_wakeup_fd(former_sink)
            os.close(sink)

    def _watch(self, source: int, act: Callable[[], None]) -> None:
        first: float | None = None
        while numbers := os.read(source, 64):
            if signal.SIGINT not in numbers:
                continue
            if first is None:
                self.received, first = True, time.monotonic()
                act()
            elif time.monotonic() - first > _ONE_PRESS_SECONDS:
                os._exit(INTERRUPTED)
        os.close(source)
