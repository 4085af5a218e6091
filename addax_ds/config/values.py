"""Argument files, and values that no argument can have, wherever they come from."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from addax_ds.config.deepspeed_values import json_problems
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import read_regular
from addax_ds.utils.messages import raise_problems, shown

_LEAST: dict[str, float] = {
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "eval_delay": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "max_steps": -1,
    "ddp_timeout": 1,
}
_ABOVE_ZERO = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_OBJECTS = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
)
_REPORTS = ("all", "none", *INTEGRATION_TO_CALLBACK)
_NUMBER_LIMIT = 2**32  # counts are far below, and seeds end here
_TRUE_OR_PATH = "resume_from_checkpoint"


def read_argument_file(path: Path) -> dict[str, Any]:
    """Read a ``.json`` file, or a YAML file without aliases.

    Returns:
        What it maps names to; a value that YAML takes for a date is text.

    Raises:
        UserError: the file cannot be read, gives a name twice, maps no names to values, or holds
            what `addax_ds.config.deepspeed_values.json_problems` lists.
    """
    try:
        text = read_regular(path, "utf-8-sig")
        if path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=_unique)
        else:
            content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise UserError(f"There is no argument file {path}.") from None
    except Exception as error:  # PyYAML's constructors raise whatever they run into
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot read the argument file {path}: {shown(said, 300)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must map the names of flags to values.")
    raise_problems(f"{path}:", list(json_problems(content)))
    return content


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
        elif isinstance(value, bool) and bool not in forms and name != _TRUE_OR_PATH:
            yield f"{name}: it is not true or false; YAML reads no, off, yes and on so: quote it."


def value_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield texts that no file or name can have, and numbers that count or measure nothing."""
    for name, value in values.items():
        if isinstance(value, str) and ("\0" in value or not _is_text(value)):
            yield f"--{name} {shown(value)}: it holds a null byte or half a surrogate pair."
        if name in _OBJECTS and isinstance(value, str) and not value.lstrip().startswith("{"):
            yield f"--{name} {shown(value)}: it must be a JSON object."
        if name == "report_to":
            for report in value if isinstance(value, list) else [value]:
                if report not in _REPORTS:
                    yield f"--{name} {shown(str(report))}: it must be of {', '.join(_REPORTS)}."
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = _LEAST.get(name, -math.inf)
        if not abs(value) < _NUMBER_LIMIT:  # a NaN is not
            yield f"--{name} {shown(str(value))}: it must be a finite number below 2**32."
        elif value < least or (name in _ABOVE_ZERO and value <= 0):
            bound = "above 0" if name in _ABOVE_ZERO else f"at least {least}"
            yield f"--{name} {value}: it must be {bound}."


def _forms(annotation: Any) -> set[Any]:
    """Return the classes in an annotation, those of unions and the origins of generics."""
    inner = {form for part in get_args(annotation) for form in _forms(part)}
    return inner | {getattr(annotation, "__origin__", annotation)}


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name} is given more than once")
        content[name] = value
    return content


class _Loader(yaml.SafeLoader):
    """YAML of JSON's types: no key twice, no aliases, no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in PyYAML's own classes
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them make billions of values
            raise ValueError("aliases (*name) are not used in argument files")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ValueError(f"{twice} is given more than once")
        return super().construct_mapping(node, deep=deep)
