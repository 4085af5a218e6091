"""PyTorch FSDP2 (``fully_shard``), by private names: these here, and `fsdp2_versions` (torch 2.13).

- A parameter is gathered from the attribute ``_sharded_param_data`` of its ``FSDPParam``. During a
  perturbed pass reading it yields a perturbed copy, wherever the shard lives and whatever the
  precision policy makes of it afterwards; the stored shard is never written.
- FSDP2 runs a parameter's post-accumulate hooks as soon as its gradient is reduced, on the stream
  of the reduction: the update happens there, while the next layer's backward runs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from typing_extensions import override

from addax_ds.sharding.base import (
    OnGradients,
    ParameterInfo,
    Perturb,
    Sharding,
    hook_of_parameter,
    padded,
)
from addax_ds.sharding.fsdp2_versions import BEFORE_2_13, param_groups, reset_iter_state
from addax_ds.sharding.modules import materialize, separate_blocks
from addax_ds.utils.errors import UserError

logger = logging.getLogger(__name__)


def shard_model(model: nn.Module, **options: Any) -> None:
    """Shard a model in place: each decoder layer by itself, and what is left with the root.

    Layers that share parameters are left to the root, too: FSDP2 wants all owners of a parameter in
    one group.

    Args:
        model: the model; its parameters may lie on the meta device.
        **options: passed to ``fully_shard`` (``mesh``, ``offload_policy``, ...).
    """
    for block in separate_blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


class _PerturbableParam(FSDPParam):
    """FSDP2's state of a parameter; gathers a perturbed copy while its unit has ``perturb``."""

    unit: "_Unit | None" = None

    @property
    def _sharded_param_data(self) -> Tensor:
        unit = self.unit
        return self.stored if unit is None or unit.perturb is None else unit.copy_of(self)

    @_sharded_param_data.setter
    def _sharded_param_data(self, value: Tensor) -> None:
        vars(self)["_sharded_param_data"] = value

    def reset_sharded_param(self) -> None:
        """Look, at the first forward, whether the shard was replaced: at what is stored."""
        unit, self.unit = self.unit, None
        try:
            super().reset_sharded_param()
        finally:
            self.unit = unit

    @property
    def stored(self) -> Tensor:
        """Flat view of the shard as it is stored, with padding."""
        return vars(self)["_sharded_param_data"]


class _Unit:
    """Parameters that are gathered and reduced together: one `FSDPParamGroup`.

    Attributes:
        infos: its trainable parameters.
        perturb: makes copies of them, by their states, while a pass is to see perturbed weights.
    """

    def __init__(self, infos: list[ParameterInfo]) -> None:
        self.infos = infos
        self.perturb: Callable[[_Unit], dict[FSDPParam, Tensor]] | None = None
        self._copies: dict[FSDPParam, Tensor] = {}

    def copy_of(self, fsdp_param: _PerturbableParam) -> Tensor:
        """Return a copy, made with those of the unit when the first one is asked for."""
        if fsdp_param not in self._copies:
            assert self.perturb is not None
            self._copies = self.perturb(self)
        return self._copies.pop(fsdp_param)

    def forget(self) -> None:
        """Show stored weights from now on."""
        self.perturb = None
        self._copies.clear()


class Fsdp2(Sharding):
    """Sharding back end over the shards of a model that ``fully_shard`` was applied to.

    Raises:
        UserError: for ways to shard that this back end does not serve.
    """

    name = "fsdp2"
    launch_command = "`torchrun --nproc_per_node N -m addax_ds.cli.train --sharding fsdp2 ...`"
    why_no_replicas = None
    why_no_cpu_offload = None

    def __init__(self, model: nn.Module, param_groups: list[dict]) -> None:
        if not isinstance(model, FSDPModule):
            raise UserError(
                "parts of the model are sharded by fully_shard, but the model itself is not: call "
                "fully_shard(model) too, after its layers"
            )
        self._root = model
        self.free_gathered(model)
        super().__init__(model, param_groups)
        self._fsdp_params: dict[Tensor, Any] = {}
        self._units: list[_Unit] = []
        infos = {info.parameter: info for info in self.infos}
        self._groups = _param_groups(model)
        for group in self._groups:
            for fsdp_param in group.fsdp_params:
                _look_at_module(fsdp_param)
            _check_group(group)
            for fsdp_param in group.fsdp_params:
                _check(fsdp_param)
                _check_once(infos.get(fsdp_param.sharded_param), self._fsdp_params)
                self._fsdp_params[fsdp_param.sharded_param] = fsdp_param
            own = [infos.get(fsdp_param.sharded_param) for fsdp_param in group.fsdp_params]
            self._units.append(_Unit([info for info in own if info is not None]))
        for info in self.infos:
            if info.parameter not in self._fsdp_params:
                raise UserError(
                    f"{info.name} is trainable but not sharded, so nobody would average its "
                    "gradient: freeze it, or call fully_shard without ignored_params"
                )
        _warn_of_narrow_passes(self._fsdp_params.values())

    @classmethod
    @override
    def accepts(cls, model: nn.Module) -> bool:
        return any(isinstance(module, FSDPModule) for module in model.modules())

    @classmethod
    @override
    def lay_out(
        cls, model: Any, device: torch.device, *, replicas: int = 1, cpu_offload: bool = False
    ) -> None:
        shard_model(model, **options_for(device, replicas, cpu_offload))
        materialize(model, device, "cpu" if cpu_offload else None)

    @classmethod
    @override
    def shard_loaded(
        cls, model: nn.Module, device: torch.device, *, replicas: int = 1, cpu_offload: bool = False
    ) -> None:
        shard_model(model, **options_for(device, replicas, cpu_offload))

    @staticmethod
    @override
    def local_slice(parameter: Tensor) -> tuple[int, Tensor]:
        if not isinstance(parameter, DTensor):
            return Sharding.local_slice(parameter)
        return _start(parameter), _local(parameter).detach().view(-1)

    @classmethod
    @override
    def free_gathered(cls, model: Any) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @classmethod
    @contextmanager
    @override
    def own_classes(cls, model: nn.Module) -> Iterator[None]:
        sharded = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
        for module, given in sharded:
            module.__class__ = given.__mro__[FSDPModule._orig_cls_mro_index]
        try:
            yield
        finally:
            for module, given in sharded:
                module.__class__ = given

    @override
    def _stored(self, info: ParameterInfo) -> Tensor:
        return vars(self._fsdp_params[info.parameter])["_sharded_param_data"]

    # ---- first order ---------------------------------------------------------------------------

    @override
    def attach(self, on_gradients: OnGradients) -> None:
        super().attach(on_gradients)
        for fsdp_param in self._fsdp_params.values():
            fsdp_param.__class__ = _PerturbableParam
        for place, unit in enumerate(self._units):
            for number, info in enumerate(unit.infos):
                self._fsdp_params[info.parameter].unit = unit
                hook = hook_of_parameter(self, Fsdp2._on_gradient, place, number)
                self._hooks.append(info.parameter.register_post_accumulate_grad_hook(hook))

    def _on_gradient(self, parameter: nn.Parameter, place: int, number: int) -> None:
        unit = self._units[place]
        gradient = _local(self._gradient_of(parameter)).reshape(-1)
        # The gradients of a unit are parts of one tensor and come in the order of `infos`.
        complete = number == len(unit.infos) - 1
        self._hold(self._shard(unit.infos[number]), gradient, unit, complete=complete)

    @override
    def detach(self) -> None:
        super().detach()
        for fsdp_param in self._fsdp_params.values():
            vars(fsdp_param).pop("unit", None)
            fsdp_param.__class__ = FSDPParam

    @override
    def weights_changed(self) -> None:
        self._reshard()

    @override
    def _all_parameters(self) -> Iterable[Any]:
        return self._fsdp_params  # the model's are others while they are gathered

    @override
    def abandon(self) -> None:
        self._reshard()  # which drops what is being gathered or reduced, too
        super().abandon()
        for fsdp_param in self._fsdp_params.values():
            fsdp_param.unsharded_accumulated_grad = None
            if hasattr(fsdp_param, "_unsharded_param"):
                fsdp_param._unsharded_param.grad = None
                fsdp_param.free_unsharded_param()  # a gather may have ended before it counted

    @override
    def unapplied_gradient(self) -> str | None:
        # With replicas, what is reduced over shards waits here to be reduced over replicas.
        waiting = {
            fsdp_param.sharded_param
            for group in self._groups
            if group._partial_reduce_output is not None
            for fsdp_param in group.fsdp_params
        }
        for info in self.infos:
            fsdp_param = self._fsdp_params[info.parameter]
            if info.parameter in waiting:
                return info.name
            unsharded = getattr(fsdp_param, "_unsharded_param", None)
            gradients = (
                info.parameter.grad,
                fsdp_param.unsharded_accumulated_grad,
                None if unsharded is None else unsharded.grad,
            )
            if any(gradient is not None for gradient in gradients):
                return info.name
        return None

    # ---- zeroth order --------------------------------------------------------------------------

    @contextmanager
    @override
    def forward_only(self) -> Iterator[None]:
        try:
            yield
        finally:
            # Backward prefetches along the order of forwards since the last one.
            self._reshard()

    @contextmanager
    @override
    def perturbed(self, perturb: Perturb) -> Iterator[None]:
        self._reshard()  # what is still gathered would be seen unperturbed

        def copies(unit: _Unit) -> dict[FSDPParam, Tensor]:
            shards = self._at_device([self._shard(info) for info in unit.infos])
            found = zip(unit.infos, perturb(shards), strict=True)
            states = [(self._fsdp_params[info.parameter], copy) for info, copy in found]
            return {state: padded(copy, state.stored.numel()) for state, copy in states}

        for unit in self._units:
            unit.perturb = copies
        try:
            yield
        finally:
            for unit in self._units:
                unit.forget()
            self._reshard()  # what is still gathered is perturbed

    def _reshard(self) -> None:
        """Free all that is gathered; the root is not resharded by its own forward."""
        is_root = self._root._get_fsdp_state()._is_root
        if is_root is False:
            raise UserError(
                "the model is a part of a larger FSDP2 model, whose root drives the gathering: "
                "attach the optimizer to the whole model"
            )
        if is_root:  # None if no forward has run yet
            reset_iter_state(self._root)

    # ---- collectives ---------------------------------------------------------------------------

    @property
    @override
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    @override
    def replicas(self) -> int:
        mesh = next(iter(self._fsdp_params.values())).mesh_info.mesh
        return mesh.size(0) if mesh.ndim > 1 else 1

    @override
    def sum_over_ranks(self, values: Tensor) -> None:
        dist.all_reduce(values)

    @property
    @override
    def device(self) -> torch.device:
        # With CPU offload the shards live elsewhere than the collectives.
        return next(iter(self._fsdp_params.values())).device


def options_for(
    device: torch.device, replicas: int, cpu_offload: bool = False
) -> dict[str, DeviceMesh | CPUOffloadPolicy]:
    """Return the options of `shard_model` for so many copies of the weights, on host or device."""
    options: dict[str, DeviceMesh | CPUOffloadPolicy] = {}
    if cpu_offload:  # nothing is pinned without a device that reads it, nor where `_check` refuses
        pinned = device.type != "cpu" and not BEFORE_2_13
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=pinned)
    if replicas > 1:
        shape, names = (replicas, dist.get_world_size() // replicas), ("replicate", "shard")
        options["mesh"] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return options


def _param_groups(model: nn.Module) -> list[Any]:
    """Return each group once: modules that were sharded as a list have one together."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return list(dict.fromkeys(group for module in sharded for group in param_groups(module)))


@torch.no_grad()
def _look_at_module(fsdp_param: Any) -> None:
    """Take the parameter that the module has now, as FSDP2 itself does at the first forward.

    Transformers loads weights of a sharded model into new parameters.
    """
    place = fsdp_param._module_info
    if isinstance(getattr(place.module, place.param_name), DTensor):
        fsdp_param.reset_sharded_param()


def _check_group(group: Any) -> None:
    if group.post_forward_mesh_info not in (None, group.mesh_info):
        raise UserError(
            "fully_shard(reshard_after_forward=<a number>) gathers for backward from "
            "copies that an update in place would not reach: use True or False"
        )
    trained = (p.sharded_param for p in group.fsdp_params if p.sharded_param.requires_grad)
    if len(dtypes := {parameter.dtype for parameter in trained}) > 1:
        raise UserError(
            f"weights of {' and '.join(sorted(map(str, dtypes)))} are sharded together, and FSDP2 "
            "reduces gradients of one dtype: call fully_shard on the modules of one of them first, "
            "or train under ZeRO-3"
        )


def _check(fsdp_param: Any) -> None:
    mesh = fsdp_param.mesh_info.mesh
    if fsdp_param.is_dtensor or mesh.size() != dist.get_world_size():
        raise UserError(
            "Addax serves FSDP2 over all ranks, with or without replicas (HSDP), not beside tensor "
            "or other parallelism: give fully_shard plain parameters and a mesh of all ranks"
        )
    if fsdp_param.fsdp_placement.dim != 0:
        raise UserError(
            "Addax needs shards that are contiguous in the parameter, along dimension 0: call "
            "fully_shard without shard_placement_fn"
        )
    if BEFORE_2_13 and fsdp_param.pin_memory:
        raise UserError(
            f"FSDP2 of torch {torch.__version__} hands over offloaded gradients before they have "
            "arrived in pinned memory: use torch 2.13 or later, or "
            "CPUOffloadPolicy(pin_memory=False)"
        )


def _check_once(info: ParameterInfo | None, fsdp_params: dict[Tensor, Any]) -> None:
    """Raise `UserError` for a parameter that two modules have sharded."""
    if info is not None and info.parameter in fsdp_params:
        raise UserError(
            f"{info.name} is sharded twice, and each time a part of its gradient is reduced. It "
            "was tied after fully_shard, as Transformers does with a distributed_config: load the "
            "model without one and call shard_model of addax_ds.sharding.fsdp2"
        )


def _warn_of_narrow_passes(fsdp_params: Iterable[Any]) -> None:
    """Warn of a policy that rounds weights on their way, of which the update does not know."""
    for fsdp_param in fsdp_params:
        dtype, stored = fsdp_param.mp_policy.param_dtype, fsdp_param.sharded_param.dtype
        if dtype not in (None, stored):
            logger.warning(
                "MixedPrecisionPolicy(param_dtype=%s) rounds the perturbed %s weights on their "
                "way: the zeroth-order part credits z instead of what the passes see, and a small "
                "zo_eps drowns in rounding. Train %s weights without param_dtype instead",
                dtype,
                stored,
                dtype,
            )
            return


def _start(parameter: Any) -> int:
    """Flat index of the local shard's first element in the unsharded parameter."""
    shape, mesh, placements = parameter.shape, parameter.device_mesh, parameter.placements
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return offsets[0] * shape[1:].numel()


def _local(tensor: Any) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor
