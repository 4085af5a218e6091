"""Notes which trainable parameters the code of a model reads, in the same words on every back end.

What a back end gathers says too much (a block at once, small parameters always), and a module's
forward too little (`torch.nn.MultiheadAttention` reads the weight of a child that it never calls).
So a read is what all of them have in common: ``module.weight``.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from addax_ds.sharding.base import ParameterInfo


class Reads:
    """Reads of the trainable parameters of a model.

    Parameters that can be read in another way count as read: those of a `torch.jit` module, and
    those that a module also holds in a list or under another attribute (`torch.nn.LSTM`).

    Args:
        model: whose parameters lie in the modules that own them.
        infos: its trainable parameters.

    Attributes:
        on_read: called with a parameter before its reader gets it, or None.
    """

    def __init__(self, model: nn.Module, infos: Sequence["ParameterInfo"]) -> None:
        self.on_read: Callable[[ParameterInfo], None] | None = None
        self._infos = infos
        by_parameter = {info.parameter: info for info in infos}
        self._by_owner = {
            (module, name): by_parameter[parameter]
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in by_parameter
        }
        undecidable = by_parameter.keys() & set(_readable_otherwise(model))
        self._always = {by_parameter[parameter].parameter_id for parameter in undecidable}
        self._read: set[int] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the body reads, and forget what was noted before."""
        self._read = set(self._always)
        usual = nn.Module.__getattr__

        def noting(module: nn.Module, name: str) -> Any:
            info = self._by_owner.get((module, name))
            if info is not None and not _by_engine(sys._getframe(1)):
                self._read.add(info.parameter_id)
                if self.on_read is not None:
                    self.on_read(info)
            return usual(module, name)

        nn.Module.__getattr__ = noting  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__getattr__ = usual  # type: ignore[method-assign]

    def by_parameter(self) -> list[bool]:
        """Return whether each trainable parameter was read, in their order."""
        return [info.parameter_id in self._read for info in self._infos]


def _by_engine(frame: FrameType) -> bool:
    """Whether FSDP2 reads, which looks for its parameters at the first forward."""
    return frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp.")


def _readable_otherwise(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield from module.parameters()
        for value in vars(module).values():
            held = value if isinstance(value, list | tuple) else (value,)
            yield from (each for each in held if isinstance(each, nn.Parameter))


def outermost(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Sum up names of parameters by the outermost modules that have none of the others."""

    def prefixes(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[: depth + 1]) for depth in range(len(parts))]

    mixed = {prefix for name in others for prefix in prefixes(name)}
    found = (next(p for p in prefixes(name) if p not in mixed) for name in names)
    return list(dict.fromkeys(found))
