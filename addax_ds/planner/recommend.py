"""Ways to fine-tune a model where it has to run, the plainest first, and the first that fits.

Time is counted in forward passes of a token (`addax_ds.planner.constants`). Traffic is counted as a
ring sends it: (n - 1) / n of the weights' bytes for each all-gather and each reduce-scatter of the
whole model. A zeroth-order pass gathers once; a first-order one gathers for its forward and for its
backward, and reduces.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from addax_ds.optim.methods import BASELINES, Method
from addax_ds.planner.constants import FORWARD, GB, GRAIN, first_order_units
from addax_ds.planner.memory import StepSpec, standing_bytes, step_memory
from addax_ds.planner.report import (
    MB,
    Request,
    coarse_threshold,
    in_words,
    request_as_json,
    with_batches,
)
from addax_ds.planner.rules import rules_of

LORA_RANK = 8
_ADAMW_8BIT = 4
"""Bytes a parameter beside bf16 weights: a bf16 gradient and two moments of 8 bits."""
_ADAMW_OF_ADAPTERS = 16
"""Bytes a parameter: bf16 weight and gradient, fp32 master weight and two moments."""
_PASSES = 2
"""Zeroth-order passes of a step along one direction."""


@dataclass(frozen=True)
class Option:
    """A way to fine-tune.

    Attributes:
        name: in words.
        flags: what to give ``launch/train.py``; None for what is only named, and never recommended.
        total: bytes of a GPU.
        host: bytes of host memory of a node.
        fits: whether it fits into a GPU and, as far as that was stated, into host memory.
        units: forward passes of a token of a step.
        moved: bytes that a GPU sends to others in a step.
        why: a sentence.
    """

    name: str
    flags: str | None
    total: int
    host: int
    fits: bool
    units: float
    moved: int
    why: str

    def may_serve(self, request: Request) -> bool:
        """Return whether it can be recommended: it fits, and any host memory was stated."""
        stated = not self.host or request.host_memory is not None
        return self.fits and stated and self.flags is not None


def options(request: Request) -> list[Option]:
    """Return all ways, in the order in which the first that fits is to be taken."""
    rules, spec = rules_of(request.spec.sharding), request.spec
    offloads, in_gpu = rules.offload_flag is not None, rules.with_offload(spec, False)
    # A configuration that was given says whether they are pinned.
    in_host = spec if rules.is_offloaded(spec) else rules.with_offload(spec, True)
    ways = []
    if rules.runs("adamw"):
        ways.append(_first_order(request, in_gpu, "adamw", checkpointing=False))
        ways.append(_first_order(request, in_gpu, "adamw", checkpointing=True))
    plain = _first_order(request, in_gpu, "ip-sgd", checkpointing=False)
    recomputed = _first_order(request, in_gpu, "ip-sgd", checkpointing=True)
    ways += [plain, recomputed]
    all_fit = plain.fits or recomputed.fits
    if not all_fit and (rows := _fitting_rows(request, in_gpu)):
        ways.append(_first_order(request, in_gpu, "ip-sgd", checkpointing=True, rows=rows))
    if offloads:
        ways.append(_first_order(request, in_host, "ip-sgd", checkpointing=True))
    if request.length_threshold is not None or request.length > GRAIN:
        # Checkpointing lets L_T be larger, so more rows get an exact gradient.
        for checkpointing in (True, False) if request.length_threshold is None else (False, True):
            ways.append(_addax(request, in_gpu, checkpointing=checkpointing, plain_fits=plain.fits))
        if offloads:
            ways.append(_addax(request, in_host, checkpointing=True, plain_fits=plain.fits))
    ways.append(_mezo(request, in_gpu))
    if offloads:
        ways.append(_mezo(request, in_host))
    return [*ways, *_named_only(request, recomputed)]


def recommended(request: Request, ways: list[Option]) -> Option | None:
    """Return the first way that can serve, or None."""
    return next((way for way in ways if way.may_serve(request)), None)


# ---- ways of this package ------------------------------------------------------------------------


def _first_order(
    request: Request,
    on: StepSpec,
    method: Method,
    *,
    checkpointing: bool,
    rows: int | None = None,
) -> Option:
    """Return every row first-order; ``rows`` a GPU in place of those that were asked for."""
    asked = replace(request, train_rows=rows or request.train_rows)
    spec = with_batches(asked, method, asked.length, on)
    spec = replace(spec, checkpointing=checkpointing)
    if rows is not None:
        why = (
            f"Every row first-order, with {rows} row(s) a GPU in place of {request.train_rows}: "
            "the same computation in more steps"
        )
    elif method in BASELINES:
        why = "The plain method, with fp32 weights and moments: nothing is given up"
        states = sum(standing_bytes(spec).values())
        if states > request.budget:
            why = f"Weights and states alone have {states / GB:.1f} GB a GPU"
    else:
        why = "Every row first-order, without optimizer states"
    if checkpointing and "states alone" not in why:
        why += ", a third more computation"
    return _option(request, spec, why)


def _addax(request: Request, on: StepSpec, *, checkpointing: bool, plain_fits: bool) -> Option:
    on = replace(on, checkpointing=checkpointing)
    threshold = request.length_threshold
    if threshold is None:
        # What fits at the full length fits below it.
        most = max(GRAIN, (request.length - 1) // GRAIN * GRAIN)
        threshold = most if plain_fits else coarse_threshold(request, on) or GRAIN
    spec = with_batches(request, "addax", threshold, on)
    if plain_fits:
        why = "All rows fit first-order, so it has nothing to save"
    else:
        why = (
            f"Rows of more than {threshold} tokens{_share(request, threshold)} are zeroth-order, "
            "which keeps no activations; they are learnt less"
        )
    return _option(request, spec, why, threshold)


def _share(request: Request, threshold: int) -> str:
    """Say how many of the training rows are longer than L_T, where they are known."""
    if (lengths := request.row_lengths) is None:
        return ""
    return f", {(lengths > threshold).mean():.1%} of the training rows,"


def _mezo(request: Request, on: StepSpec) -> Option:
    why = "Forward passes alone: the least memory, and many times the steps"
    return _option(request, with_batches(request, "mezo", None, on), why)


def _option(request: Request, spec: StepSpec, why: str, threshold: int | None = None) -> Option:
    """Plan one way of this package."""
    memory = step_memory(spec)
    host = memory.host * request.gpus_per_node
    in_host = request.host_memory is None or host <= request.host_memory
    rules = rules_of(spec.sharding)
    words: list[str] = [spec.method]
    flags = [f"--method {spec.method}"]
    if threshold is not None:
        words.append(f"L_T {threshold}")
        flags.append(f"--length_threshold {threshold}")
    if spec.checkpointing and spec.first_order is not None:
        words.append("checkpointing")
        flags.append("--activation_checkpointing")
    if (first := spec.first_order) is not None and first.rows != request.train_rows:
        words.append(f"{first.rows} row(s)")
        flags.append(f"--per_device_train_batch_size {first.rows}")
    if rules.is_offloaded(spec):
        words.append("offload")
        if rules.offload_flag and not rules.is_offloaded(request.spec):
            flags.append(rules.offload_flag)
        why += ", weights in host memory, which every pass reads over its link"
    return Option(
        name=", ".join(words),
        flags=" ".join(flags),
        total=memory.total,
        host=host,
        fits=memory.total <= request.budget and in_host,
        units=_units(spec),
        moved=_moved(spec),
        why=why,
    )


def _fitting_rows(request: Request, on: StepSpec) -> int | None:
    """Return the most rows, fewer than asked for, with which checkpointed IP-SGD fits."""

    def is_too_much(rows: int) -> bool:
        asked = replace(request, train_rows=rows)
        spec = replace(with_batches(asked, "ip-sgd", asked.length, on), checkpointing=True)
        return step_memory(spec).total > request.budget

    return bisect_left(range(1, request.train_rows), True, key=is_too_much) or None


def _units(spec: StepSpec) -> float:
    """Forward passes of a token: those of the step's worst batches."""
    of_first = first_order_units(spec.checkpointing)
    batches = ((spec.zeroth_order, FORWARD * _PASSES), (spec.first_order, of_first))
    parts = [(batch.rows * batch.length, units) for batch, units in batches if batch is not None]
    return sum(tokens * units for tokens, units in parts) / sum(tokens for tokens, _ in parts)


def _moved(spec: StepSpec) -> int:
    """Bytes that a GPU sends; recomputation finds the weights gathered."""
    if rules_of(spec.sharding).is_sharded:
        ranks, of_zeroth, of_first = spec.sharded_over, _PASSES, 3
    else:  # whole models average whole gradients
        ranks, of_zeroth, of_first = spec.ranks, 0, 2
    rounds = 0
    if spec.zeroth_order is not None:
        rounds += of_zeroth
    if spec.first_order is not None:
        rounds += of_first
    return round(rounds * (ranks - 1) / ranks * spec.shape.parameters * spec.shape.itemsize)


# ---- named only ----------------------------------------------------------------------------------


def _named_only(request: Request, recomputed: Option) -> Iterator[Option]:
    """Estimate, from IP-SGD with checkpointing, what is named and never recommended."""
    spec = request.spec
    shape, rules = spec.shape, rules_of(spec.sharding)
    held = sum(rules.shards(shape, spec.sharded_over))
    adapters = sum(
        LORA_RANK * sum(shape.sizes[p])
        for block in shape.block_parameters
        for p in block
        if len(shape.sizes[p]) == 2
    )
    ranks = spec.sharded_over if rules.is_sharded else 1
    gathers = round(2 * (ranks - 1) / ranks * shape.parameters * shape.itemsize)
    for name, more, moved, why in (
        (
            f"LoRA (r {LORA_RANK}) with AdamW, checkpointing",
            _ADAMW_OF_ADAPTERS * adapters // ranks,
            gathers if rules.is_sharded else 0,
            "At most so much: only adapters are trained, whose states are small. Under ZeRO-3 "
            "--method adamw --lora_r trains them",
        ),
        (
            "8-bit AdamW, checkpointing",
            _ADAMW_8BIT * held,
            recomputed.moved,
            "An estimate: gradients and moments of all weights. torchao and bitsandbytes have it",
        ),
    ):
        total = recomputed.total + more
        yield Option(
            name=name,
            flags=None,
            total=total,
            host=0,
            fits=total <= request.budget,
            units=recomputed.units,
            moved=moved,
            why=why,
        )


# ---- report --------------------------------------------------------------------------------------


def as_text(request: Request, ways: list[Option]) -> str:
    """Return the ways as a table, a sentence on each, and what is recommended."""
    shape, spec = request.spec.shape, request.spec
    # Of a small model all numbers of GB would be 0.
    unit, size = ("GB", GB) if max(way.total for way in ways) >= GB else ("MB", MB)
    rows = [("", f"{unit} a GPU", "fits", "time", f"{unit} sent", f"host {unit}")]
    for way in ways:
        cells = (f"{way.total / size:.2f}", "yes" if way.fits else "no", f"{way.units:.2f}")
        rows.append((way.name, *cells, f"{way.moved / size:.1f}", f"{way.host / size:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for name, *cells in rows
    ]
    return "\n".join(
        [
            f"{shape.name}: {in_words(shape.parameters)} parameters, {shape.dtype}, "
            f"{spec.sharding} on {spec.ranks} GPU(s) of {request.gpu_memory / GB:g} GB, "
            f"{request.reserve / GB:g} GB of it kept free; {request.train_rows} row(s) "
            f"first-order and {request.zo_rows} zeroth-order of up to {request.length} tokens",
            *request.describe_rows(),
            "",
            *lines,
            "",
            "time: forward passes of a token (a backward is 2 more, a recomputed forward 1 more). "
            f"{unit} sent: by a GPU in a step.",
            *(f"{way.name}: {way.why}." for way in ways),
            "",
            *_advice(request, ways),
        ]
    )


def _advice(request: Request, ways: list[Option]) -> Iterator[str]:
    best = recommended(request, ways)
    if best is None:
        yield (
            "Recommended: none, nothing fits. Use more GPUs (without --recommend the planner says "
            "how many), fewer rows or shorter ones."
        )
    else:
        yield f"Recommended: {best.name} ({best.flags}). {best.why}."
    before = ways[: ways.index(best)] if best is not None else ways
    for way in before:
        if way.fits and way.host and request.host_memory is None:
            yield (
                f"With {way.host / GB:.0f} GB of host memory a node {way.name} fits, too: "
                "--host_memory weighs it."
            )
            break
    lora = next(way for way in ways if way.name.startswith("LoRA"))
    if lora.fits and (best is None or best.name.startswith(("addax", "mezo"))):
        yield f"Where adapters are enough, LoRA serves in at most {lora.total / GB:.1f} GB."


def as_json(request: Request, ways: list[Option]) -> dict[str, Any]:
    """Return the ways in bytes, and the name of the recommended one."""
    best = recommended(request, ways)
    return {
        **request_as_json(request),
        "recommended": None if best is None else best.name,
        "options": [asdict(way) for way in ways],
    }
