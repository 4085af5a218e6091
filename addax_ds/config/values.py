"""Argument files, and values that no argument can have, wherever they come from."""

import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers.integrations import integration_utils

from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json, read_regular, refuse_duplicates
from addax_ds.utils.messages import shown

# Hyperparameters have ranges of their own.
_LEAST: dict[str, float] = {
    "warmup_steps": 0,
    "eval_delay": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "max_steps": -1,
    "ddp_timeout": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "per_device_zo_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "desync_check_steps": 0,
    "dataloader_prefetch_factor": 1,
}
_LONGEST_WAIT = 10**9  # seconds; Python's time differences end not far above
_ABOVE_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
OBJECTS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)
_REPORTS = ("all", "none", *integration_utils.INTEGRATION_TO_CALLBACK)
_PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}


def read_argument_file(path: Path) -> dict[str, Any]:
    """Read a ``.json`` or YAML file and return what it maps names to.

    Raises:
        UserError: the file cannot be read, gives a name twice, or maps no names to values.
    """
    try:
        text = read_regular(path, "utf-8-sig")
        content = parse_json(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except FileNotFoundError:
        raise UserError(f"There is no argument file {path}.") from None
    except Exception as error:  # PyYAML's constructors raise whatever they run into
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot read the argument file {path}: {shown(said, 300)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must map the names of flags to values.")
    return content


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load` that refuses a name that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        refuse_duplicates(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def type_problems(content: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[str]:
    """Yield values of an argument file that have another form than their arguments.

    Args:
        content: names and values.
        types: annotation of every argument; Trainer's may be unions.
    """
    for name, value in content.items():
        forms = _forms(types[name])
        if isinstance(value, list | dict) and type(value) not in forms:
            kind = "a list" if isinstance(value, list) else "an object"
            yield f"{name}: {kind} is not a value of this argument."
        elif isinstance(value, list) and not all(isinstance(item, str) for item in value):
            yield f"{name}: its items must be texts; quote them."
        elif isinstance(value, bool) and bool not in forms and name != "resume_from_checkpoint":
            yield f"{name}: it is not true or false; YAML reads no, off, yes and on so: quote it."


def value_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield numbers that count or measure nothing, and texts that Trainer finds out about late."""
    for name, value in values.items():
        if name in OBJECTS and isinstance(value, str) and not _is_object(value):
            yield f"--{name} {shown(value)}: it must be a JSON object."
        if name == "report_to":
            for report in value if isinstance(value, list) else [value]:
                if report not in _REPORTS:
                    yield f"--{name} {shown(str(report))}: it must be of {', '.join(_REPORTS)}."
                elif not reports_here(report):
                    yield f"--{name} {report}: it is not installed here, or is switched off."
        if name == "output_dir" and value is not None:
            yield from _folder_problems(Path(value))
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = _LEAST.get(name, -math.inf)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"--{name} {value}: it must be a finite number."
        elif value < least or (name in _ABOVE_ZERO and value <= 0):
            bound = "above 0" if name in _ABOVE_ZERO else f"at least {least}"
            yield f"--{name} {value}: it must be {bound}."
        elif name == "max_steps" and value == 0:
            yield "--max_steps 0: it must be above 0, or -1 for whole epochs (--num_train_epochs)."
        elif name == "ddp_timeout" and value > _LONGEST_WAIT:
            yield f"--{name} {value}: it must be at most {_LONGEST_WAIT}."


def reports_here(report: str) -> bool:
    """Return whether Trainer could report to a value of ``report_to``."""
    if report not in integration_utils.INTEGRATION_TO_CALLBACK:  # all of them, or none
        return True
    return bool(getattr(integration_utils, f"is_{_PACKAGES.get(report, report)}_available")())


def _folder_problems(folder: Path) -> Iterator[str]:
    """Yield why ``output_dir`` cannot be a folder: it, or what it is to lie in, is a file."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # too long, or no path at all
        yield f"--output_dir {shown(str(folder))}: {error}."
        return
    if not there.is_dir():
        yield f"--output_dir {folder}: {there} is not a folder; name another."


def _is_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _forms(annotation: Any) -> set[Any]:
    """Return the classes in an annotation, those of unions and the origins of generics."""
    inner = {form for part in get_args(annotation) for form in _forms(part)}
    return inner | {getattr(annotation, "__origin__", annotation)}
