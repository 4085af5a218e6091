"""The step of a run as the planner takes it, and what the log says of its memory."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.examples import Example, lengths_of, target_counts_of
from addax_ds.planner.constants import GB, RESERVE
from addax_ds.planner.memory import Memory, StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings
from addax_ds.sharding.layout import Layout
from addax_ds.utils.dtypes import dtype_name
from addax_ds.utils.errors import UserError
from addax_ds.utils.host_memory import available

HOST_RESERVE = 2 * GB
"""Of a rank's memory on a CPU, for what is not a tensor of the step: at most 1.6 GB in the table of
docs/planner.md, the libraries left out, which are loaded by then."""


def spec_of_run(
    config: PreTrainedConfig,
    attention: str | None,
    layout: Layout,
    streams: tuple[Sequence[Example], Sequence[Example]],
    args: AddaxConfig,
) -> StepSpec:
    """Return the step of a run with the largest batches.

    Args:
        config: of the model.
        attention: attention kernel, None for the model's own choice.
        layout: of the weights.
        streams: the examples that zeroth-order and first-order batches are drawn from; no examples
            for a stream that there is not.
        args: of the run.

    Raises:
        UserError: the planner cannot follow the model.
    """
    try:
        shape = shape_of(config, config.name_or_path or "the model", dtype_name(args))
    except Exception as error:  # a model may come with code that runs nowhere else
        raise UserError(
            "the planner cannot build this model without its weights "
            f"({type(error).__name__}: {error})"
        ) from error
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    zero3 = Zero3Settings()
    if deepspeed is not None:
        zero3 = Zero3Settings.from_json(deepspeed.config["zero_optimization"], shape.hidden)
    settings = args.settings
    rows = settings.per_device_zo_batch_size, args.per_device_train_batch_size
    zeroth, first = map(_longest, rows, streams)
    return StepSpec(
        shape=shape,
        method=settings.method,
        sharding=layout.sharding,
        ranks=args.world_size,
        replicas=layout.replicas,
        cpu_offload=layout.cpu_offload,
        zeroth_order=zeroth,
        first_order=first,
        checkpointing=bool(args.activation_checkpointing),
        attention=attention,
        zero3=zero3,
        accumulation=settings.gradient_accumulation_steps,
        cuda=args.device.type == "cuda",
    )


def _longest(rows: int, examples: Sequence[Example]) -> Batch | None:
    """Return the largest batch that can be drawn."""
    if not examples:
        return None
    longest, targets = lengths_of(examples).max(), target_counts_of(examples).max()
    return Batch.of(rows, int(longest), int(targets))


def describe(spec: StepSpec, free: int | None) -> str:
    """Describe the memory that this rank needs for a step, by category, and has.

    Args:
        spec: the step.
        free: bytes that this rank has for tensors on its device (`free_memory`), None if unknown.

    Raises:
        UserError: the planner cannot follow the model.
    """
    memory = step_memory(spec)
    parts = sorted(memory.categories.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts if round(size / GB, 2))
    text = (
        f"{memory.total / GB:.2f} GB of tensors on a rank when they are most, in the "
        f"{memory.stage} part of a step{f' ({named})' if named else ''}"
    )
    if memory.host:
        text += f", and {memory.host / GB:.2f} GB of host memory"
    if free is None:
        return text
    only = "only " if _needed(spec, memory) > free else ""
    return f"{text}; {only}{free / GB:.2f} GB are free for them"


def simpler_way(spec: StepSpec, free: int) -> str | None:
    """Say that in-place SGD on every row would fit a run that takes some rows zeroth-order.

    Args:
        spec: the step.
        free: bytes that this rank has for tensors on its device.

    Returns:
        A sentence; None if it would not fit, if every row is first-order anyway, or if it cannot be
        planned.
    """
    if spec.zeroth_order is None:
        return None
    both = [each for each in (spec.zeroth_order, spec.first_order) if each is not None]
    every = Batch(
        sum(each.rows for each in both),
        max(each.length for each in both),
        max(each.targets for each in both),
    )
    in_place = replace(spec, method="ip-sgd", zeroth_order=None, first_order=every)
    for checkpointing in (False, True):
        plain = replace(in_place, checkpointing=checkpointing)
        try:
            memory = step_memory(plain)
        except UserError:
            return None
        if _needed(plain, memory) <= free:
            flags = f"--method ip-sgd --per_device_train_batch_size {every.rows}"
            if checkpointing:
                flags += " --activation_checkpointing"
            return (
                f"{flags} would fit, in place of this method's flags, with every row first-order: "
                f"{memory.total / GB:.2f} GB of tensors on a rank at up to {every.length} tokens"
            )
    return None


def _needed(spec: StepSpec, memory: Memory) -> int:
    """Return the bytes of a plan on the device, which on a CPU is the host as well."""
    return memory.total if spec.cuda else memory.total + memory.host


def free_memory(device: torch.device, ranks: int, stated: int | None = None) -> tuple[int, int]:
    """Return the bytes that this rank has for tensors on its device, and on its host beside it.

    Args:
        device: of this rank.
        ranks: that share the machine.
        stated: bytes for tensors on the device, None if they are to be found out.

    Raises:
        UserError: it cannot be found out.
    """
    if device.type == "cuda":
        return stated or torch.cuda.mem_get_info(device)[0] - RESERVE, available() // ranks
    return stated or max(available() // ranks - HOST_RESERVE, 0), 0
