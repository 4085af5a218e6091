"""Plays the tape of a pass against a back end, and keeps account of every byte.

The tape (`addax_ds.planner.trace`) says what the model allocates and when it needs which module; an
`Engine` answers with what it gathers, buckets and frees. The `Ledger` remembers the moment at which
the sum was largest.
"""

from collections.abc import Iterable, Mapping

from addax_ds.planner.trace import Trace

CATEGORIES = (
    "weights",
    "persistent",
    "gathered",
    "buckets",
    "gradients",
    "optimizer",
    "activations",
    "logits",
)
"""Categories of memory on a GPU:

- weights: the shards.
- persistent: small parameters that ZeRO-3 keeps whole during a pass.
- gathered: other parameters while a module needs them, prefetched ones, the buffers that they
  travel in, and perturbed copies.
- buckets: where gradients are collected and reduced.
- gradients: whole gradients, until they are in a bucket or applied; sums over micro-batches.
- optimizer: master weights, moments and gradient partitions of DeepSpeed's own optimizer.
- activations: what backward will need, and what a module works on.
- logits: what has the vocabulary as its last dimension.
"""


class Ledger:
    """Bytes alive, by category, and the most there have ever been.

    Args:
        standing: bytes that are there all the time.

    Attributes:
        peak: the categories at the moment of the largest total.
        peak_total: their sum.
    """

    def __init__(self, standing: Mapping[str, int]) -> None:
        self._now = {category: standing.get(category, 0) for category in CATEGORIES}
        self._total = sum(self._now.values())
        self.peak = dict(self._now)
        self.peak_total = self._total

    def add(self, category: str, size: int) -> None:
        """Count bytes; negative ones are freed."""
        self._now[category] += size
        self._total += size
        if self._total > self.peak_total:
            self.peak_total = self._total
            self.peak = dict(self._now)


class Engine:
    """A back end during one pass; what it holds it adds to the ledger, and takes out of it.

    Args:
        ledger: the account.

    Attributes:
        sums: bytes by parameter that are added to the ledger once its gradient is reduced: of a sum
            over micro-batches that begins with it, or negative ones of a sum that is applied.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.sums: Mapping[int, int] = {}

    def begin(self) -> None:
        """The pass starts."""

    def fetch(self, module: int, is_forward: bool) -> None:
        """A module is about to compute, in forward or backward."""

    def release(self, module: int, is_forward: bool) -> None:
        """A module has computed."""

    def gradient(self, parameter: int, size: int) -> None:
        """Take a whole gradient, which is in the ledger; the engine frees it."""
        self.reduced([parameter])
        self.ledger.add("gradients", -size)

    def reduced(self, parameters: Iterable[int]) -> None:
        """Gradients are reduced, and handed to the optimizer."""
        for parameter in parameters:
            self.ledger.add("gradients", self.sums.get(parameter, 0))

    def end(self) -> None:
        """The pass is over; all that it made is freed."""


def replay(trace: Trace, engine: Engine) -> None:
    """Run a pass against an engine."""
    ledger, categories = engine.ledger, trace.categories
    sizes: dict[int, int] = {}
    engine.begin()
    for kind, number, *rest in trace.events:
        if kind == "alloc":
            sizes[number] = rest[0]
            ledger.add(categories[number], rest[0])
        elif kind == "free":
            # A gradient that was handed over is the engine's to free.
            ledger.add(categories[number], -sizes.pop(number, 0))
        elif kind == "fetch":
            engine.fetch(number, rest[0])
        elif kind == "release":
            engine.release(number, rest[0])
        else:
            engine.gradient(number, sizes.pop(rest[0]))
    engine.end()
    for number, size in sizes.items():
        ledger.add(categories[number], -size)
