"""The zeroth-order passes of a step, kept apart: none reads what another made of its weights.

A cache of something computed from the weights makes a pass see those of an earlier one, and g0 is
then the difference of nothing, or has the wrong sign. Each kind is met here, for all back ends:

- `torch.autocast` and `torch.nn.utils.parametrize.cached` remember by parameter what they have
  computed, until their outermost block ends: forgotten before and after each pass.
- Graphs of `torch.compile` read weights past the hooks that perturb them: compiled modules run
  uncompiled, and so do closures that are compiled. (Other compiled functions stay as they are, such
  as flex attention, which reads no weights; one that does read weights gets no true g0.)
- A module may store a tensor in its forward, or count on its ``train()`` to merge weights: what it
  stored is taken back after each pass, and the mode is set without calling ``train()``.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import ismethod
from itertools import chain
from operator import is_
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from addax_ds.sharding.base import Perturb, Sharding
from addax_ds.sharding.modules import modules_of


class IsolatedPasses:
    """Runs zeroth-order passes over a model such that none sees what another has stored.

    Args:
        sharding: its back end.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        # The first pass finds the modules that store something; few do.
        self._storing: list[nn.Module] | None = None

    @contextmanager
    def of_step(self) -> Iterator[None]:
        """Surround all passes of a step: eval mode, no autograd, and reads are noted."""
        model, sharding = self._sharding.model, self._sharding
        modes = evaluation_mode(model), uncompiled(model)
        with torch.no_grad(), modes[0], modes[1], sharding.forward_only(), sharding.reads.noted():
            yield

    @contextmanager
    def perturbed(self, perturb: Perturb) -> Iterator[None]:
        """Surround one pass, which sees perturbed weights and leaves nothing behind."""
        first = self._storing is None
        modules = list(self._sharding.model.modules()) if first else self._storing
        with _undone(modules or ()) as stored, self._sharding.perturbed(perturb):
            yield
        self._storing = stored if first else self._storing


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Surround passes with the weights as they are: eval mode, no autograd, nothing left behind."""
    with _undone(model.modules()), torch.no_grad(), evaluation_mode(model), uncompiled(model):
        yield


@contextmanager
def _undone(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Take back what some modules store in the body; the list has those afterwards."""
    states = [ModuleState(module) for module in modules]
    stored: list[nn.Module] = []
    forget_casts()
    try:
        yield stored
    finally:
        forget_casts()
        stored += [state.module for state in states if state.restore()]


def forget_casts() -> None:
    """Empty the caches of torch that are keyed by parameter, as the weights have changed."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def not_compiled(closure: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `torch.compile` was given, of what it returned.

    A wrapper around that, which copies its attributes, stays as it is.
    """
    if getattr(closure, "_torchdynamo_wrapper_id", None) != id(closure):
        return closure
    original: Callable[..., Any] = closure._torchdynamo_orig_callable  # type: ignore[attr-defined]
    return original


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled modules of the model, and every `OptimizedModule`, uncompiled meanwhile."""
    dynamo: Any = sys.modules.get("torch._dynamo")  # takes seconds to import; without it, none is
    if dynamo is None:
        yield
        return
    with ExitStack() as stack:
        for module in modules_of(model):
            if module._compiled_call_impl is not None:
                stack.enter_context(replaced(module, "_compiled_call_impl", None))
            compiled = getattr(module, "forward", None)
            original = getattr(compiled, "_torchdynamo_orig_callable", None)
            if original is not None:
                bound = MethodType(original, module) if ismethod(compiled) else original
                stack.enter_context(replaced(module, "forward", bound))
        wrapper = dynamo.OptimizedModule
        call = wrapper.__call__
        stack.callback(setattr, wrapper, "__call__", call)
        wrapper.__call__ = lambda self, *args, **kwargs: self._orig_mod(*args, **kwargs)
        yield


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give a module another attribute of its own for a while."""
    attributes = vars(module)
    before = dict(attributes)
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        if name in before:
            attributes[name] = before[name]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to eval mode and restore each module's own mode afterwards.

    Without ``eval()``, which a module may take for the order to merge its weights.
    """
    training = [module for module in modules_of(model) if module.training]
    _set_training(training, False)
    try:
        yield
    finally:
        _set_training(training, True)


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        attributes = vars(module)
        if "training" in attributes and type(module).__setattr__ is nn.Module.__setattr__:
            attributes["training"] = mode  # `nn.Module` would look for a parameter of that name
        else:
            module.training = mode


class ModuleState:
    """Attributes and buffers of a module, as they are; parameters and submodules are none of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = dict(vars(module))
        self._contents = [
            (value, value.copy())
            for name, value in self._attributes.items()
            if type(value) in (dict, list) and name not in ("_parameters", "_modules")
        ]
        # Not of integers: those may be the quantised weights of a model, whose copy costs as much.
        self._values = [
            (tensor, tensor._version, tensor.clone())
            for tensor in _tensors(self._attributes)
            if tensor.is_floating_point() and not tensor.is_inference()
        ]

    def restore(self) -> bool:
        """Take back what has changed, if a tensor is in it; return whether one is.

        A module that stores none keeps what it has counted or noted.
        """
        before, now = self._attributes, vars(self.module)
        added = {name: value for name, value in now.items() if before.get(name) is not value}
        lost = {name: value for name, value in before.items() if now.get(name) is not value}
        contents = [(held, then) for held, then in self._contents if not _same(held, then)]
        written = [(tensor, value) for tensor, v, value in self._values if tensor._version != v]
        parts = (added, lost, *chain.from_iterable(contents))
        if not written and not any(True for part in parts for _ in _tensors(part)):
            return False
        for name in added.keys() - before.keys():
            del now[name]
        now.update(lost)
        for held, then in contents:
            held.clear()
            held.update(then) if isinstance(held, dict) else held.extend(then)
        for tensor, value in written:
            tensor.copy_(value)
        return True


def _same(a: Any, b: Any) -> bool:
    """Return whether two dicts or two lists hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and _same(list(a.values()), list(b.values()))
    return len(a) == len(b) and all(map(is_, a, b))


def _tensors(container: Any) -> Iterator[Tensor]:
    """Yield tensors in a dict, list or tuple, and in those directly within; no parameters."""
    for value in container.values() if isinstance(container, dict) else container:
        within = value if isinstance(value, list | tuple) else (value,)
        for each in value.values() if isinstance(value, dict) else within:
            if isinstance(each, Tensor) and not isinstance(each, nn.Parameter):
                yield each
