"""What the planner says: a plan for each method, as a table and as JSON."""

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from addax_ds.data.partition import BASELINES, ZEROTH_ORDER, Method
from addax_ds.planner.memory import Inputs, Memory, step_memory
from addax_ds.planner.replay import CATEGORIES
from addax_ds.planner.threshold import batch, largest_threshold

MOST_GPUS = 1024
GRAIN = 16
"""Tokens; L_T is planned in multiples of it."""
GB = 10**9
RESERVE = 4 * GB
"""Of a GPU's memory, for what is not a tensor: CUDA context, NCCL, fragmentation; an assumption."""

_TITLES = ("method", *CATEGORIES, "total", "fits", "GPUs needed", "with checkpointing", "host")


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        inputs: the model and where it runs; method and batches are put in for each method.
        zo_rows: rows of a zeroth-order batch on each rank.
        train_rows: rows of a first-order batch on each rank.
        length: tokens of the longest sequence.
        length_threshold: L_T; None for the largest one that fits.
        targets: predicted positions of a sequence at most; None for all.
        gpu_memory: bytes of a GPU.
        reserve: bytes of it that are not for tensors.
        gpus_per_node: ranks that share a host.
    """

    inputs: Inputs
    zo_rows: int
    train_rows: int
    length: int
    length_threshold: int | None
    targets: int | None
    gpu_memory: int
    reserve: int
    gpus_per_node: int

    @property
    def budget(self) -> int:
        """Bytes for tensors."""
        return self.gpu_memory - self.reserve


@dataclass(frozen=True)
class Plan:
    """One method.

    Attributes:
        method: its name.
        first_order_length: tokens of the longest first-order sequence; None without such ones.
        memory: of a step with the batches that were asked for.
        with_checkpointing: total bytes if blocks are recomputed in backward.
        fits: whether it fits into a GPU.
        gpus_needed: the fewest on which it would, with as many rows on each; None if more than
            `MOST_GPUS` are not enough.
        host_per_node: bytes of host memory of a node, where weights are offloaded.
    """

    method: Method
    first_order_length: int | None
    memory: Memory
    with_checkpointing: int
    fits: bool
    gpus_needed: int | None
    host_per_node: int


def make_plan(request: Request, method: Method) -> Plan | None:
    """Plan one method; None if it does not run on the back end."""
    if method in BASELINES and request.inputs.sharding != "zero3":
        return None
    length = first_order_length(request, method)
    zeroth, first = None, None
    if method in ZEROTH_ORDER:
        zeroth = batch(request.zo_rows, request.length, request.targets)
    if length is not None:
        first = batch(request.train_rows, length, request.targets)
    inputs = replace(request.inputs, method=method, zeroth_order=zeroth, first_order=first)
    memory = step_memory(inputs)
    return Plan(
        method,
        length,
        memory,
        step_memory(replace(inputs, checkpointing=True)).total,
        memory.total <= request.budget,
        gpus_needed(inputs, request.budget),
        memory.host * request.gpus_per_node,
    )


def first_order_length(request: Request, method: Method) -> int | None:
    """Return the longest first-order sequence: L_T for addax, for others the longest there is."""
    if method == "mezo":
        return None
    if method != "addax":
        return request.length
    if request.length_threshold is not None:
        return request.length_threshold
    probe = batch(request.train_rows, request.length, request.targets)
    inputs = replace(request.inputs, method=method, zeroth_order=None, first_order=probe)
    lengths = [*range(GRAIN, request.length, GRAIN), request.length]
    found = largest_threshold(inputs, lengths, request.budget, request.targets)
    return lengths[0] if found is None else found.length


def gpus_needed(inputs: Inputs, budget: int) -> int | None:
    """Return the fewest GPUs, up to 8 or in steps of 8, on which a step fits.

    One alone gathers nothing and reduces nothing, and may need less than two do; from two on memory
    falls with their number, but for padding.
    """

    def fits(ranks: int) -> bool:
        return step_memory(replace(inputs, ranks=ranks)).total <= budget

    if fits(1):
        return 1
    if inputs.sharding == "none":
        return None
    counts = [*range(2, 8), *range(8, MOST_GPUS + 1, 8)]
    place = bisect.bisect_left(counts, True, key=fits)
    return counts[place] if place < len(counts) else None


def as_json(request: Request, plans: list[Plan]) -> dict[str, Any]:
    """Return everything, in bytes."""
    shape, inputs = request.inputs.shape, request.inputs
    return {
        "model": shape.name,
        "parameters": shape.parameters,
        "dtype": shape.dtype,
        "sharding": inputs.sharding,
        "gpus": inputs.ranks,
        "gpu_memory": request.gpu_memory,
        "reserve": request.reserve,
        "per_device_zo_batch_size": request.zo_rows,
        "per_device_train_batch_size": request.train_rows,
        "gradient_accumulation_steps": inputs.accumulation,
        "length": request.length,
        "length_threshold": request.length_threshold,
        "target_tokens": request.targets,
        "attn_implementation": inputs.attention,
        "activation_checkpointing": inputs.checkpointing,
        "zero_optimization": asdict(inputs.zero3) if inputs.sharding == "zero3" else None,
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
                "total_with_checkpointing": plan.with_checkpointing,
                "host_per_node": plan.host_per_node,
            }
            for plan in plans
        ],
    }


def embedding_gradient(request: Request) -> int:
    """Bytes of the whole gradient of the output projection, which is the largest there is."""
    shape = request.inputs.shape
    return shape.numels[shape.head] * shape.itemsize


def as_table(request: Request, plans: list[Plan]) -> str:
    """Return the plans as lines of text, in GB (1e9 bytes) a GPU."""
    shape, inputs = request.inputs.shape, request.inputs
    rows = [_TITLES, *(_cells(plan) for plan in plans)]
    # A column that is empty for all says nothing.
    empty = {"0.00", "-"}
    kept = [i for i, _ in enumerate(_TITLES) if {row[i] for row in rows[1:]} - empty]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    lines = ["  ".join(row[i].rjust(widths[i]) for i in kept) for row in rows]
    heads = [
        f"{shape.name}: {shape.parameters / GB:.3g} billion parameters, {shape.dtype}, "
        f"{inputs.sharding} on {inputs.ranks} GPU(s) of {request.gpu_memory / GB:g} GB, "
        f"{request.reserve / GB:g} GB of it kept free",
        f"zeroth-order {request.zo_rows} x {request.length} tokens, first-order "
        f"{request.train_rows} x {request.length}" + _threshold(request, plans),
    ]
    return "\n".join([*heads, "", *lines, "", *_notes(request, plans)])


def _threshold(request: Request, plans: list[Plan]) -> str:
    """Say what L_T is, and that it was found if it was not given."""
    for plan in plans:
        if plan.method == "addax":
            found = ", the largest that fits" if request.length_threshold is None else ""
            found = found if plan.fits else ""
            return f", for addax {request.train_rows} x {plan.first_order_length} (L_T{found})"
    return ""


def _cells(plan: Plan) -> tuple[str, ...]:
    sizes: Mapping[str, int] = plan.memory.categories
    return (
        plan.method,
        *(f"{sizes[category] / GB:.2f}" for category in CATEGORIES),
        f"{plan.memory.total / GB:.2f}",
        "yes" if plan.fits else "no",
        str(plan.gpus_needed or f"> {MOST_GPUS}"),
        f"{plan.with_checkpointing / GB:.2f}",
        f"{plan.host_per_node / GB:.1f}" if plan.host_per_node else "-",
    )


def _notes(request: Request, plans: list[Plan]) -> list[str]:
    gradient = embedding_gradient(request) / GB
    notes = [
        "GB (1e9 bytes) of live tensors on a GPU at the moment of a step when they are most.",
    ]
    if any(plan.first_order_length is not None for plan in plans):
        tied = request.inputs.shape.tied
        notes.append(
            f"The whole gradient of the {'tied ' * tied}embedding has {gradient:.2f} GB"
            + (
                "; at the end of backward there are three for a moment: of the output, of the "
                "input, and their sum."
                if tied
                else "."
            )
        )
    if request.inputs.sharding == "zero3" and request.inputs.zero3.offload:
        note = f"host: GB of host memory of a node with {request.gpus_per_node} GPU(s)."
        if request.inputs.zero3.pin_memory:
            note += (
                " torch rounds pinned tensors up to a power of two; with "
                'offload_param {"pin_memory": false} it is less, and transfers are slower.'
            )
        notes.append(note)
    return notes
