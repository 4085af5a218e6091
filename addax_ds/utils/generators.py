"""torch's random generators."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Let later code draw, on the CPU and on a device, what it would draw without the body."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type):
        yield
