"""SIGTERM as a wish to stop, which a cluster's scheduler sends before it takes a machine back."""

import signal
import threading
from collections.abc import Callable
from typing import Any


def ignore_sigterm(*_: Any) -> None:
    """Ignore SIGTERM from now on, also while the interpreter ends, when handlers are gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
