"""Gathering of whole decoder layers under ZeRO-3, by private names of DeepSpeed (0.19.8).

DeepSpeed gathers the parameters of a module when the module is called. Most of the host time of a
step is its hooks of the small modules inside a decoder layer: two in forward and two nodes of
autograd each. As a leaf module of DeepSpeed a layer is gathered and released as one.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    iter_params,
)
from deepspeed.runtime.zero.utils import apply_to_tensors_only
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from addax_ds.sharding.modules import blocks, is_uniform
from addax_ds.utils.errors import UserError


class LayerGathering:
    """Makes the decoder layers of a model leaf modules of DeepSpeed, until it is undone.

    The hooks of the modules inside do nothing while their layer is gathered, and work as ever where
    a model calls such a module by itself. Gradients go one by one, as ever: layers become leaves
    after DeepSpeed has made its hooks for gradients, which would else collect those of a layer.

    Args:
        zero: DeepSpeed's ZeRO-3 optimizer.

    Attributes:
        layers: what is gathered as one; see `whole_layers`.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._offload = zero.parameter_offload
        self.layers = whole_layers(zero.module, self._offload)
        self._replaced: list[tuple[dict[int, Callable], int, Callable]] = []
        self._with_kwargs: list[tuple[dict[int, bool], int]] = []
        of_forward, of_backward = (
            {id(handle.hooks_dict_ref()): handle for handle in handles}
            for handles in (self._offload.forward_hooks, self._offload.backward_hooks)
        )
        for handle in self._offload.backward_hooks:
            self._replace(handle, _only_with_grad)
        for layer in self.layers:
            layer._z3_leaf = True
            self._pass_over_inside(layer, (of_forward, of_backward))
            if handle := of_backward.get(id(layer._forward_hooks)):
                self._replace(handle, partial(_require_tensors, layer))
            if handle := of_backward.get(id(layer._forward_pre_hooks)):
                self._replace(handle, partial(_mark_keyword_inputs, layer))
                layer._forward_pre_hooks_with_kwargs[handle.id] = True
                self._with_kwargs.append((layer._forward_pre_hooks_with_kwargs, handle.id))

    def _pass_over_inside(self, layer: nn.Module, handles: tuple[dict[int, Any], ...]) -> None:
        """Let DeepSpeed's hooks of the modules inside a layer do nothing while it is gathered."""
        while_gathered = partial(_skip_when_gathered, layer, next(layer.parameters()))
        for module in layer.modules():
            if module is layer:
                continue
            for of_module in (module._forward_pre_hooks, module._forward_hooks):
                for by_module in handles:
                    # None if the module came later.
                    if handle := by_module.get(id(of_module)):
                        self._replace(handle, while_gathered)

    def _replace(self, handle: Any, make: Callable[[Callable], Callable]) -> None:
        """Put another hook in the place of one, among those of others."""
        of_module, key = handle.hooks_dict_ref(), handle.id
        self._replaced.append((of_module, key, of_module[key]))
        of_module[key] = make(of_module[key])

    def undo(self) -> bool:
        """Give DeepSpeed its modules and hooks back; return whether any layer was a leaf."""
        for of_module, key, hook in reversed(self._replaced):
            if key in of_module:
                of_module[key] = hook
        self._replaced.clear()
        for with_kwargs, key in self._with_kwargs:
            with_kwargs.pop(key, None)
        self._with_kwargs.clear()
        for layer in self.layers:
            layer._z3_leaf = False
        undone = bool(self.layers)
        self.layers.clear()
        return undone

    @property
    def largest_gradient(self) -> int:
        """Elements of the trained parameters of the largest layer; 0 without layers."""
        each = (_elements(p for p in x.parameters() if p.requires_grad) for x in self.layers)
        return max(each, default=0)

    def new_coordinator(self) -> "Coordinator":
        """Make a coordinator with an empty trace, which gathers the next layer ahead."""
        offload, persistent = self._offload, set(self._zero.persistent_parameters)
        ahead = offload._prefetch_bucket_sz
        if self.layers and ahead:
            each = (layer.parameters() for layer in self.layers)
            ahead = max(ahead, *(_elements(p for p in ps if p not in persistent) for ps in each))
        return Coordinator(
            has_layers=bool(self.layers),
            prefetch_bucket_sz=ahead,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=gather_stream(offload),
            inflight_param_registry=inflight_parameters(offload),
            timers=offload.timers,
            log_trace_cache_warnings=offload.log_trace_cache_warnings,
        )


class Coordinator(PartitionedParameterCoordinator):
    """DeepSpeed's coordinator of gathers, for a model whose layers are leaf modules.

    DeepSpeed's own prefetches at each module, and before the first layer there are some without
    parameters: several layers would be on their way.

    To see what of a module is used again soon, DeepSpeed looks into the modules that follow if that
    module is a leaf, and into none if it is not. After a leaf the whole model would count as used
    soon. This class goes by the flag of each of the modules that follow.
    """

    def __init__(
        self,
        *,
        has_layers: bool,
        prefetch_bucket_sz: int,
        max_reuse_distance_in_numel: int,
        **more: Any,
    ) -> None:
        super().__init__(
            prefetch_bucket_sz=prefetch_bucket_sz,
            max_reuse_distance_in_numel=max_reuse_distance_in_numel,
            **more,
        )
        self._has_layers = has_layers
        self._ahead = prefetch_bucket_sz
        self._reuse_distance = max_reuse_distance_in_numel
        self._order: Any = None
        self._used_soon: dict[int, set[int]] = {}

    def fetch_sub_module(self, current_submodule: nn.Module, forward: bool) -> None:
        """Gather what a module needs, and ahead as much as is not on its way already."""
        if self._has_layers:
            own = set(_fetched_for(current_submodule))
            inflight = _private(self, "__inflight_param_registry")
            ahead = self._ahead - _elements(p for p in inflight if p not in own)
            self._PartitionedParameterCoordinator__prefetch_bucket_sz = max(0, ahead)
        super().fetch_sub_module(current_submodule, forward)

    def _PartitionedParameterCoordinator__params_to_release(
        self, module: nn.Module, step: int
    ) -> set[int]:
        """Return the ids of what a module has and neither stays nor is used again soon."""
        fetched = _private(self, "__most_recent_step_id_param_fetched_for")
        used_soon = self._used_soon_after(step)
        return {
            parameter.ds_id
            for parameter in _fetched_for(module)
            if not parameter.ds_persist
            and parameter.ds_id not in used_soon
            and fetched[parameter] <= step  # else it was passed over as one that is there
        }

    def _used_soon_after(self, step: int) -> set[int]:
        order = _private(self, "__submodule_order")
        if order is not self._order:  # a new record
            self._order = order
            self._used_soon.clear()
        if step not in self._used_soon:
            used, distance = set(), 0
            for module in order[step:]:
                if distance >= self._reuse_distance:
                    break
                for parameter in _fetched_for(module):
                    used.add(parameter.ds_id)
                    distance += parameter.ds_numel
            self._used_soon[step] = used
        return self._used_soon[step]


def whole_layers(model: nn.Module, offload: Any) -> list[Any]:
    """Return the decoder layers that are gathered, and whose gradients are reduced, as one.

    Left out are

    - those of more than half of ``stage3_max_live_parameters``, as two are live at a time;
    - those that are, or have, a leaf module of DeepSpeed's already;
    - those that may run other modules on each rank, which DeepSpeed notices by modules alone;
    - those in which a module reads another one's weights.

    Args:
        model: partitioned.
        offload: DeepSpeed's ``parameter_offload`` of the model.
    """
    found = list(blocks(model))
    inside = {module for block in found for module in block.modules() if module is not block}
    return [
        block
        for block in found
        if 0 < 2 * _elements(block.parameters()) <= offload._max_available_parameters_in_numel
        and is_uniform(block)
        and block not in inside
        and not any(map(z3_leaf_module, block.modules()))
        and not any(m._external_params for m in block.modules() if m is not block)
    ]


def _only_with_grad(hook: Callable) -> Callable:
    """Return a hook that does nothing while autograd records nothing."""
    return lambda *args: hook(*args) if torch.is_grad_enabled() else None


def _require_tensors(layer: Any, hook: Callable) -> Callable:
    """Return a hook of a layer that refuses results whose backward could not be followed."""

    def following(module: nn.Module, args: Any, output: Any) -> Any:
        before = layer.__dict__.get("applied_pre_backward_ref_cnt", 0)
        result = hook(module, args, output)
        after = layer.__dict__.get("applied_pre_backward_ref_cnt", 0)
        if torch.is_grad_enabled() and after == before:
            raise UserError(
                f"under ZeRO-3 a {type(layer).__name__} has to return a tensor, or tensors in a "
                f"tuple, list or dict, and not a {type(output).__name__}: its backward would find "
                'no weights. Or gather it module by module, with "stage3_max_live_parameters" in '
                "the JSON below the elements of two layers"
            )
        return result

    return following


def _mark_keyword_inputs(layer: Any, hook: Callable) -> Callable:
    """Return a hook that marks keyword inputs as well as positional ones.

    DeepSpeed releases a layer when backward reaches its last marked input. It marks positional ones
    only, so a layer called by keywords would stay gathered. A layer still stays gathered if an
    input requires a gradient and gets none.
    """

    def note(tensor: Tensor) -> Tensor:
        return layer.post_bwd_fn.apply(tensor) if tensor.requires_grad else tensor

    def noting(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        args = hook(module, args) or args
        noted = {
            name: apply_to_tensors_only(note, value) if isinstance(value, Tensor | tuple) else value
            for name, value in kwargs.items()
        }
        return args, noted

    return noting


def _skip_when_gathered(layer: nn.Module, parameter: Any, hook: Callable) -> Callable:
    """Return a hook that does nothing while its layer, which has the parameter, is gathered."""
    return lambda *args: None if layer.ds_id in parameter.ds_active_sub_modules else hook(*args)


def _fetched_for(module: nn.Module) -> Iterable[Any]:
    return iter_params(module, recurse=z3_leaf_module(module))


def _private(coordinator: Coordinator, name: str) -> Any:
    return getattr(coordinator, mangled(PartitionedParameterCoordinator, name))


def _elements(parameters: Iterable[Any]) -> int:
    return sum(parameter.ds_numel for parameter in parameters)


def inflight_parameters(offload: Any) -> Any:
    """Return the registry of parameters that are being gathered."""
    return getattr(offload, mangled(type(offload), "__inflight_param_registry"))


def gather_stream(offload: Any) -> Any:
    """Return the stream on which DeepSpeed gathers; None where streams do not exist."""
    return getattr(offload, mangled(type(offload), "__allgather_stream"))


def mangled(cls: type, name: str) -> str:
    """Return the name under which Python stores a double-underscore attribute of a class."""
    return f"_{cls.__name__}{name}"
