"""Streams of a pretended GPU: finds accesses that nothing orders, on a CPU that runs them in order.

Each stream has a vector clock. What is launched on it happens after all that the stream and the
host have waited for. Kernels and collectives tell `Order` what they read and write; two accesses of
one tensor, one of them a write, that no wait connects are a race, which a GPU would run in any
order. The host's own waits are counted.

Offloaded tensors lie with the host, which writes them itself, in the order of its program and its
waits; a copy of one to the device is launched on the current stream, and reads it.
"""

import contextlib
import re
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

from addax_ds import kernels
from addax_ds.kernels.operation import Operation, Slice

NOBODY = re.compile(r"/torch/|/tests/|<")
"""Files whose functions wait for others."""


class Clock(dict[str, int]):
    """Number of the last launch on each stream that has ended."""

    def join(self, other: "Clock") -> None:
        for stream, launch in other.items():
            self[stream] = max(launch, self.get(stream, 0))


class Order:
    """What is ordered before what.

    Attributes:
        watched: names of the tensors whose accesses count, by address.
        races: pairs of accesses that nothing orders.
        accesses: by what they are, and the stream.
        lead: most launches on the main stream that a collective was begun without waiting for.
        host_waits: by the function of this project that waited; "engine" for those of others.
        offloaded: whether the watched tensors lie with the host.
        brings_gradients: whether the update itself brings gradients to them, and waits.
    """

    def __init__(self) -> None:
        self.host = Clock()
        self.streams: list[Stream] = []
        self.main, self.nccl = Stream(self, "main"), Stream(self, "nccl")
        self.processor = Stream(self, "host")
        self.processor.clock = self.host
        self.offloaded = self.brings_gradients = False
        self.current = [self.main]
        self.watched: dict[int, str] = {}
        self.races: Counter[str] = Counter()
        self.accesses: Counter[str] = Counter()
        self.lead = 0
        self.host_waits: Counter[str] = Counter()
        self._writes: dict[int, tuple[str, int, str]] = {}
        self._reads: dict[int, dict[str, tuple[str, int, str]]] = defaultdict(dict)

    def launch(self) -> "Stream":
        """Launch something on the current stream."""
        stream = self.current[-1]
        stream.clock.join(self.host)
        stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        return stream

    def access(self, tensor: Tensor, what: str, write: bool = False) -> None:
        """Note that what was launched last on the current stream reads or writes a tensor."""
        stream, key = self.current[-1], tensor.data_ptr()
        if key not in self.watched:
            return
        before = [self._writes[key]] if key in self._writes else []
        if write:
            before += self._reads[key].values()
        for name, launch, other in before:
            if stream.clock.get(name, 0) < launch:
                self.races[f"{what} on {stream.name} beside {other} on {name}"] += 1
        note = (stream.name, stream.clock[stream.name], what)
        if write:
            self._reads[key].clear()
            self._writes[key] = note
        else:
            self._reads[key][stream.name] = note
        self.accesses[f"{what} on {stream.name}"] += 1

    def wait(self, clock: Clock) -> None:
        """Let the host wait."""
        self.host.join(clock)
        frames = [f for f in traceback.extract_stack() if not NOBODY.search(f.filename)]
        own = "/addax_ds/" in frames[-1].filename
        self.host_waits[frames[-1].name if own else "engine"] += 1

    @contextlib.contextmanager
    def on(self, stream: "Stream | None") -> Iterator[None]:
        """Make a stream the current one."""
        self.current.append(stream or self.current[-1])
        try:
            yield
        finally:
            self.current.pop()

    def collective(self, run: Callable[[], Any], reads: Tensor, writes: Tensor) -> Any:
        """Run a collective on the stream of NCCL, after what was launched on the current one."""
        launched, awaited = (s.clock.get("main", 0) for s in (self.main, self.launch()))
        self.lead = max(self.lead, launched - awaited)
        self.nccl.clock.join(self.current[-1].clock)
        with self.on(self.nccl):
            self.launch()
            self.access(reads, "collective reads")
            self.access(writes, "collective writes", write=True)
        return run()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Note what the kernels read and write, and count what the host reads of a tensor."""
        fused = kernels.fused

        def noted(
            slices: Sequence[Slice],
            operation: Operation,
            out: Tensor | None = None,
            gradients: Sequence[Tensor] | None = None,
            kept: Tensor | None = None,
        ) -> None:
            what = "update" if out is None else "perturbation"
            by_host = self.offloaded and out is None
            if by_host and gradients is not None and self.brings_gradients:
                self.wait(self.current[-1].clock)
            with self.on(self.processor if by_host else None):
                self.launch()
                for each in slices:
                    self.access(each.data, what, write=out is None)
            fused(slices, operation, out, gradients, kept)

        patch.setattr(kernels, "fused", noted)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        for name in ("tolist", "item"):
            read = getattr(Tensor, name)

            # What is launched after such a wait may not count on it: it is no one's order. What
            # the host itself does comes after it all the same.
            def waiting(tensor: Tensor, read: Callable[[Tensor], Any] = read) -> Any:
                self.wait(self.current[-1].clock if self.offloaded else Clock())
                return read(tensor)

            patch.setattr(Tensor, name, waiting)

    def offload(self, patch: pytest.MonkeyPatch) -> None:
        """Let the watched tensors lie with the host, and ``to(..., non_blocking=...)`` be a copy.

        One that blocks makes the host wait, as for a gradient that comes to its shard.
        """
        self.offloaded, move = True, Tensor.to

        def moved(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
            if "non_blocking" in more:
                self.launch()
                self.access(tensor, "copy")
                if not more["non_blocking"]:
                    self.wait(self.current[-1].clock)
            return move(tensor, *args, **more)

        patch.setattr(Tensor, "to", moved)


class Stream:
    """In place of `torch.cuda.Stream`."""

    def __init__(self, order: Order, name: str | None = None) -> None:
        self.name = name or f"stream {len(order.streams)}"
        self.clock = Clock()
        self._order = order
        order.streams.append(self)

    def wait_stream(self, other: "Stream") -> None:
        self.clock.join(other.clock)

    def wait_event(self, event: "Event") -> None:
        self.clock.join(event.clock)

    def synchronize(self) -> None:
        self._order.wait(self.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._order)
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """In place of `torch.cuda.Event`."""

    def __init__(self, order: Order, **_: Any) -> None:
        self.clock = Clock()
        self._order = order

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Clock((stream or self._order.current[-1]).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._order.current[-1]).clock.join(self.clock)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._order.wait(self.clock)


class Work:
    """A collective that runs; a stream that waits for it goes on after it."""

    def __init__(self, order: Order, work: Any) -> None:
        self._order, self._work = order, work
        self._clock = Clock(order.nccl.clock)

    def wait(self, *_: Any) -> Any:
        self._order.current[-1].clock.join(self._clock)
        return self._work.wait() if self._work is not None else None

    def is_completed(self) -> bool:
        return True
