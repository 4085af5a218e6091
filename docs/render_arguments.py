"""`docs/arguments.md`, rendered from the code.

`python -m docs.render_arguments docs/arguments.md` writes it; a test fails when the
committed file differs from what this module renders.
"""

import sys
from dataclasses import fields
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
from addax_ds.config.support import markdown_table
from addax_ds.config.training_arguments import DEFAULTS, RULES

_TEMPLATE = """\
# Arguments

<!-- Written by `python -m docs.render_arguments docs/arguments.md`; do not edit. -->

`launch/train.py` takes flags, one YAML or JSON file whose keys are the names of the flags, or such
a file and flags, which then win over it. A flag that would have no effect is refused or warned of.

Without `--model_name_or_path`, `--task` and `--train_file` the demo runs with its preset, below.
With `--task` or `--train_file` alone the demo model is trained on those data; with
`--model_name_or_path` alone that model is trained on the demo's rows. None of these uses the
preset.

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

"only" names the values that are accepted; any other is refused with the note.

{training}

## DeepSpeed JSON

{deepspeed}
"""


def render() -> str:
    """Return the text of `docs/arguments.md`."""
    ranks = f"{DEMO_GLOBAL_BATCH_SIZE} / ranks"
    machine = {"use_cpu": "where torch sees no accelerator"}
    return _TEMPLATE.format(
        model=_arguments(ModelArguments),
        data=_arguments(DataArguments),
        addax=_arguments(AddaxConfig),
        general=_values({**GENERAL_DEFAULTS, **machine}),
        preset=_values({**DEMO_PRESET, "per_device_train_batch_size": ranks}),
        training=markdown_table("argument", RULES, DEFAULTS),
        deepspeed=markdown_table("key", DS_KEYS, {}),
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


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
