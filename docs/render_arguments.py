"""`docs/arguments.md`, rendered from the code.

`python -m docs.render_arguments docs/arguments.md` writes it; a test fails when the
committed file differs from what this module renders.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from addax_ds.config.addax_config import GENERAL_DEFAULTS, AddaxConfig
from addax_ds.config.arguments import (
    DEMO_GLOBAL_BATCH_SIZE,
    DEMO_PRESET,
    DataArguments,
    ModelArguments,
)
from addax_ds.config.deepspeed_keys import DS_KEYS
from addax_ds.config.support import Rule, Status
from addax_ds.config.training_arguments import DEFAULTS, RULES
from addax_ds.optim.hyperparameters import IN_JSON_PARAMS

_TEMPLATE = """\
# Arguments

<!-- Written by `python -m docs.render_arguments docs/arguments.md`; do not edit. -->

`launch/train.py` takes flags, one YAML or JSON file whose keys are the names of the flags, or such
a file and flags, which then win over it. A flag that would have no effect is refused or warned of.

Without `--model_name_or_path`, `--task`, `--train_file` and `--dataset_name` the demo runs with its
preset, below. With data alone the demo model is trained on them; with `--model_name_or_path` alone
that model is trained on the demo's rows. None of these uses the preset.

The settings of `optimizer.params` in the DeepSpeed JSON may stand there, on the command line, or in
both with the same value; "auto" in the JSON means the command line.

## Model

{model}

## Data

{data}

## Addax

{addax}

## Defaults that differ from Transformers

{general}

## The demo's preset

{preset}

## TrainingArguments

All fields of Transformers' `TrainingArguments` are flags. Those in this table are refused with the
reason, or have no effect, which is warned of. All others work as
[Transformers documents](https://huggingface.co/docs/transformers/main_classes/trainer).

{training}

What some of the others mean here:

| argument | meaning |
|---|---|
| `per_device_train_batch_size` | K¹ / (ranks x micro-batches): the first-order rows of a \
micro-batch of one rank. |
| `num_train_epochs` | An epoch is one pass over D¹ (over D⁰ for mezo). |
| `gradient_accumulation_steps` | Micro-batches of a step, in either stream. Zeroth-order ones \
cost passes alone; first-order ones a sum of gradients in fp32, 4 bytes a parameter over all \
ranks. |
| `max_grad_norm` | Of the first-order gradient, exactly: without accumulation a step runs its \
first-order forward and backward twice. 0, launch/train.py's default, does not clip. |
| `weight_decay` | Decoupled, applied in the same pass as the update. |
| `bf16`, `fp16` | The type that the weights are stored in: no master copy, no autocast. fp16 has \
a dynamic loss scale; prefer bf16. |
| `save_only_model` | Weights alone: no run can be resumed from them. |
| `metric_for_best_model` | Default: the task's own metric; for files, the loss. |
| `seed` | Of z, of stochastic rounding and, without `data_seed`, of the data order. |
| `ddp_backend` | The communication backend on CPUs. |
| `deepspeed` | A path, the name of a ready JSON, or a mapping in an argument file. ZeRO stage 3 \
only. |
| `resume_from_checkpoint` | A path, or True for the newest intact one in `output_dir`. The number \
of ranks and the way to shard may have changed, the global batches may not. |

## DeepSpeed JSON

Keys in this table are refused with the reason, or have no effect, which is warned of. All other
keys that DeepSpeed 0.19 knows work as [DeepSpeed documents](https://www.deepspeed.ai/docs/config-json/);
keys that it does not know are refused.

{deepspeed}

What some of the others mean here:

| key | meaning |
|---|---|
| `train_batch_size` | "auto" is best: micro batch times micro-batches times ranks. |
| `gradient_accumulation_steps` | Without Trainer it is 1: give `measure()` a closure for each \
micro-batch. |
| `gradient_clipping` | Without the key it is `max_grad_norm`, whose default here is 0. |
| `optimizer.params` | {params}; "auto" becomes the argument. |
| `scheduler` | Without it Trainer's `lr_scheduler_type` is used. |
| `fp16.loss_scale` | 0 adjusts itself; another value stays. |
| `zero_optimization.reduce_bucket_size` | "auto" becomes hidden_size squared. At \
least a decoder layer, if two fit stage3_max_live_parameters. |
| `zero_optimization.stage3_prefetch_bucket_size` | "auto" becomes 0.9 times \
hidden_size squared. At least such a layer, unless 0. |
| `zero_optimization.stage3_param_persistence_threshold` | "auto" becomes 10 times hidden_size. |
| `steps_per_print` | Trainer switches these lines off; it logs by itself. |
"""


def render() -> str:
    """Return the text of `docs/arguments.md`."""
    ranks = f"{DEMO_GLOBAL_BATCH_SIZE} / ranks"
    machine = {
        "learning_rate": "none: it has to be given (sgd, adamw: 5e-5)",
        "use_cpu": "where torch sees no accelerator",
    }
    return _TEMPLATE.format(
        model=_arguments(ModelArguments),
        data=_arguments(DataArguments),
        addax=_arguments(AddaxConfig),
        general=_values({**GENERAL_DEFAULTS, **machine}),
        preset=_values({**DEMO_PRESET, "per_device_train_batch_size": ranks}),
        training=_rules("argument", RULES),
        deepspeed=_rules("key", DS_KEYS),
        params=", ".join(f"`{known.name}`" for known in IN_JSON_PARAMS),
    )


def _arguments(dataclass_type: type[Any]) -> str:
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for item in fields(dataclass_type):
        if item.name in DEFAULTS:  # Trainer's own
            continue
        default = "" if item.default is None else f"`{item.default}`"
        lines.append(f"| `--{item.name}` | {default} | {item.metadata['help']} |")
    return "\n".join(lines)


def _values(values: dict[str, Any]) -> str:
    rows = [f"| `--{name}` | {value} |" for name, value in values.items()]
    return "\n".join(["| argument | value |", "|---|---|", *rows])


def _rules(header: str, rules: Mapping[str, Rule]) -> str:
    """Return a table of the settings that are refused or have no effect, one row a reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, rule in rules.items():
        accepted = ", ".join(f"`{_shown(value)}`" for value in rule.allowed) or "nothing"
        if rule.status is Status.NO_EFFECT:
            accepted = "no effect"
        if rule.status is not Status.WORKS:
            rows.setdefault((accepted, rule.note), []).append(f"`{name}`")
    lines = [f"| {header} | accepted | why |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | {a} | {note} |" for (a, note), names in rows.items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if is_dataclass(value):
        return f"{type(value).__name__}()"
    return repr(value.value if isinstance(value, Enum) else value)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
