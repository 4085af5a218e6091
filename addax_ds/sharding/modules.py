"""Modules of a model: its decoder layers, their names, and their memory."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

_WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "_orig_mod.")


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield each decoder layer once: elements of outermost ``nn.ModuleList`` that are called."""
    return iter(dict.fromkeys(_elements_of_lists(module)))


def _elements_of_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and _is_called(child):
            yield child
        else:
            yield from _elements_of_lists(child)


def separate_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that share no parameter with another module (Zamba2's layers do)."""
    own = of_one_block(model)
    return [block for block in blocks(model) if own.issuperset(block.parameters())]


def of_one_block(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that one block alone has, and no module outside the blocks."""
    all_blocks = list(blocks(model))
    users = Counter(parameter for block in all_blocks for parameter in block.parameters())
    outside = _parameters_outside(model, set(all_blocks))
    return {p for p, number in users.items() if number == 1 and p not in outside}


def _parameters_outside(module: nn.Module, blocks: set[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that a module outside the blocks owns; a block may have one, too."""
    own = set(module.parameters(recurse=False))
    for child in module.children():
        if child not in blocks:
            own |= _parameters_outside(child, blocks)
    return own


def is_uniform(block: nn.Module) -> bool:
    """Return whether a decoder layer runs the same modules for all data, as far as can be seen.

    A list inside may be one of experts, of which each rank runs others.
    """
    lists = nn.ModuleList, nn.ModuleDict
    return not any(isinstance(module, lists) for module in block.modules())


def _is_called(module: nn.Module) -> bool:
    """Containers such as a nested ``ModuleList`` have no ``forward`` that hooks could follow."""
    return type(module).forward is not nn.Module.forward


def canonical_name(name: str) -> str:
    """Remove the prefixes that wrappers add, so that all back ends agree on a name."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return what ``model.modules()`` yields, in another order and several times as fast."""
    found = {model: None}
    for module in (queue := [model]):
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                queue.append(child)
    return queue


def materialize(
    model: nn.Module, device: torch.device, home: torch.device | str | None = None
) -> None:
    """Give memory to the parameters of a model, or to their shards, that are on the meta device.

    Values of parameters are undefined afterwards. Buffers keep theirs and move to the device, as
    parameters do if they have no other ``home``. Tied parameters stay tied.
    """
    home = home or device
    before = [
        (module, name, parameter)
        for module in modules_of(model)
        for name, parameter in module._parameters.items()
        if type(parameter) is nn.Parameter  # a shard's engine knows itself what is tied
    ]
    model._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t.to(device))
    made: dict[nn.Parameter, nn.Parameter | None] = {}
    for module, name, parameter in before:  # torch makes another one for each module
        module._parameters[name] = made.setdefault(parameter, module._parameters[name])
