"""Bytes that one rank needs for a training step: a pure function of `StepSpec`.

The total is the largest sum of live tensors at any moment of the step, the weights included. Not in
it are the CUDA context, what kernels and NCCL allocate for themselves, and blocks that the caching
allocator holds without use.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType

from addax_ds.optim.methods import BASELINES, Method
from addax_ds.planner.replay import Ledger, replay
from addax_ds.planner.rules import rules_of
from addax_ds.planner.shapes import ModelShape
from addax_ds.planner.trace import Batch, trace
from addax_ds.planner.zero3 import Zero3Settings

_FP32 = 4


@dataclass(frozen=True)
class StepSpec:
    """What a step computes, and where: all that its memory depends on.

    Attributes:
        shape: of the model.
        method: "sgd" and "adamw" are torch's, in DeepSpeed's ZeRO-3 optimizer.
        sharding: name of the back end (`addax_ds.planner.rules`).
        ranks: number of GPUs.
        replicas: copies of the weights; each is sharded over its part of the GPUs.
        zeroth_order: batch of the passes without a backward, which follow each other, so that their
            number does not matter; None without such passes.
        first_order: batch of the pass with a backward; None without it.
        checkpointing: whether blocks are recomputed in backward.
        attention: "eager", "sdpa" or a flash implementation; None for the model's own choice.
        zero3: settings of DeepSpeed; only read for a back end that it configures.
        accumulation: micro-batches of a step.
        cuda: whether the device is a GPU.
        cpu_offload: whether the shards are in host memory, of a back end without a JSON that says
            so.
    """

    shape: ModelShape
    method: Method
    sharding: str
    ranks: int
    zeroth_order: Batch | None
    first_order: Batch | None
    _: KW_ONLY
    checkpointing: bool = False
    attention: str | None = None
    zero3: Zero3Settings = field(default_factory=Zero3Settings)
    accumulation: int = 1
    cuda: bool = True
    replicas: int = 1
    cpu_offload: bool = False

    @property
    def sharded_over(self) -> int:
        """GPUs that hold one copy of the weights together."""
        return self.ranks // self.replicas


@dataclass(frozen=True)
class Memory:
    """Memory that a rank needs.

    Attributes:
        categories: bytes at the moment of the largest total (`addax_ds.planner.replay.CATEGORIES`).
        total: their sum.
        host: bytes of host memory that this rank needs besides, where weights are offloaded.
        stage: the part of the step in which that moment lies.
    """

    categories: Mapping[str, int]
    total: int
    host: int
    stage: str


def step_memory(spec: StepSpec) -> Memory:
    """Return what one rank needs for a step after the second one."""
    standing = standing_bytes(spec)
    stages = []
    # Sums over micro-batches begin with the first backward, when zeroth-order passes are over.
    without_sums = {name: size for name, size in standing.items() if name != "gradients"}
    if spec.zeroth_order is not None:
        stages.append(("zeroth-order", _pass(spec, spec.zeroth_order, without_sums)))
    if spec.first_order is not None:
        sums = _sums(spec) if "gradients" in standing else {}
        passes = [(without_sums, sums)]
        if sums:
            passes.append((standing, {p: -size for p, size in sums.items()}))
        if sums and spec.accumulation > 2:
            passes.append((standing, {}))
        for held, changes in passes:
            stages.append(("first-order", _pass(spec, spec.first_order, held, changes)))
    if spec.method in BASELINES:
        stages.append(("update", _update(spec, standing)))
    stage, ledger = max(stages, key=lambda entry: entry[1].peak_total)
    return Memory(ledger.peak, ledger.peak_total, host_bytes(spec), stage)


def standing_bytes(spec: StepSpec) -> dict[str, int]:
    """Return what is there all the time, by category.

    - Weights: each parameter cut into equal parts, padded (ZeRO-3, Rajbhandari et al., "ZeRO",
      section 5.3: 2 psi / N for 16-bit weights); rows of it under FSDP2.
    - One bucket of ``reduce_bucket_size`` in the weights' type, for Addax at least a decoder layer
      (``_setup_for_real_optimizer`` of ``Stage3`` and of DeepSpeed).
    - SGD and AdamW of DeepSpeed: fp32 master weights, a partition for gradients in the weights'
      type, and for AdamW two fp32 moments: with the 16-bit weights 16 bytes a parameter over the
      ranks (``_create_fp32_partitions``, ``grad_partitions_flat_buffer``).
    - fp32 sums of the gradient shards if there are several micro-batches
      (`GradientSums`); with offload they lie in host memory, as the shards do.
    """
    shape, elements = spec.shape, sum(_shards(spec))
    standing = {"weights": 0 if _is_offloaded(spec) else elements * shape.itemsize}
    if bucket := rules_of(spec.sharding).bucket_elements(spec):
        standing["buckets"] = bucket * shape.itemsize
    if spec.method in BASELINES:
        master_and_moments = _FP32 * (3 if spec.method == "adamw" else 1)
        standing["optimizer"] = elements * (master_and_moments + shape.itemsize)
        standing["persistent"] = shape.itemsize * sum(
            shape.numels[p] for p in spec.zero3.persistent(shape) if spec.ranks > 1
        )
    elif _sum_bytes(spec) and not _is_offloaded(spec):
        standing["gradients"] = elements * _sum_bytes(spec)
    return standing


def _is_offloaded(spec: StepSpec) -> bool:
    return rules_of(spec.sharding).is_offloaded(spec)


def _sum_bytes(spec: StepSpec) -> int:
    """Bytes an element of the sums over micro-batches; DeepSpeed's optimizers have none."""
    is_summed = spec.accumulation > 1 and spec.first_order is not None
    return _FP32 if is_summed and spec.method not in BASELINES else 0


def _shards(spec: StepSpec) -> list[int]:
    """Return the elements of each parameter that a rank holds, padding included."""
    return rules_of(spec.sharding).shards(spec.shape, spec.sharded_over)


def _sums(spec: StepSpec) -> dict[int, int]:
    """Return the bytes of the sum over micro-batches of each parameter."""
    sum_bytes = _sum_bytes(spec)
    return {parameter: sum_bytes * count for parameter, count in enumerate(_shards(spec))}


def _pass(
    spec: StepSpec,
    batch: Batch,
    standing: Mapping[str, int],
    sums: Mapping[int, int] = MappingProxyType({}),
) -> Ledger:
    """Replay one pass; a zeroth-order one is perturbed. For ``sums`` see `BackEndPass`."""
    backward = batch is spec.first_order
    rules = rules_of(spec.sharding)
    tape = trace(
        spec.shape,
        batch,
        backward=backward,
        checkpointing=spec.checkpointing,
        attention=spec.attention,
        cuda=spec.cuda,
        zero3_linear=rules.has_zero3_linear(spec.zero3),
    )
    ledger = Ledger(standing)
    back_end = rules.make_pass(spec, ledger, tape, perturbed=not backward)
    back_end.sums = sums
    replay(tape, back_end)
    return ledger


def _update(spec: StepSpec, standing: Mapping[str, int]) -> Ledger:
    """Account for the update of DeepSpeed's own optimizer, one sub-group after the other.

    The gradients of a sub-group are flattened and widened to fp32
    (``_prepare_fp32_grad_for_sub_group``); torch's AdamW makes the root of the second moment, and
    on a CPU its quotient too (``torch.optim.adamw``).
    """
    ledger = Ledger(standing)
    elements = max(_sub_groups(spec))
    shape = spec.shape
    ledger.add("optimizer", elements * shape.itemsize)
    ledger.add("optimizer", elements * _FP32)
    ledger.add("optimizer", -elements * shape.itemsize)
    if spec.method == "adamw":
        ledger.add("optimizer", elements * _FP32 * (1 if spec.cuda else 2))
    return ledger


def _sub_groups(spec: StepSpec) -> list[int]:
    """Elements of the parts in which the update goes (``_create_fp16_sub_groups``)."""
    groups = [0]
    for elements in _shards(spec):
        if groups[-1] >= spec.zero3.sub_group_size:
            groups.append(0)
        groups[-1] += elements
    return groups


def host_bytes(spec: StepSpec) -> int:
    """Return the host memory of a rank with offloaded shards: these, and sums.

    A shard is perturbed on the GPU. torch rounds every pinned tensor up to a power of two
    (``CachingHostAllocator.h``); sums over micro-batches are not pinned.
    """
    if not _is_offloaded(spec):
        return 0
    elements = _shards(spec)
    shards = [count * spec.shape.itemsize for count in elements]
    if rules_of(spec.sharding).is_pinned(spec) and spec.cuda:
        shards = [1 << (size - 1).bit_length() for size in shards]
    return sum(shards) + sum(elements) * _sum_bytes(spec)
