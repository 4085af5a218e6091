"""Plays the tape of a pass against a back end, and keeps account of every byte.

The tape (`addax_ds.planner.trace`) says what the model allocates and when it needs which module; a
`BackEndPass` answers with what it gathers, buckets and frees. The `Ledger` remembers the moment at
which the sum was largest.
"""

from collections.abc import Iterable, Mapping

from typing_extensions import override

from addax_ds.planner.shapes import ModelShape
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


class BackEndPass:
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
        """Take a whole gradient, which is in the ledger; the back end frees it."""
        self.reduced([parameter])
        self.ledger.add("gradients", -size)

    def reduced(self, parameters: Iterable[int]) -> None:
        """Gradients are reduced, and handed to the optimizer."""
        for parameter in parameters:
            self.ledger.add("gradients", self.sums.get(parameter, 0))

    def end(self) -> None:
        """The pass is over; all that it made is freed."""


class UnshardedPass(BackEndPass):
    """A model that is whole on each rank (`addax_ds.sharding.unsharded`).

    Args:
        ledger: the account.
        shape: of the model.
        perturbed: whether blocks see perturbed copies while they run, and what lies outside of them
            for the whole pass.
    """

    def __init__(self, ledger: Ledger, shape: ModelShape, *, perturbed: bool) -> None:
        super().__init__(ledger)
        sizes = [numel * shape.itemsize if perturbed else 0 for numel in shape.numels]
        blocks = [sum(sizes[p] for p in parameters) for parameters in shape.block_parameters]
        self._copies = dict(zip(shape.blocks, blocks, strict=True))
        self._outside = sum(sizes) - sum(blocks)

    @override
    def begin(self) -> None:
        self.ledger.add("gathered", self._outside)

    @override
    def fetch(self, module: int, is_forward: bool) -> None:
        if is_forward:
            self.ledger.add("gathered", self._copies.get(module, 0))

    @override
    def release(self, module: int, is_forward: bool) -> None:
        if is_forward:
            self.ledger.add("gathered", -self._copies.get(module, 0))

    @override
    def end(self) -> None:
        self.ledger.add("gathered", -self._outside)


def replay(trace: Trace, back_end: BackEndPass) -> None:
    """Run a pass against a back end."""
    ledger, categories = back_end.ledger, trace.categories
    sizes: dict[int, int] = {}
    back_end.begin()
    for kind, number, *rest in trace.events:
        if kind == "alloc":
            sizes[number] = rest[0]
            ledger.add(categories[number], rest[0])
        elif kind == "free":
            # A gradient that was handed over is the back end's to free.
            ledger.add(categories[number], -sizes.pop(number, 0))
        elif kind == "fetch":
            back_end.fetch(number, rest[0])
        elif kind == "release":
            back_end.release(number, rest[0])
        else:
            back_end.gradient(number, sizes.pop(rest[0]))
    back_end.end()
    for number, size in sizes.items():
        ledger.add(categories[number], -size)
