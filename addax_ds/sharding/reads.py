"""Notes which trainable parameters the code of a model reads, in the same way on every back end.

What a back end gathers says too much (a block at once, small parameters always), and a module's
forward too little (`torch.nn.MultiheadAttention` reads the weight of a child that it never calls).
So a read is what all of them have in common: ``module.weight``, or a loop over ``parameters()``.
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

_FSDP2 = ("torch.distributed.fsdp.",)  # looks for its parameters at the first forward
_ENGINES = (*_FSDP2, "deepspeed.")


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
        self._names = {name for _, name in self._by_owner}
        undecidable = by_parameter.keys() & set(_readable_otherwise(model))
        self._always = {by_parameter[parameter].index for parameter in undecidable}
        self._read: set[int] = set()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what the body reads, and forget what was noted before."""
        self._read = set(self._always)
        get, named = nn.Module.__getattr__, nn.Module.named_parameters
        by_owner, names, read = self._by_owner, self._names, self._read

        # Engines look for missing attributes of modules some ten thousand times a pass.
        def noting_get(module: nn.Module, name: str) -> Any:
            if name in names:
                info = by_owner.get((module, name))
                if (
                    info is not None
                    and (self.on_read is not None or info.index not in read)
                    and not _called_by(_FSDP2, sys._getframe(1))
                ):
                    self._announce(info)
                    read.add(info.index)
            return get(module, name)

        def noting_named(
            module: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
        ) -> Iterator[tuple[str, nn.Parameter]]:
            pairs = named(module, prefix, recurse, remove_duplicate)
            # An engine goes through the parameters of each module that runs.
            by_engine = _called_by(_ENGINES, sys._getframe(1))
            return pairs if by_engine else self._noting(module, prefix, pairs)

        nn.Module.__getattr__ = noting_get  # type: ignore[method-assign]
        nn.Module.named_parameters = noting_named  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.__getattr__ = get  # type: ignore[method-assign]
            nn.Module.named_parameters = named  # type: ignore[method-assign]

    def _noting(
        self, module: nn.Module, prefix: str, pairs: Iterator[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in pairs:
            owner, _, own = name.removeprefix(f"{prefix}.").rpartition(".")
            info = self._by_owner.get((module.get_submodule(owner), own))
            if info is not None:
                self._announce(info)
            yield name, parameter
            if info is not None:
                # Not if the first one is all that was asked for, as for the model's dtype.
                self._read.add(info.index)

    def _announce(self, info: "ParameterInfo") -> None:
        if self.on_read is not None:
            self.on_read(info)

    def by_parameter(self) -> list[bool]:
        """Return whether each trainable parameter was read, in their order."""
        return [info.index in self._read for info in self._infos]


def _called_by(packages: tuple[str, ...], frame: FrameType | None) -> bool:
    """Return whether a frame is of a package; those of `torch.nn.Module` itself are passed over."""
    while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith(packages)


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
