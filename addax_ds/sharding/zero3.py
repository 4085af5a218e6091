"""DeepSpeed ZeRO-3, by private names of DeepSpeed (0.19.8).

`zero3_layers` knows others, and `addax_ds.integrations`: it puts an optimizer into the engine,
which hands each reduced gradient shard to `Zero3Sharding.deliver`.

- `Zero3Sharding` perturbs what travels. A parameter is gathered through its instance attributes
  ``all_gather_coalesced`` and ``all_gather``; both are wrapped to gather from perturbed copies of
  the shards, so the stored shards are never written.
- `partition_empty` partitions a model that was built on the meta device, for its weights to be read
  into the partitions.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from torch import Tensor, nn
from typing_extensions import override

from addax_ds.sharding.base import OnGradients, ParameterInfo, Perturb, Sharding, padded
from addax_ds.sharding.modules import materialize
from addax_ds.sharding.zero3_layers import LayerGathering, gather_stream, inflight_parameters
from addax_ds.utils.errors import UserError

_SHARD_ATTRIBUTES = ("ds_numel", "status", "final_location")
# Gathers that may begin before the compute that they follow, in a perturbed pass.
_MODULES_AHEAD, _LAYERS_AHEAD = 4, 1


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
    why_no_replicas = (
        "zero_hpz_partition_size gathers from copies of the shards, which neither perturbation nor "
        "update reaches, and DeepSpeed 0.19 has no mics_shard_size any more; use --sharding fsdp2"
    )
    why_no_cpu_offload = "its JSON says so, with offload_param, as --deepspeed zero3_offload does"
    engine: DeepSpeedEngine

    def __init__(self, zero: Any) -> None:
        super().__init__(zero.module, zero.optimizer.param_groups)
        self._zero = zero
        self._infos_by_parameter = {info.parameter: info for info in self.infos}
        self._perturb: Perturb | None = None
        self._compute_stream: Any = None
        self._gathers_begun: deque[Any] = deque()
        self._inference = False
        self._layers = LayerGathering(zero)
        self._forward_coordinator = self._layers.new_coordinator()
        zero.parameter_offload.param_coordinator = self._layers.new_coordinator()
        # A coalesced gather is called on the first parameter of its list, which may be frozen: all
        # parameters are wrapped, trainable ones alone are perturbed.
        self._gathers: list[tuple[Any, Callable, Callable]] = []
        self._parameters: list[Any] = list(zero.module.parameters())
        for parameter in self._parameters:
            coalesced, single = parameter.all_gather_coalesced, parameter.all_gather
            self._gathers.append((parameter, coalesced, single))
            parameter.all_gather_coalesced = self._gather_perturbed(coalesced)
            parameter.all_gather = self._gather_perturbed(single, parameter)

    @classmethod
    @override
    def accepts(cls, model: nn.Module) -> bool:
        return any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @classmethod
    @override
    def lay_out(cls, model: Any, device: torch.device) -> None:
        """See `Sharding.lay_out`; the live `TrainingArguments` hold the JSON that configures it."""
        from transformers.integrations import deepspeed_config

        partition_empty(model, deepspeed_config())
        materialize(model, device)

    @classmethod
    @override
    def free_gathered(cls, model: Any) -> None:
        if isinstance(model, DeepSpeedEngine):
            model.optimizer.parameter_offload.partition_all_parameters()

    @classmethod
    @override
    def from_model(cls, model: nn.Module, param_groups: list[dict]) -> Self:
        raise UserError(
            "the model is partitioned by DeepSpeed: use deepspeed.initialize with the optimizer "
            'type "Addax" instead of addax_ds.attach'
        )

    @staticmethod
    @override
    def full_shape(parameter: Any) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)  # a buffer has none

    @staticmethod
    @override
    def local_slice(parameter: Any) -> tuple[int, Tensor]:
        if not hasattr(parameter, "ds_id"):  # a buffer
            return Sharding.local_slice(parameter)
        # ZeRO-3 cuts the flat parameter into equal partitions; the last ones may be padded.
        partition = parameter.ds_tensor
        start = partition.ds_numel * dist.get_rank(group=parameter.ds_process_group)
        held = min(max(parameter.ds_numel - start, 0), partition.ds_numel)
        return start, partition.data.view(-1)[:held]

    @override
    def _stored(self, info: ParameterInfo) -> Tensor:
        return info.parameter.ds_tensor  # type: ignore[attr-defined]

    # ---- first order ---------------------------------------------------------------------------

    @override
    def attach(self, on_gradients: OnGradients) -> None:
        super().attach(on_gradients)
        # Before DeepSpeed's own hooks, which would fetch them module by module.
        hook = self.model.register_forward_pre_hook(self._gather_persistent, prepend=True)
        self._hooks.append(hook)

    @override
    def detach(self) -> None:
        super().detach()
        for parameter, coalesced, single in self._gathers:
            parameter.all_gather_coalesced = coalesced
            parameter.all_gather = single
        self._gathers.clear()
        if self._layers.undo():  # what is recorded is the order of whole layers
            self._partition_all()
            self._zero.parameter_offload.param_coordinator = self._layers.new_coordinator()

    def deliver(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """Hand over the reduced gradient partitions of a bucket, which may be padded.

        Raises:
            UserError: if the optimizer was detached.
        """
        if not self.is_attached:
            self.check_unchanged()
        self.calls.gradient_arrived = True
        shards = [self._shard(self._infos_by_parameter[parameter]) for parameter in parameters]
        pairs = zip(shards, gradients, strict=True)
        self._waiting += (pair for pair in pairs if pair[0].data.numel())  # not padding alone
        self.hand_over()

    @override
    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    @override
    def weights_changed(self) -> None:
        self._partition_all()
        # The update of shards without a gradient ran on the current stream.
        self._order_gathers()

    def _order_gathers(self) -> None:
        """Let gathers wait for the current stream; DeepSpeed lets none do so."""
        if not get_accelerator().resolves_data_dependency():
            stream = gather_stream(self._zero.parameter_offload)
            stream.wait_stream(get_accelerator().current_stream())

    @override
    def abandon(self) -> None:
        get_accelerator().synchronize()  # what is in flight uses memory that is freed here
        super().abandon()
        zero, offload = self._zero, self._zero.parameter_offload
        inflight_parameters(offload).clear()
        for parameter in self.model.parameters():
            if parameter.ds_status is ZeroParamStatus.INFLIGHT:  # type: ignore[attr-defined]
                parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        # Their records of the order of modules, and of where in it they are, end in the middle.
        offload.param_coordinator = self._layers.new_coordinator()
        self._forward_coordinator = self._layers.new_coordinator()
        self._partition_all()
        for module in self.model.modules():
            # What a recomputation has left to the release after a backward; deepspeed >= 0.19.1.
            getattr(module, "ds_recompute_parameters", set()).clear()
            if isinstance(module._parameters, parameter_offload.ZeROOrderedDict):
                module._parameters._in_forward = False
        running = parameter_offload.FWD_MODULE_STACK
        del running[running.index(self.model) + 1 :]
        for bucket in zero.ipg_buckets.values():
            bucket.clear_params()
        while zero._backward_active_depth:
            zero.exit_backward()
        for timer in self.engine.timers.get_timers().values():
            timer.reset()  # one that runs cannot be started again

    @override
    def step_without_backward(self) -> None:
        self.engine.step()

    @override
    def resume_at(self, step: int) -> None:
        # What its monitors count by.
        self.engine.global_steps = step
        self.engine.micro_steps = step * self.engine.gradient_accumulation_steps()
        self.engine.global_samples = step * self.engine.train_batch_size()

    # ---- zeroth order --------------------------------------------------------------------------

    @contextmanager
    @override
    def forward_only(self) -> Iterator[None]:
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
    @override
    def perturbed(self, perturb: Perturb) -> Iterator[None]:
        self._partition_all()  # what is still gathered would be seen unperturbed
        self._perturb = perturb
        self._order_gathers()
        self._compute_stream = get_accelerator().current_stream()
        self._gathers_begun.clear()
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
            self._keep_pace()
            stored = [parameter.ds_tensor for parameter in params]
            try:
                for parameter, copy in self._perturbed_partitions(params):
                    parameter.ds_tensor = copy
                return gather(params, *args, **kwargs)
            finally:
                for parameter, partition in zip(params, stored, strict=True):
                    parameter.ds_tensor = partition

        return wrapped

    def _keep_pace(self) -> None:
        """Let the gather that comes next wait for what was to compute when an earlier one began.

        Gathers wait for no compute of their own accord, so they would run ahead, and each would
        hold memory: a module's becomes free only when the module has computed.
        """
        if get_accelerator().resolves_data_dependency():
            return
        event = get_accelerator().Event()
        event.record(self._compute_stream)
        self._gathers_begun.append(event)
        if len(self._gathers_begun) > (_LAYERS_AHEAD if self._layers.layers else _MODULES_AHEAD):
            get_accelerator().current_stream().wait_event(self._gathers_begun.popleft())

    def _perturbed_partitions(self, parameters: list[Any]) -> list[tuple[Any, Tensor]]:
        """Return the trainable ones of parameters with perturbed copies of their partitions."""
        assert self._perturb is not None
        trained = [p for p in parameters if p in self._infos_by_parameter]
        shards = self._at_device([self._shard(self._infos_by_parameter[p]) for p in trained])
        copies = self._perturb(shards)
        found = []
        for parameter, copy in zip(trained, copies, strict=True):
            stored = parameter.ds_tensor
            whole = padded(copy, stored.numel())
            for attribute in _SHARD_ATTRIBUTES:
                setattr(whole, attribute, getattr(stored, attribute))
            found.append((parameter, whole))
        return found

    @property
    def largest_gradient(self) -> int:
        """Elements of the trained parameters of the largest layer that is gathered as one."""
        return self._layers.largest_gradient

    # ---- collectives ---------------------------------------------------------------------------

    @property
    @override
    def world_size(self) -> int:
        return dist.get_world_size(group=self._zero.dp_process_group)

    @override
    def sum_over_ranks(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self._zero.dp_process_group)

    @property
    @override
    def device(self) -> torch.device:
        return torch.device(_current_device())

    def _partition_all(self) -> None:
        """Partition what is gathered, as DeepSpeed's `partition_all_parameters` does.

        That one goes through layers of calls for each parameter, and most calls find none.
        """
        inflight, gathered = inflight_parameters(self._zero.parameter_offload), []
        for parameter in self._parameters:
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status is not ZeroParamStatus.NOT_AVAILABLE:
                if parameter in inflight:
                    inflight.pop(parameter).wait()
                gathered.append(parameter)
        if gathered:
            gathered[0].partition(gathered)

    def _gather_persistent(self, *_: Any) -> None:
        """At the start of a forward, gather the small parameters that DeepSpeed keeps whole.

        They were partitioned since the last pass that saw other weights. One collective for all of
        them, where each module would else fetch its own.

        What inference mode has gathered is of no use to autograd.

        Raises:
            UserError: under inference mode, if a backward is to come.
        """
        awaits_backward = self.calls.forward_ran and not self.calls.gradient_arrived
        if torch.is_inference_mode_enabled() and awaits_backward:
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


def _current_device() -> str:
    return get_accelerator().current_device_name()
