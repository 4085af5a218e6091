"""ZeRO-3 during a pass: its rules for gathering, prefetching, keeping and reducing.

The rules are DeepSpeed's (0.19.8): `PartitionedParameterCoordinator` decides what is gathered when,
`partition_parameters` in which buffers, `stage3` how gradients travel; what a perturbed pass adds
is `addax_ds.sharding.zero3`. It is the third step or a later one: the order of modules is known.
"""

import bisect
import math
import sys
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from addax_ds.config.deepspeed import automatic_sizes
from addax_ds.planner.replay import BackEndPass, Ledger
from addax_ds.planner.shapes import ModelShape
from addax_ds.planner.trace import Trace


@dataclass(frozen=True)
class Zero3Settings:
    """Keys of ``zero_optimization`` that memory depends on; sizes are in elements.

    Addax raises two of them (`raised_for_leaf_blocks`).

    Attributes:
        reduce_bucket_size: elements of the buffer that gradients are reduced from.
        stage3_prefetch_bucket_size: elements gathered ahead of their module.
        stage3_param_persistence_threshold: parameters up to this size stay whole during a pass.
        stage3_model_persistence_threshold: elements of all of them together.
        stage3_max_live_parameters: nothing is prefetched beyond.
        stage3_max_reuse_distance: a parameter that is used again sooner stays gathered.
        sub_group_size: elements that DeepSpeed's own optimizer updates at once.
        contiguous_gradients: whether there is a bucket that gradients are copied to.
        memory_efficient_linear: whether linear layers are DeepSpeed's, which ``zero.Init`` puts in
            place of torch's.
        offload: whether the shards are in host memory.
        pin_memory: whether they are pinned there.
    """

    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    stage3_model_persistence_threshold: int = sys.maxsize
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000
    contiguous_gradients: bool = True
    memory_efficient_linear: bool = True
    offload: bool = False
    pin_memory: bool = False

    @classmethod
    def from_json(cls, zero: Mapping[str, Any], hidden: int) -> "Zero3Settings":
        """Read a ``zero_optimization`` block; "auto" becomes what Trainer makes of it.

        Args:
            zero: the block, checked by `addax_ds.config.deepspeed.check_ds_config`.
            hidden: hidden size of the model.
        """
        automatic = automatic_sizes(hidden)
        values: dict[str, Any] = {}
        for name in cls.__dataclass_fields__:
            value = zero.get(name, zero.get(name.removeprefix("stage3_")))
            if value == "auto":
                value = automatic[name]
            if value is not None:
                values[name] = value if isinstance(value, bool) else int(value)
        offload = zero.get("offload_param") or {}
        return cls(
            **values
            | {
                "offload": offload.get("device", "none") == "cpu",
                "pin_memory": offload.get("pin_memory", False),
            }
        )

    def leaf_blocks(self, shape: ModelShape) -> dict[int, tuple[int, ...]]:
        """Return the parameters of the blocks that Addax makes leaf modules of DeepSpeed.

        Each is gathered as one (`addax_ds.sharding.zero3_layers.whole_layers`). The keys are their
        modules.
        """
        limit = self.stage3_max_live_parameters
        whole = zip(shape.blocks, shape.block_parameters, strict=True)
        return {
            block: parameters
            for block, parameters in whole
            if block in shape.uniform and 2 * sum(shape.numels[p] for p in parameters) <= limit
        }

    def raised_for_leaf_blocks(self, shape: ModelShape) -> "Zero3Settings":
        """Return settings with which each of `leaf_blocks` is prefetched and reduced as one."""
        blocks, persistent = self.leaf_blocks(shape).values(), self.persistent(shape)
        if not blocks:
            return self
        reduced = max(sum(shape.numels[p] for p in ps) for ps in blocks)
        travels = max(sum(shape.numels[p] for p in ps if p not in persistent) for ps in blocks)
        ahead = self.stage3_prefetch_bucket_size
        ahead = max(ahead, travels) if ahead else 0
        return replace(
            self,
            reduce_bucket_size=max(self.reduce_bucket_size, reduced),
            stage3_prefetch_bucket_size=ahead,
        )

    def persistent(self, shape: ModelShape) -> frozenset[int]:
        """Return the parameters that stay whole (``mark_persistent_parameters``)."""
        found, total = set(), 0
        for index, numel in enumerate(shape.numels):
            fits = total + numel <= self.stage3_model_persistence_threshold
            if numel <= self.stage3_param_persistence_threshold and fits:
                found.add(index)
                total += numel
        return frozenset(found)


@dataclass(frozen=True)
class Zero3Setup:
    """How ZeRO-3 runs in all passes of a step.

    Attributes:
        settings: of DeepSpeed; for Addax raised for its leaf blocks.
        ranks: over which parameters are partitioned.
        leaf_blocks: parameters of the blocks that are gathered as one, by the block's module.
        keeps_persistent: whether persistent parameters stay whole between passes, as DeepSpeed's
            own optimizer has it; Addax gathers them at the start of each pass.
        gloo: whether gloo reduces, which copies what it is given.
    """

    settings: Zero3Settings
    ranks: int
    leaf_blocks: Mapping[int, tuple[int, ...]]
    keeps_persistent: bool
    gloo: bool


class _Collective:
    """One all-gather: its buffer lives until the last of its parameters was waited for."""

    def __init__(self, parameters: Collection[int], buffer: int) -> None:
        self.waiting = set(parameters)
        self.buffer = buffer
        self.done = False


class Zero3Pass(BackEndPass):
    """ZeRO-3 during one pass.

    Args:
        ledger: the account.
        shape: of the model.
        setup: of the step.
        trace: of the pass; the order of its modules is what DeepSpeed has recorded.
        perturbed: whether what travels is a perturbed copy; no backward follows then.
    """

    def __init__(
        self,
        ledger: Ledger,
        shape: ModelShape,
        setup: Zero3Setup,
        trace: Trace,
        *,
        perturbed: bool,
    ) -> None:
        super().__init__(ledger)
        self._shape, self._setup, self._perturbed = shape, setup, perturbed
        self._settings, self._ranks = setup.settings, setup.ranks
        self._persistent = setup.settings.persistent(shape)
        self._modules = dict(enumerate(shape.modules))
        self._merge_leaf_blocks(trace)
        self._order = [e[1] for e in trace.events if e[0] == "fetch" and e[1] in self._modules]
        self._distances, self._uses = [0], [[] for _ in shape.numels]  # type: ignore[var-annotated]
        self._queue: deque[tuple[int, int]] = deque()
        for position, module in enumerate(self._order):
            parameters = self._modules[module]
            self._distances.append(self._distances[-1] + sum(self._numels(parameters)))
            for parameter in sorted(parameters):
                self._uses[parameter].append(position)
                self._queue.append((parameter, position))
        self._step = 0
        self._available = 0
        self._last_fetched: dict[int, int] = {}
        self._held: dict[int, int] = {}  # bytes of each gathered parameter
        self._in_flight: dict[int, _Collective] = {}
        self._active: dict[int, list[int]] = {}
        self._bucket: list[tuple[int, int]] = []  # parameter, bytes outside of the bucket's buffer
        self._bucket_elements = 0

    def _merge_leaf_blocks(self, trace: Trace) -> None:
        """Give each leaf block all its parameters (`addax_ds.sharding.zero3_layers`)."""
        blocks, within = self._setup.leaf_blocks, None
        for kind, module, *_ in trace.events:
            if kind == "fetch" and within is None and module in blocks:
                within = module
            elif kind == "release" and module == within:
                within = None
            elif kind == "fetch" and within is not None:
                self._modules.pop(module, None)
        self._modules |= blocks

    # ---- gathering -----------------------------------------------------------------------------

    @override
    def begin(self) -> None:
        if self._setup.keeps_persistent:
            self._held.update(dict.fromkeys(self._persistent, 0))
        elif self._persistent:
            self._all_gather(sorted(self._persistent))
            self._wait(sorted(self._persistent))

    @override
    def fetch(self, module: int, is_forward: bool) -> None:
        needed = self._modules.get(module)
        if needed is None:
            return
        self._start([p for p in needed if not self._is_gathered(p)])
        for parameter in needed:
            self._active.setdefault(parameter, []).append(module)
        self._wait(needed)
        self._forget_fetched(needed)
        self._prefetch()
        self._step += 1

    @override
    def release(self, module: int, is_forward: bool) -> None:
        for parameter in self._modules.get(module, ()):
            users = self._active.get(parameter, [])
            if module in users:
                self._active[parameter] = [user for user in users if user != module]
            is_whole = parameter in self._held and parameter not in self._in_flight
            if is_whole and not self._active.get(parameter) and not self._is_kept(parameter):
                self._free(parameter)
                self._available -= self._shape.numels[parameter]

    def _is_kept(self, parameter: int) -> bool:
        """Return whether a release leaves a parameter gathered (``__params_to_release``)."""
        if parameter in self._persistent or self._last_fetched.get(parameter, -1) > self._step:
            return True
        uses = self._uses[parameter]
        following = bisect.bisect_left(uses, self._step)
        if following == len(uses):
            return False
        distance = self._distances[uses[following]] - self._distances[self._step]
        return distance < self._settings.stage3_max_reuse_distance

    def _is_gathered(self, parameter: int) -> bool:
        return parameter in self._held or parameter in self._in_flight

    def _forget_fetched(self, needed: Collection[int]) -> None:
        """Take what a module has fetched out of the queue of what is to be prefetched."""
        fresh = {p for p in needed if self._last_fetched.get(p, -1) < self._step}
        found: set[int] = set()
        while self._queue and len(found) < len(fresh):
            parameter, position = self._queue.popleft()
            self._last_fetched[parameter] = position
            found.add(parameter)

    def _prefetch(self) -> None:
        settings = self._settings
        room = settings.stage3_max_live_parameters - self._available
        ahead = settings.stage3_prefetch_bucket_size
        if self._setup.leaf_blocks:
            ahead -= sum(self._numels(self._in_flight))
        limit = min(room, ahead)
        chosen: list[int] = []
        elements = 0
        while self._queue and elements < limit:
            parameter, position = self._queue.popleft()
            self._last_fetched[parameter] = max(self._last_fetched.get(parameter, -1), position)
            if not self._is_gathered(parameter) and parameter not in chosen:
                chosen.append(parameter)
                elements += self._shape.numels[parameter]
        self._start(chosen)

    def _start(self, parameters: Collection[int]) -> None:
        if parameters:
            self._available += sum(self._numels(parameters))
            self._all_gather(parameters)

    def _all_gather(self, parameters: Collection[int]) -> None:
        """Start a collective (``all_gather_coalesced``).

        One rank alone sees its shard, or a copy of it. Of a single parameter the whole is gathered
        into its place, and what travels lives as long as the collective; several are first copied
        into one buffer.
        """
        shape, ranks = self._shape, self._ranks
        copied = self._perturbed or self._settings.offload
        if ranks == 1:
            for parameter in parameters:
                self._hold(parameter, self._bytes(parameter) if copied else 0)
                self._in_flight[parameter] = _Collective([parameter], 0)
            if self._perturbed and self._settings.offload:  # besides what came from the host
                moved = sum(map(self._bytes, parameters))
                self._add("gathered", moved)
                self._add("gathered", -moved)
            return
        travelling = sum(self._partition(p) for p in parameters) * shape.itemsize
        copies = travelling if copied else 0
        self._add("gathered", copies)
        if len(parameters) == 1:
            (parameter,) = parameters
            self._hold(parameter, self._partition(parameter) * ranks * shape.itemsize)
            collective = _Collective(parameters, copies)
            collective.done = True
        else:
            collective = _Collective(parameters, travelling * ranks)
            self._add("gathered", collective.buffer)
            self._add("gathered", -copies)
        self._in_flight.update(dict.fromkeys(parameters, collective))

    def _wait(self, parameters: Collection[int]) -> None:
        for parameter in parameters:
            collective = self._in_flight.pop(parameter, None)
            if collective is None:
                continue
            if not collective.done and self._ranks > 1:
                for gathered in collective.waiting:
                    self._hold(gathered, self._bytes(gathered))
            collective.done = True
            collective.waiting.discard(parameter)
            if not collective.waiting:
                self._add("gathered", -collective.buffer)

    # ---- gradients -----------------------------------------------------------------------------

    @override
    def gradient(self, parameter: int, size: int) -> None:
        numel, limit = self._shape.numels[parameter], self._settings.reduce_bucket_size
        if self._bucket and self._bucket_elements + numel > limit:
            self._reduce()
        if self._settings.contiguous_gradients and self._bucket_elements + numel <= limit:
            self._add("gradients", -size)
            size = 0
        self._bucket.append((parameter, size))
        self._bucket_elements += numel

    def _reduce(self) -> None:
        """Reduce-scatter the bucket (``reduce_scatter_coalesced``).

        Several gradients, and one that has to be padded, are first copied in the order of ranks.
        """
        numel = sum(self._numels([p for p, _ in self._bucket]))
        padded = sum(self._partition(p) for p, _ in self._bucket) * self._ranks
        in_place = len(self._bucket) == 1 and padded == numel
        copies = (0 if in_place else 1) + (1 if self._setup.gloo else 0)
        buffer = copies * padded * self._shape.itemsize
        self._add("buckets", buffer)
        self._add("gradients", -sum(size for _, size in self._bucket))
        self.reduced(p for p, _ in self._bucket)
        self._add("buckets", -buffer)
        self._bucket.clear()
        self._bucket_elements = 0

    @override
    def end(self) -> None:
        if self._bucket:
            self._reduce()
        self._wait(list(self._in_flight))
        for parameter in list(self._held):
            self._free(parameter)

    # ---- bytes ---------------------------------------------------------------------------------

    def _numels(self, parameters: Collection[int]) -> list[int]:
        return [self._shape.numels[p] for p in parameters]

    def _bytes(self, parameter: int) -> int:
        return self._shape.numels[parameter] * self._shape.itemsize

    def _partition(self, parameter: int) -> int:
        return math.ceil(self._shape.numels[parameter] / self._ranks)

    def _hold(self, parameter: int, size: int) -> None:
        self._held[parameter] = size
        self._add(self._place(parameter), size)

    def _free(self, parameter: int) -> None:
        self._add(self._place(parameter), -self._held.pop(parameter))

    def _place(self, parameter: int) -> str:
        return "persistent" if parameter in self._persistent else "gathered"

    def _add(self, category: str, size: int) -> None:
        if size:
            self.ledger.add(category, size)
