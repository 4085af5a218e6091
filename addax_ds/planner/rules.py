"""The planner's rules for each back end, by its name."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from addax_ds.optim.methods import BASELINES, FIRST_ORDER, Method
from addax_ds.planner.fsdp2 import Fsdp2Pass, fsdp2_shard
from addax_ds.planner.replay import BackEndPass, Ledger, UnshardedPass
from addax_ds.planner.shapes import ModelShape
from addax_ds.planner.trace import Trace
from addax_ds.planner.zero3 import Zero3Pass, Zero3Settings, Zero3Setup
from addax_ds.utils.errors import UserError

if TYPE_CHECKING:
    from addax_ds.planner.memory import StepSpec


class Rules:
    """Rules of one back end; the defaults are those of a whole model on each rank.

    Attributes:
        is_sharded: whether a rank needs less memory if there are more of them.
        uses_deepspeed: whether the settings of a DeepSpeed JSON apply.
        has_replicas: whether there may be several copies of the weights, each sharded.
        offload_flag: what puts the shards into host memory; None if nothing does.
            `StepSpec.cpu_offload` applies where it is ``--cpu_offload``.
    """

    is_sharded = False
    uses_deepspeed = False
    has_replicas = False
    offload_flag: str | None = None

    def runs(self, method: Method) -> bool:
        """Return whether a method runs: torch's optimizers need DeepSpeed's."""
        return self.uses_deepspeed or method not in BASELINES

    def shards(self, shape: ModelShape, ranks: int) -> list[int]:
        """Return the elements of each parameter that a rank holds, padding included."""
        return list(shape.numels)

    def bucket_elements(self, spec: "StepSpec") -> int:
        """Return the elements of the buffer that gradients are reduced from, if there are any."""
        return 0

    def is_offloaded(self, spec: "StepSpec") -> bool:
        """Return whether the shards are in host memory."""
        return False

    def is_pinned(self, spec: "StepSpec") -> bool:
        """Return whether the shards are pinned there, if there is a GPU."""
        return False

    def with_offload(self, spec: "StepSpec", on: bool) -> "StepSpec":
        """Return the same with the shards in host memory, as `offload_flag` has them, or not."""
        return spec

    def has_zero3_linear(self, zero3: Zero3Settings) -> bool:
        """Return whether linear layers are DeepSpeed's."""
        return False

    def make_pass(
        self, spec: "StepSpec", ledger: Ledger, tape: Trace, *, perturbed: bool
    ) -> BackEndPass:
        """Return the back end during one pass, over the tape of it."""
        return UnshardedPass(ledger, spec.shape, perturbed=perturbed)


class _Fsdp2(Rules):
    is_sharded = True
    has_replicas = True
    offload_flag = "--cpu_offload"

    def shards(self, shape: ModelShape, ranks: int) -> list[int]:
        parameters = range(len(shape.sizes))
        return [fsdp2_shard(shape, ranks, (p,)) // shape.itemsize for p in parameters]

    def is_offloaded(self, spec: "StepSpec") -> bool:
        return spec.cpu_offload

    def is_pinned(self, spec: "StepSpec") -> bool:
        return spec.cpu_offload

    def with_offload(self, spec: "StepSpec", on: bool) -> "StepSpec":
        return replace(spec, cpu_offload=on)

    def make_pass(
        self, spec: "StepSpec", ledger: Ledger, tape: Trace, *, perturbed: bool
    ) -> BackEndPass:
        return Fsdp2Pass(
            ledger,
            spec.shape,
            spec.sharded_over,
            perturbed=perturbed,
            gloo=not spec.cuda,
            replicated=spec.replicas > 1,
            offloaded=spec.cpu_offload,
        )


class _Zero3(Rules):
    is_sharded = True
    uses_deepspeed = True
    offload_flag = "--deepspeed zero3_offload"

    def shards(self, shape: ModelShape, ranks: int) -> list[int]:
        return [math.ceil(numel / ranks) for numel in shape.numels]

    def bucket_elements(self, spec: "StepSpec") -> int:
        settings = self._setup(spec).settings
        needed = settings.contiguous_gradients and spec.method in FIRST_ORDER
        return settings.reduce_bucket_size if needed else 0

    def is_offloaded(self, spec: "StepSpec") -> bool:
        return spec.zero3.offload

    def is_pinned(self, spec: "StepSpec") -> bool:
        return spec.zero3.pin_memory

    def with_offload(self, spec: "StepSpec", on: bool) -> "StepSpec":
        own = spec.zero3
        return replace(spec, zero3=replace(own, offload=on, pin_memory=own.pin_memory or on))

    def has_zero3_linear(self, zero3: Zero3Settings) -> bool:
        return zero3.memory_efficient_linear

    def make_pass(
        self, spec: "StepSpec", ledger: Ledger, tape: Trace, *, perturbed: bool
    ) -> BackEndPass:
        setup = self._setup(spec)
        return Zero3Pass(ledger, spec.shape, setup, tape, perturbed=perturbed)

    def _setup(self, spec: "StepSpec") -> Zero3Setup:
        """Return how the step runs: DeepSpeed's own optimizers know no leaf blocks."""
        shape, zero3, stock = spec.shape, spec.zero3, spec.method in BASELINES
        return Zero3Setup(
            settings=zero3 if stock else zero3.raised_for_leaf_blocks(shape),
            ranks=spec.ranks,
            leaf_blocks={} if stock else zero3.leaf_blocks(shape),
            keeps_persistent=stock,
            gloo=not spec.cuda,
        )


RULES: dict[str, Rules] = {"zero3": _Zero3(), "fsdp2": _Fsdp2(), "none": Rules()}
"""By the name of the back end, its ``--sharding``."""


def rules_of(sharding: str) -> Rules:
    """Return the rules of a back end.

    Raises:
        UserError: the planner has none.
    """
    if sharding not in RULES:
        raise UserError(f"the planner has no rules for --sharding {sharding}")
    return RULES[sharding]
