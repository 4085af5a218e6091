"""Report of the planner: a plan for each method, as a table and as JSON."""

import bisect
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from addax_ds.optim.methods import FIRST_ORDER, ZEROTH_ORDER, Method
from addax_ds.planner.constants import GB, GRAIN
from addax_ds.planner.memory import Memory, StepSpec, host_bytes, step_memory
from addax_ds.planner.replay import CATEGORIES
from addax_ds.planner.rules import rules_of
from addax_ds.planner.threshold import largest_threshold
from addax_ds.planner.trace import Batch
from addax_ds.utils.versions import versions

MOST_GPUS = 1024
MB = 10**6

_TITLES = ("method", *CATEGORIES, "total", "fits", "GPUs needed", "with checkpointing", "host")
_OF_ZERO3 = "an optimizer of DeepSpeed's, which runs with --sharding zero3 alone"


@dataclass(frozen=True)
class Request:
    """Request to the planner.

    Attributes:
        spec: the model and where it runs; method and batches are put in for each method.
        methods: to plan, each once; those in `left_out` are not.
        zo_rows: rows of a zeroth-order batch on each rank.
        train_rows: rows of a first-order batch on each rank.
        length: tokens of the longest sequence.
        length_threshold: L_T; None for the largest one that fits.
        targets: predicted positions of a sequence at most; None for all.
        gpu_memory: bytes of a GPU.
        reserve: bytes of it that are not for tensors.
        host_memory: bytes of a node's host memory for offloaded shards; None: not compared.
        gpus_per_node: ranks that share a host.
        row_lengths: tokens of each training row, where they are known.
    """

    spec: StepSpec
    methods: tuple[Method, ...]
    zo_rows: int
    train_rows: int
    length: int
    length_threshold: int | None
    targets: int | None
    gpu_memory: int
    reserve: int
    host_memory: int | None
    gpus_per_node: int
    row_lengths: NDArray[np.int32] | None = field(default=None, compare=False)

    @property
    def budget(self) -> int:
        """Bytes for tensors."""
        return self.gpu_memory - self.reserve

    def describe_rows(self) -> Iterator[str]:
        """Describe the training rows, where they are known."""
        if (rows := self.rows_as_json()) is not None:
            yield (
                f"{rows['count']} training rows of {rows['shortest']} to {rows['longest']} tokens, "
                f"median {rows['median']:g}"
            )

    def rows_as_json(self) -> dict[str, int | float] | None:
        """Return the number of training rows and their lengths, where they are known."""
        if (lengths := self.row_lengths) is None:
            return None
        return {
            "count": len(lengths),
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "longest": int(lengths.max()),
        }

    @property
    def left_out(self) -> dict[Method, str]:
        """The methods that do not run on the back end, and why."""
        rules = rules_of(self.spec.sharding)
        return {method: _OF_ZERO3 for method in self.methods if not rules.runs(method)}


@dataclass(frozen=True)
class Plan:
    """One method.

    Attributes:
        method: its name.
        first_order_length: tokens of the longest first-order sequence; None without such ones.
        memory: of a step with the batches that were asked for.
        checkpointed: the same if blocks are recomputed in backward.
        host_per_node: bytes of host memory of a node, where weights are offloaded.
        fits: whether it fits into a GPU and, where that was stated, into host memory.
        gpus_needed: the fewest on which it would, with as many rows on each; None if `MOST_GPUS`
            are not enough. For addax without a given L_T, the fewest on which any L_T fits.
        needed_for: the `first_order_length` that fits on `gpus_needed` GPUs. The two differ only
            for addax without a given L_T.
    """

    method: Method
    first_order_length: int | None
    memory: Memory
    checkpointed: Memory
    host_per_node: int
    fits: bool
    gpus_needed: int | None
    needed_for: int | None


def make_plans(request: Request) -> list[Plan]:
    """Plan every method that runs on the back end."""
    return [_plan(request, method) for method in request.methods if method not in request.left_out]


def _plan(request: Request, method: Method) -> Plan:
    looked_up = method == "addax" and request.length_threshold is None
    length: int | None = request.length
    if method not in FIRST_ORDER:
        length = None
    elif looked_up:
        length = coarse_threshold(request, request.spec) or GRAIN
    elif method == "addax":
        length = request.length_threshold
    spec = with_batches(request, method, length)
    memory = step_memory(spec)
    host_per_node = memory.host * request.gpus_per_node
    in_host = request.host_memory is None or host_per_node <= request.host_memory
    needed = gpus_needed(
        with_batches(request, method, GRAIN) if looked_up else spec,
        request.budget,
        request.host_memory,
        request.gpus_per_node,
    )
    needed_for = length
    if looked_up and needed:
        needed_for = coarse_threshold(request, replace(request.spec, ranks=needed, replicas=1))
    return Plan(
        method=method,
        first_order_length=length,
        memory=memory,
        checkpointed=step_memory(replace(spec, checkpointing=True)),
        host_per_node=host_per_node,
        fits=memory.total <= request.budget and in_host,
        gpus_needed=needed,
        needed_for=needed_for,
    )


def with_batches(
    request: Request, method: Method, length: int | None, on: StepSpec | None = None
) -> StepSpec:
    """Return a method's step, with first-order sequences of ``length``.

    Args:
        request: whose rows and targets they have.
        method: of the step.
        length: tokens; None without first-order sequences.
        on: in place of the request's own step.
    """
    zeroth, first = None, None
    if method in ZEROTH_ORDER:
        zeroth = Batch.of(request.zo_rows, request.length, request.targets)
    if length is not None:
        first = Batch.of(request.train_rows, length, request.targets)
    return replace(on or request.spec, method=method, zeroth_order=zeroth, first_order=first)


def coarse_threshold(request: Request, on: StepSpec) -> int | None:
    """Return the largest multiple of `GRAIN` that fits as addax's L_T, where ``on`` runs."""
    probe = replace(with_batches(request, "addax", GRAIN, on), zeroth_order=None)
    lengths = [*range(GRAIN, request.length, GRAIN), request.length]
    return largest_threshold(probe, lengths, request.budget, request.targets)


def gpus_needed(
    spec: StepSpec, budget: int, host_memory: int | None = None, gpus_per_node: int = 1
) -> int | None:
    """Return the fewest GPUs on which a step of one copy fits: up to 8, in steps of 8, or as asked.

    One alone gathers nothing and reduces nothing, and may need less than two do; from two on memory
    falls with their number, but for padding. Host memory may rise: pinned shards are rounded up.

    Args:
        spec: the step; its number of ranks is one of those that are tried.
        budget: bytes that a rank has for tensors.
        host_memory: bytes of a node's host memory; None if there is enough.
        gpus_per_node: ranks that share it.
    """

    def in_gpu(ranks: int) -> bool:
        return step_memory(replace(spec, ranks=ranks, replicas=1)).total <= budget

    def in_host(ranks: int) -> bool:
        own = host_bytes(replace(spec, ranks=ranks, replicas=1))
        return host_memory is None or own * min(ranks, gpus_per_node) <= host_memory

    if in_gpu(1) and in_host(1):
        return 1
    if not rules_of(spec.sharding).is_sharded:
        return None
    counts = sorted({*range(2, 8), *range(8, MOST_GPUS + 1, 8), max(spec.ranks, 2)})
    # From below by doubling: of a tiny model on very many GPUs most is padding.
    ends = [min(2**k, len(counts)) for k in range(len(counts).bit_length() + 1)]
    end = next((end for end in ends if in_gpu(counts[end - 1])), None)
    if end is None:
        return None
    place = bisect.bisect_left(counts, True, lo=end // 2, hi=end, key=in_gpu)
    return next((ranks for ranks in counts[place:] if in_host(ranks) and in_gpu(ranks)), None)


def as_json(request: Request, plans: list[Plan]) -> dict[str, Any]:
    """Return everything, in bytes."""
    return {
        **request_as_json(request),
        "embedding_gradient": embedding_gradient(request),
        "methods": [
            {
                "method": plan.method,
                "first_order_length": plan.first_order_length,
                "bytes": dict(plan.memory.categories),
                "total": plan.memory.total,
                "peak_in": plan.memory.stage,
                "fits": plan.fits,
                "gpus_needed": plan.gpus_needed,
                "gpus_needed_for_first_order_length": plan.needed_for,
                "bytes_with_checkpointing": dict(plan.checkpointed.categories),
                "total_with_checkpointing": plan.checkpointed.total,
                "host_per_node": plan.host_per_node,
            }
            for plan in plans
        ],
        "not_planned": request.left_out,
    }


def request_as_json(request: Request) -> dict[str, Any]:
    """Return what was asked, and of which versions."""
    shape, spec = request.spec.shape, request.spec
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "dtype": shape.dtype,
        "sharding": spec.sharding,
        "gpus": spec.ranks,
        "nodes": spec.ranks // request.gpus_per_node,
        "gpus_per_node": request.gpus_per_node,
        "replicas": spec.replicas,
        "cpu_offload": spec.cpu_offload,
        "gpu_memory": request.gpu_memory,
        "reserve": request.reserve,
        "host_memory": request.host_memory,
        "per_device_zo_batch_size": request.zo_rows,
        "per_device_train_batch_size": request.train_rows,
        "gradient_accumulation_steps": spec.accumulation,
        "length": request.length,
        "length_threshold": request.length_threshold,
        "target_tokens": request.targets,
        "training_rows": request.rows_as_json(),
        "attn_implementation": spec.attention,
        "activation_checkpointing": spec.checkpointing,
        "zero_optimization": (
            asdict(spec.zero3) if rules_of(spec.sharding).uses_deepspeed else None
        ),
        "versions": versions(),
    }


def embedding_gradient(request: Request) -> int:
    """Bytes of the whole gradient of the output projection, which no bucket divides."""
    shape = request.spec.shape
    return shape.numels[shape.head] * shape.itemsize


def as_table(request: Request, plans: list[Plan]) -> str:
    """Return the plans as lines of text: bytes a GPU, in GB (1e9) or, where they are few, MB."""
    shape, spec = request.spec.shape, request.spec
    most = max(max(plan.memory.total, plan.host_per_node) for plan in plans)
    unit = "GB" if most >= GB else "MB"
    rows = [_TITLES, *(_cells(plan, unit) for plan in plans)]
    # A category that is empty for all says nothing.
    optional = {*CATEGORIES, "host"}
    kept = [
        place
        for place, title in enumerate(_TITLES)
        if title not in optional or {row[place] for row in rows[1:]} - {"0.00"}
    ]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    lines = ["  ".join(row[i].rjust(widths[i]) for i in kept) for row in rows]
    heads = [
        f"{shape.name}: {in_words(shape.parameters)} parameters, {shape.dtype}, "
        f"{spec.sharding} on {spec.ranks} GPU(s) of {request.gpu_memory / GB:g} GB"
        f"{f', {spec.replicas} copies' if spec.replicas > 1 else ''}, "
        f"{request.reserve / GB:g} GB of it kept free",
        ", ".join(_batches(request, plans)),
        *request.describe_rows(),
    ]
    return "\n".join([*heads, "", *lines, "", *_notes(request, plans, unit)])


def in_words(number: int) -> str:
    """Return a number in billions, or where it is less in millions."""
    scale, size = ("billion", 1e9) if number >= 1e9 else ("million", 1e6)
    return f"{number / size:.3g} {scale}"


def _batches(request: Request, plans: list[Plan]) -> Iterator[str]:
    """Describe the batches of the plans."""
    rows, methods = request.train_rows, {plan.method for plan in plans}
    if not methods.isdisjoint(ZEROTH_ORDER):
        yield f"zeroth-order {request.zo_rows} x {request.length} tokens"
    if methods - {"addax", "mezo"}:
        yield f"first-order {rows} x {request.length} tokens"
    for plan in plans:
        if plan.method == "addax":
            note = "L_T"
            if request.length_threshold is None:
                note += ", the largest that fits" if plan.fits else "; a step does not fit"
            yield f"first-order of addax {rows} x {plan.first_order_length} tokens ({note})"


def _cells(plan: Plan, unit: str) -> tuple[str, ...]:
    sizes = plan.memory.categories
    return (
        plan.method,
        *(_in(sizes[category], unit) for category in CATEGORIES),
        _in(plan.memory.total, unit),
        "yes" if plan.fits else "no",
        str(plan.gpus_needed or f"> {MOST_GPUS}"),
        _in(plan.checkpointed.total, unit),
        _in(plan.host_per_node, unit),
    )


def _in(size: int, unit: str) -> str:
    return f"{size / (GB if unit == 'GB' else MB):.2f}"


def _notes(request: Request, plans: list[Plan], unit: str) -> Iterator[str]:
    tensors = f"{unit} ({'1e9' if unit == 'GB' else '1e6'} bytes) of live tensors"
    yield f"{tensors} on a GPU at the moment of a step when they are most."
    for plan in plans:
        if plan.needed_for != plan.first_order_length:
            yield (
                f"GPUs needed by {plan.method}: the fewest on which any L_T fits; the largest that "
                f"fits on {plan.gpus_needed} is {plan.needed_for} tokens."
            )
    if any(plan.first_order_length is not None for plan in plans):
        yield from _of_gradients(request, unit)
    if rules_of(request.spec.sharding).is_offloaded(request.spec):
        yield from _of_host(request, unit)
    for method, why in request.left_out.items():
        yield f"Not planned: {method}, {why}."


def _of_gradients(request: Request, unit: str) -> Iterator[str]:
    shape, own = request.spec.shape, embedding_gradient(request)
    size = f"{_in(own, unit)} {unit}"
    if shape.tied:
        yield (
            f"The whole gradient of the tied embedding has {size}; at the end of backward there "
            "are three for a moment: of the output, of the input, and their sum."
        )
    else:
        yield f"The whole gradient of the output projection has {size}."
    largest = max(shape.numels) * shape.itemsize
    if largest > own:
        yield f"The largest whole gradient of a parameter has {_in(largest, unit)} {unit}."


def _of_host(request: Request, unit: str) -> Iterator[str]:
    note = f"host: {unit} of host memory of a node with {request.gpus_per_node} GPU(s)"
    if request.host_memory is None:
        yield f"{note}; give --host_memory to compare it."
    else:
        yield f"{note}, which has {request.host_memory / GB:g} GB."
    if rules_of(request.spec.sharding).is_pinned(request.spec):
        yield (
            "torch rounds pinned tensors up to a power of two; with ZeRO-3's offload_param "
            '{"pin_memory": false} the host needs less, and transfers are slower.'
        )
