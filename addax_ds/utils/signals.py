"""SIGTERM as a wish to stop, which a cluster's scheduler sends before it takes a machine back."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Protocol


class Flag(Protocol):
    """A truth value, shared between processes."""

    value: bool


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, also while the interpreter ends, when handlers are gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ignore_sigterm_until(flag: Flag, *_: Any) -> None:
    """Ignore SIGTERM until the flag is set; from then on end at once with status 0."""

    def handle(*_: Any) -> None:
        if flag.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, handle)


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
