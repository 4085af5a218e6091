"""What the planner has to know of a run, and what it says of it."""

from collections.abc import Sequence

from transformers import PreTrainedConfig, TrainingArguments

from addax_ds.data.encoding import Example
from addax_ds.errors import UserError
from addax_ds.planner.memory import Inputs, step_memory
from addax_ds.planner.report import GB
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.threshold import batch
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings
from addax_ds.settings import AddaxSettings, dtype_name
from addax_ds.sharding.base import ShardingName


def run_inputs(
    config: PreTrainedConfig,
    attention: str | None,
    sharding: ShardingName,
    streams: tuple[Sequence[Example], Sequence[Example]],
    args: TrainingArguments,
    settings: AddaxSettings,
) -> Inputs:
    """Return what the memory of a run's steps depends on.

    Args:
        config: of the model.
        attention: attention kernel, None for the model's own choice.
        sharding: back end.
        streams: the examples that zeroth-order and first-order batches are drawn from; no examples
            for a stream that there is not.
        args: as `addax_ds.configure.configure` has left them.
        settings: what it returned.

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
    rows = settings.per_device_zo_batch_size, args.per_device_train_batch_size
    zeroth, first = map(_longest, rows, streams)
    return Inputs(
        shape=shape,
        method=settings.method,
        sharding=sharding,
        ranks=args.world_size,
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
    longest = max(example.length for example in examples)
    return batch(rows, longest, max(example.target_count for example in examples))


def describe(inputs: Inputs) -> str:
    """Say how much memory a rank needs for a step, and for what.

    Raises:
        UserError: the planner cannot follow the model.
    """
    memory = step_memory(inputs)
    parts = sorted(memory.categories.items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts if round(size / GB, 2))
    text = (
        f"{memory.total / GB:.2f} GB of tensors on a rank when they are most, in the "
        f"{memory.stage} part of a step ({named})"
    )
    return f"{text}, and {memory.host / GB:.2f} GB of host memory" if memory.host else text
