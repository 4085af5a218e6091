"""DeepSpeed ZeRO-3, by private names of DeepSpeed (0.19.8).

`addax_ds.integrations` alone knows others: it puts an optimizer into DeepSpeed's engine, which
hands each reduced gradient shard to `Zero3Sharding.deliver`.

- `Zero3Sharding` perturbs what travels. A parameter is gathered through its instance attributes
  ``all_gather_coalesced`` and ``all_gather``; both are wrapped to gather from perturbed copies of
  the shards, so the stored shards are never written.
- `partition_empty` partitions a model that was built on the meta device, for its weights to be read
  into the partitions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from addax_ds.sharding.base import (
    OnGradient,
    ParameterInfo,
    Perturb,
    Shard,
    Sharding,
    materialize,
    padded,
)
from addax_ds.utils.errors import UserError

_SHARD_ATTRIBUTES = ("ds_numel", "status", "final_location")


def partition_empty(model: nn.Module, config: dict[str, Any]) -> None:
    """Partition, in place, a model whose parameters lie on the meta device.

    A rank holds its partitions, whose values are undefined, and one whole parameter at a time.
    `deepspeed.zero.Init` around the construction would broadcast every parameter, and change the
    dtype of tensors that the model makes for its buffers.

    Args:
        model: its tied parameters stay tied, and its buffers where they are.
        config: DeepSpeed's; it says where partitions lie.
    """
    init = Init(module=nn.Module(), config_dict_or_path=config)
    for parameter in model.parameters():
        whole = torch.empty_like(parameter, device=init.local_device)
        torch.utils.swap_tensors(parameter, nn.Parameter(whole, parameter.requires_grad))
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]


class Zero3Sharding(Sharding):
    """Sharding back end over the partitions of DeepSpeed's ZeRO-3 optimizer.

    Args:
        zero: the engine's optimizer, an `addax_ds.integrations.stage3.Stage3`.
    """

    name = "zero3"
    launch_command = "`deepspeed --module addax_ds.cli.train --deepspeed zero3 ...` (or torchrun)"
    uses_deepspeed = True
    loads_whole_on = "rank 0"
    loads_with_collectives = True
    why_one_copy = (
        "zero_hpz_partition_size gathers from copies of the shards, which neither perturbation nor "
        "update reaches, and DeepSpeed 0.19 has no mics_shard_size any more; use --sharding fsdp2"
    )
    engine: DeepSpeedEngine

    def __init__(self, zero: Any) -> None:
        super().__init__(zero.module, zero.optimizer.param_groups)
        self._zero = zero
        self._infos_by_parameter = {info.parameter: info for info in self.infos}
        # Asked for some hundred times a step, and always the same.
        self._ranges: dict[nn.Parameter, tuple[int, int]] = {}
        for info in self.infos:
            start, data = self.local_slice(info.parameter)
            self._ranges[info.parameter] = start, data.numel()
        self._perturb: Perturb | None = None
        self._inference = False
        self._on_gradient: OnGradient | None = None
        self._forward_coordinator = _new_coordinator(zero.parameter_offload)
        # A coalesced gather is called on the first parameter of its list, which may be frozen: all
        # parameters are wrapped, trainable ones alone are perturbed.
        self._gathers: list[tuple[Any, Callable, Callable]] = []
        for parameter in zero.module.parameters():
            coalesced, single = parameter.all_gather_coalesced, parameter.all_gather
            self._gathers.append((parameter, coalesced, single))
            parameter.all_gather_coalesced = self._gather_perturbed(coalesced)
            parameter.all_gather = self._gather_perturbed(single, parameter)

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:  # noqa: D102
        return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @classmethod
    def lay_out(cls, model: Any, device: torch.device) -> None:
        """See `Sharding.lay_out`; the live `TrainingArguments` hold the JSON that configures it."""
        from transformers.integrations import deepspeed_config

        partition_empty(model, deepspeed_config())
        materialize(model, device)

    @classmethod
    def free_gathered(cls, model: Any) -> None:  # noqa: D102
        if isinstance(model, DeepSpeedEngine):
            model.optimizer.parameter_offload.partition_all_parameters()

    @classmethod
    def from_model(cls, model: nn.Module, param_groups: list[dict]) -> Self:  # noqa: D102
        raise UserError(
            "the model is partitioned by DeepSpeed: use deepspeed.initialize with the optimizer "
            'type "Addax" instead of addax_ds.attach'
        )

    @staticmethod
    def full_shape(parameter: Any) -> torch.Size:  # noqa: D102
        return getattr(parameter, "ds_shape", parameter.shape)  # a buffer has none

    @staticmethod
    def local_slice(parameter: Any) -> tuple[int, Tensor]:  # noqa: D102
        if not hasattr(parameter, "ds_id"):  # a buffer
            return Sharding.local_slice(parameter)
        # ZeRO-3 cuts the flat parameter into equal partitions; the last ones may be padded.
        partition = parameter.ds_tensor
        start = partition.ds_numel * dist.get_rank(group=parameter.ds_process_group)
        held = min(max(parameter.ds_numel - start, 0), partition.ds_numel)
        return start, partition.data.view(-1)[:held]

    def _shard(self, info: ParameterInfo) -> Shard:
        start, held = self._ranges[info.parameter]
        data = info.parameter.ds_tensor.data.view(-1)[:held]  # type: ignore[attr-defined]
        return Shard(info.name, info.parameter_id, start, data, info.decayed, info.group)

    # ---- first order ---------------------------------------------------------------------------

    def attach(self, on_gradient: OnGradient) -> None:  # noqa: D102
        super().attach(on_gradient)
        self._on_gradient = on_gradient
        # Before DeepSpeed's own hooks, which would fetch them module by module.
        hook = self.model.register_forward_pre_hook(self._gather_persistent, prepend=True)
        self._hooks.append(hook)

    def detach(self) -> None:  # noqa: D102
        super().detach()
        for parameter, coalesced, single in self._gathers:
            parameter.all_gather_coalesced = coalesced
            parameter.all_gather = single
        self._gathers.clear()
        self._on_gradient = None

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Hand over a reduced gradient partition, which may be padded or padding alone.

        Raises:
            UserError: if the optimizer was detached.
        """
        if self._on_gradient is None:
            self.check_unchanged()
        assert self._on_gradient is not None
        self.backward_ran = True
        shard = self._shard(self._infos_by_parameter[parameter])
        if shard.data.numel():
            self._on_gradient(shard, gradient)

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        self.engine.backward(loss)

    def finish_step(self) -> None:  # noqa: D102
        self._partition_all()  # what is still gathered is from before the update
        if not get_accelerator().resolves_data_dependency():
            # The update of shards without a gradient ran on the current stream, and DeepSpeed lets
            # no gather wait for that one.
            gather_stream = _gather_stream(self._zero.parameter_offload)
            gather_stream.wait_stream(get_accelerator().current_stream())

    def abandon(self) -> None:  # noqa: D102
        get_accelerator().synchronize()  # what is in flight uses memory that is freed here
        self.awaiting_backward = self.backward_ran = False
        zero, offload = self._zero, self._zero.parameter_offload
        _inflight(offload).clear()
        for parameter in self.model.parameters():
            if parameter.ds_status is ZeroParamStatus.INFLIGHT:  # type: ignore[attr-defined]
                parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        offload.release_backward_leftovers()
        # Their records of the order of modules, and of where in it they are, end in the middle.
        offload.param_coordinator = _new_coordinator(offload)
        self._forward_coordinator = _new_coordinator(offload)
        self._partition_all()
        for module in self.model.modules():
            if isinstance(module._parameters, parameter_offload.ZeROOrderedDict):
                module._parameters._in_forward = False
        running = parameter_offload.FWD_MODULE_STACK
        del running[running.index(self.model) + 1 :]
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        for info in self.infos:
            info.parameter.grad = None
        while zero._backward_active_depth:
            zero.exit_backward()
        for timer in self.engine.timers.get_timers().values():
            timer.reset()  # one that runs cannot be started again

    def step_without_backward(self) -> None:  # noqa: D102
        self.engine.step()

    def resume_at(self, step: int) -> None:  # noqa: D102
        # What its monitors count by.
        self.engine.global_steps = step
        self.engine.micro_steps = step * self.engine.gradient_accumulation_steps()
        self.engine.global_samples = step * self.engine.train_batch_size()

    # ---- zeroth order --------------------------------------------------------------------------

    @contextmanager
    def forward_only(self) -> Iterator[None]:  # noqa: D102
        # DeepSpeed prefetches along the recorded order of modules. A pass without a backward has
        # another order: it gets a coordinator of its own, or the record is discarded every step.
        offload = self._zero.parameter_offload
        usual = offload.param_coordinator
        self._partition_all()
        offload.param_coordinator = self._forward_coordinator
        with self._abandoned_on_error():
            yield
        self._partition_all()
        offload.param_coordinator = usual

    @contextmanager
    def perturbed(self, perturb: Perturb) -> Iterator[None]:  # noqa: D102
        self._partition_all()  # what is still gathered would be seen unperturbed
        self._perturb = perturb
        with self._abandoned_on_error():
            yield
        self._perturb = None
        self._partition_all()  # what is still gathered is perturbed

    @contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """Abandon a pass that raises; a gather that has failed could not be partitioned again."""
        try:
            yield
        except BaseException:
            self._perturb = None
            self.abandon()
            raise

    def _gather_perturbed(self, gather: Callable, own: nn.Parameter | None = None) -> Callable:
        def wrapped(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            if params is None:
                params = kwargs.pop("param_list", None)
            params = [own] if params is None else list(params)
            if self._perturb is None:
                return gather(params, *args, **kwargs)
            stored = [parameter.ds_tensor for parameter in params]
            try:
                for parameter in params:
                    parameter.ds_tensor = self._perturbed_partition(parameter)
                return gather(params, *args, **kwargs)
            finally:
                for parameter, partition in zip(params, stored, strict=True):
                    parameter.ds_tensor = partition

        return wrapped

    def _perturbed_partition(self, parameter: Any) -> Tensor:
        """Return a perturbed copy of a trainable parameter's partition, a frozen one's itself."""
        stored = parameter.ds_tensor
        info = self._infos_by_parameter.get(parameter)
        if info is None:
            return stored
        assert self._perturb is not None
        copy = padded(self._perturb(self._shard(info)), stored.numel())
        for attribute in _SHARD_ATTRIBUTES:
            setattr(copy, attribute, getattr(stored, attribute))
        return copy

    # ---- collectives ---------------------------------------------------------------------------

    @property
    def world_size(self) -> int:  # noqa: D102
        return dist.get_world_size(group=self._zero.dp_process_group)

    def sum_over_ranks(self, values: Tensor) -> None:  # noqa: D102
        dist.all_reduce(values, group=self._zero.dp_process_group)

    @property
    def device(self) -> torch.device:  # noqa: D102
        return torch.device(_current_device())

    def _partition_all(self) -> None:
        self._zero.parameter_offload.partition_all_parameters()

    def _gather_persistent(self, *_: Any) -> None:
        """At the start of a forward, gather the small parameters that DeepSpeed keeps whole.

        They were partitioned since the last pass that saw other weights. One collective for all of
        them, where each module would else fetch its own.

        What inference mode has gathered is of no use to autograd.

        Raises:
            UserError: under inference mode, if a backward is to come.
        """
        if torch.is_inference_mode_enabled() and self.awaiting_backward and not self.backward_ran:
            raise UserError(
                "under ZeRO-3 there is no forward in torch.inference_mode() between a forward and "
                "its backward: use torch.no_grad(), or evaluate before measure() or after step()"
            )
        if self._inference and not torch.is_inference_mode_enabled():
            self._partition_all()
        self._inference = torch.is_inference_mode_enabled()
        missing = [
            parameter
            for parameter in self._zero.persistent_parameters
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
        ]
        if missing:
            missing[0].all_gather_coalesced(missing).wait()


def _new_coordinator(offload: Any) -> PartitionedParameterCoordinator:
    """Make a parameter coordinator like the one of ``offload``, with an empty trace."""
    return PartitionedParameterCoordinator(
        prefetch_bucket_sz=offload._prefetch_bucket_sz,
        max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
        max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
        allgather_stream=_gather_stream(offload),
        inflight_param_registry=_inflight(offload),
        timers=offload.timers,
        log_trace_cache_warnings=offload.log_trace_cache_warnings,
    )


def _inflight(offload: Any) -> Any:
    """Return the registry of parameters that are being gathered."""
    return getattr(offload, mangled(type(offload), "__inflight_param_registry"))


def _gather_stream(offload: Any) -> Any:
    """Return the stream on which DeepSpeed gathers; None where streams do not exist."""
    return getattr(offload, mangled(type(offload), "__allgather_stream"))


def mangled(cls: type, name: str) -> str:
    """Return the name under which Python stores a double-underscore attribute of a class."""
    return f"_{cls.__name__}{name}"


def _current_device() -> str:
    return get_accelerator().current_device_name()
