"""Weights as a model of Transformers holds them, and as its files do.

Models and files may differ: in names (``lm_head`` of a GPT-NeoX is ``embed_out`` in files), and in
what is one tensor (the experts of a Mixtral are one in the model and many in files). What
``save_pretrained`` writes and ``from_pretrained`` reads is decided by the tables of Transformers,
which are applied here to a few tensors at a time. Models of other libraries are as their files.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors that are made together.

    Attributes:
        sources: names of what they are made of.
        make: takes the sources out of a dict by name, and returns the tensors by name.
    """

    sources: tuple[str, ...]
    make: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether ``from_pretrained`` loads such a model."""
    # Who has one has imported the library, which takes seconds and may not be installed.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def to_files(model: Any, tensors: Mapping[str, Tensor]) -> list[Conversion]:
    """Return what makes the tensors of files out of the model's, as ``save_pretrained`` does it.

    Args:
        model: of any library, its modules of their own classes.
        tensors: its weights by name, unsharded, on any device; tied ones once.
    """
    if not is_of_transformers(model):
        return [_renamed(name, name) for name in tensors]
    from transformers.core_model_loading import (
        PrefixChange,
        apply_converters,
        apply_renamings,
        dot_natural_key,
    )

    known = _known_at_loading(model)
    if known is None:  # what save_pretrained does with a model that was not loaded
        known = [t for t in _table(model, add_legacy=False) if not isinstance(t, PrefixChange)]
    renamings, converters = _kinds([each.reverse_transform() for each in reversed(known)])
    groups = _Groups(model, tensors, renamings)
    found = []
    for name in sorted(tensors, key=dot_natural_key):  # parts of a whole in their order
        first, pattern = apply_converters(name, converters)
        if pattern is None:
            found.append(_renamed(name, apply_renamings(name, renamings)))
        else:
            groups.add(name, first, pattern, converters)
    order = {name: index for index, name in enumerate(tensors)}
    return sorted([*found, *groups.conversions()], key=lambda each: order[each.sources[0]])


def from_files(
    model: Any, tensors: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, str], list[Conversion], list[Any]]:
    """Return how ``from_pretrained`` makes the model's tensors out of those of files.

    Args:
        model: of any library, its modules of their own classes.
        tensors: its weights by all the names that they have, unsharded, on any device.
        names: of the tensors in the files.

    Returns:
        Names in the files with those in the model, where they differ; what has to be made; and the
        entries of the tables that were needed, which a model notes as ``_weight_conversions``.
    """
    if not is_of_transformers(model):
        return {}, [], []
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    tables = [deepcopy(_known_at_loading(model)) or [], _table(model)]
    candidates = [_kinds(table) for table in tables if table]
    groups = _Groups(model, tensors)
    renamed = {}
    in_model, prefix = dict.fromkeys(tensors, True), model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        # The last one is for a name that the model has and the tables would change.
        for kinds in (*candidates, ([], [])):
            new, pattern = rename_source_key(name, *kinds, prefix, in_model)
            if new in in_model:
                if pattern is not None:
                    groups.add(name, new, pattern, kinds[1])
                elif new != name:
                    renamed[name] = new
                break
    used = [each for table in tables for each in table if each.was_used()]
    return renamed, list(groups.conversions()), used


def _known_at_loading(model: Any) -> list[Any] | None:
    """Return what ``from_pretrained`` has applied; None if the model was made in another way."""
    return getattr(model, "_weight_conversions", None)


def _table(model: Any, **options: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model, **options)


def _kinds(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Divide into those that rename and those that make other tensors."""
    from transformers.core_model_loading import WeightConverter

    renaming: list[Any] = []
    converting: list[Any] = []
    for transform in transforms:
        (converting if isinstance(transform, WeightConverter) else renaming).append(transform)
    return renaming, converting


def _renamed(name: str, new: str) -> Conversion:
    return Conversion((name,), lambda tensors: {new: tensors.pop(name)})


class _Groups:
    """Tensors by the conversion that they go into.

    Args:
        model: has a configuration, which says into how many parts a tensor is cut.
        tensors: of the model, by name; the model itself may hold parts of them.
        renamings: for the names of what was made.
    """

    def __init__(
        self, model: Any, tensors: Mapping[str, Tensor], renamings: Iterable[Any] = ()
    ) -> None:
        self._about = {
            "config": model.config,
            "model": SimpleNamespace(get_parameter=tensors.__getitem__),
        }
        self._renamings = list(renamings)
        self._groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}

    def add(self, name: str, first: str, pattern: str, converters: Iterable[Any]) -> None:
        """Add a tensor to the group whose first result has the name ``first``."""
        if first not in self._groups:
            converter = [each for each in converters if pattern in each.source_patterns][-1]
            self._groups[first] = (deepcopy(converter), [])
        self._groups[first][1].append((name, pattern))

    def conversions(self) -> Iterator[Conversion]:
        """Yield one for each group."""
        for first, (converter, parts) in self._groups.items():
            yield Conversion(tuple(name for name, _ in parts), self._maker(first, converter, parts))

    def _maker(
        self, first: str, converter: Any, parts: list[tuple[str, str]]
    ) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        from transformers.core_model_loading import apply_renamings

        def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for name, pattern in parts:
                converter.add_tensor(first, name, pattern, tensors.pop(name))
            made = converter.convert(first, **self._about)
            return {
                apply_renamings(name, self._renamings): made_of[0]
                if isinstance(made_of, list)
                else made_of
                for name, made_of in made.items()
            }

        return make
