"""Costs of a training: time, tokens and peak memory."""

import resource
import sys
import time
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Sums over the steps of a training, also over those before it was resumed.

    Attributes:
        train_seconds: wall-clock time of steps; loading, evaluations and checkpoints are not in it.
        train_cpu_seconds: time that the processors spent on this rank's steps, all threads.
        train_tokens: tokens of the global batches, zeroth- and first-order, padding left out; those
            of a zeroth-order batch count once, though several passes see them.
    """

    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    train_tokens: int = 0


class CostMeter:
    """Measures the steps of this rank.

    Args:
        device: where the model runs.

    Attributes:
        costs: of the steps up to now.
        before: of those before the training was resumed.
    """

    def __init__(self, device: torch.device) -> None:
        self.costs = self.before = Costs()
        self._device = device
        self._began = (0.0, 0.0)

    def reset(self) -> None:
        """Begin a training that does not go on from a checkpoint."""
        self.resume(Costs())

    def resume(self, costs: Costs) -> None:
        """Go on with a training that has cost ``costs``."""
        self.costs = self.before = costs

    def start(self) -> None:
        """Begin a step."""
        self._began = self._now()

    def stop(self, tokens: int) -> None:
        """End a step in which ``tokens`` were seen over all ranks."""
        (began, began_cpu), (now, now_cpu) = self._began, self._now()
        self.costs = Costs(
            self.costs.train_seconds + now - began,
            self.costs.train_cpu_seconds + now_cpu - began_cpu,
            self.costs.train_tokens + tokens,
        )

    def report(self) -> dict[str, float]:
        """Return `Costs` by name, and ``peak_memory_bytes`` (`peak_memory`)."""
        return {**asdict(self.costs), "peak_memory_bytes": peak_memory(self._device)}

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":  # what a step has queued belongs to it
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held up to now, in bytes.

    On a GPU what tensors held there, with what was free but waited for a stream; on a CPU the
    resident set, libraries and page cache of mapped files included.
    """
    if device.type == "cuda":
        return torch.cuda.memory_stats(device).get("active_bytes.all.peak", 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
