"""Registry of the sharding back ends.

A module is imported only when its back end is named or could hold a model, so users of other back
ends do not need DeepSpeed.
"""

import sys
from importlib import import_module
from typing import NamedTuple

from torch import nn

from addax_ds.sharding.base import Sharding
from addax_ds.utils.extras import naming_extras


class Entry(NamedTuple):
    """Location of a back end's class.

    Attributes:
        module: to import.
        class_name: of the `Sharding` in it.
        engine: package without whose import no model can belong to this back end.
    """

    module: str
    class_name: str
    engine: str = "torch"


BACK_ENDS: dict[str, Entry] = {
    "zero3": Entry("addax_ds.sharding.zero3", "Zero3Sharding", engine="deepspeed"),
    "fsdp2": Entry("addax_ds.sharding.fsdp2", "Fsdp2"),
    # The last one, which accepts every model.
    "none": Entry("addax_ds.sharding.unsharded", "Unsharded"),
}
"""By value of ``--sharding``. The first that accepts a model is the model's."""


def back_end(name: str | None = None, deepspeed: bool = False) -> type[Sharding]:
    """Return a back end by its name.

    Args:
        name: value of ``--sharding``; None for the default.
        deepspeed: whether ``--deepspeed`` is given, which decides on the default.

    Raises:
        MissingExtraError: its engine is not installed.
    """
    entry = BACK_ENDS[name or ("zero3" if deepspeed else "none")]
    with naming_extras():
        return getattr(import_module(entry.module), entry.class_name)


def back_end_of(model: nn.Module) -> type[Sharding]:
    """Return the back end that holds the weights of a model, attached or not."""
    imported = [name for name, e in BACK_ENDS.items() if sys.modules.get(e.engine) is not None]
    possible = map(back_end, imported)
    return next(each for each in possible if each.accepts(model))
