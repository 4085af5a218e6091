"""The interface of a sharding back end.

A back end knows where the weights live and which slice of which parameter a rank holds. The
optimizer and the loading of models do not know which back end they run on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Concatenate, Self, TypeVar
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from addax_ds.kernels.noise import MAX_PARAMETER_ELEMENTS, parameter_id
from addax_ds.kernels.operation import Slice
from addax_ds.sharding.calls import Calls
from addax_ds.sharding.modules import canonical_name, modules_of
from addax_ds.sharding.reads import Reads
from addax_ds.utils.errors import UserError

S = TypeVar("S", bound="Sharding")

_ATTACHED: WeakSet[nn.Module] = WeakSet()
"""Modules that have parameters whose gradients an optimizer applies."""


@dataclass(frozen=True, eq=False)
class Shard(Slice):
    """The slice of one trainable parameter that this rank holds.

    ``data`` is a flat view of the stored weights, without padding: writing to it writes the
    weights. ``index`` counts the trainable parameters.

    Attributes:
        name: canonical parameter name, equal on all back ends.
        decayed: whether weight decay applies (parameters of two or more dimensions; the biases and
            norm gains that MeZO exempts by name have one).
        group: index of the optimizer's parameter group.
    """

    name: str = ""
    decayed: bool = False
    group: int = 0


Perturb = Callable[[Sequence[Shard]], list[Tensor]]
"""Returns a perturbed copy of the ``data`` of each shard."""

OnGradients = Callable[[Sequence[Shard], Sequence[Tensor]], None]
"""Takes shards and their averaged gradients, flat and at least as long as the shards."""


@dataclass(frozen=True, eq=False)
class ParameterInfo:
    """Facts about a trainable parameter, apart from its shard."""

    parameter: nn.Parameter
    index: int
    name: str
    parameter_id: int
    decayed: bool
    group: int


class Sharding(ABC):
    """A sharding back end.

    The class itself answers what is asked of any model, before there is an optimizer: how a model
    is laid out and loaded, and which slice of a parameter a rank holds. An instance is bound to one
    model and one optimizer. `addax_ds.sharding.registry` lists the classes.

    Attributes:
        name: value of ``--sharding``.
        launch_command: what to start the ranks with; None if one process alone will do.
        uses_deepspeed: whether ``--deepspeed`` configures it.
        is_sharded: whether a rank holds a part of the model.
        is_placed: whether the shards stay on the device where `lay_out` has put them.
        loads_whole_on: in words, the ranks that hold the whole model while Transformers loads one
            that cannot be read weight by weight; None if each rank holds it in any case.
        loads_with_collectives: whether Transformers partitions a model as it loads it.
        why_no_replicas: why ``--replicas`` cannot be given; None if `lay_out` and `shard_loaded`
            take a keyword ``replicas``, the number of copies of the weights, each sharded over
            consecutive ranks.
        why_no_cpu_offload: why ``--cpu_offload`` cannot be given; None if these two take a keyword
            ``cpu_offload``, whether the shards go to host memory.
        model: the model, whose stored weights are the shards.
        infos: the trainable parameters.
        reads: which of them the model's code reads.
        group_elements: number of trainable elements of the whole model, by parameter group.
        calls: forwards and gradients since the last step.
    """

    name: ClassVar[str]
    launch_command: ClassVar[str | None] = None
    uses_deepspeed: ClassVar[bool] = False
    is_sharded: ClassVar[bool] = True
    is_placed: ClassVar[bool] = True
    loads_whole_on: ClassVar[str | None] = "every rank"
    loads_with_collectives: ClassVar[bool] = False
    why_no_replicas: ClassVar[str | None] = "this back end knows no replicas"
    why_no_cpu_offload: ClassVar[str | None] = "this back end keeps weights on the device"

    def __init__(self, model: nn.Module, param_groups: list[dict]) -> None:
        self.model = model
        self.infos = describe_parameters(model, param_groups, self.full_shape)
        for info in self.infos:
            kind = type(self.local_slice(info.parameter)[1])
            if kind is not Tensor:
                raise UserError(
                    f"{info.name} is a tensor of a kind of its own ({kind.__name__}; quantised?), "
                    "whose elements cannot be perturbed: freeze it and train plain weights"
                )
        self.reads = Reads(model, self.infos)
        self.group_elements = [0] * len(param_groups)
        for info in self.infos:
            self.group_elements[info.group] += self.full_shape(info.parameter).numel()
        self._held = [(p, p.requires_grad) for group in param_groups for p in group["params"]]
        self.calls = Calls()
        self._hooks: list[RemovableHandle] = []
        self._shards: dict[ParameterInfo, Shard] = {}
        self._on_gradients: OnGradients | None = None
        self._holders: list[nn.Module] = []
        self._waiting: list[tuple[Shard, Tensor]] = []
        self._unit_waiting: object = None

    # ---- any model -----------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether this back end holds the weights of a model, attached or not."""

    @classmethod
    @abstractmethod
    def lay_out(cls, model: Any, device: torch.device) -> None:
        """Allocate this rank's part of a model that was built on the meta device, in place.

        Values of parameters are undefined afterwards; buffers keep theirs.

        Args:
            model: of Transformers, from `addax_ds.models.empty.empty_model`.
            device: where it goes.
        """

    @classmethod  # noqa: B027
    def shard_loaded(cls, model: nn.Module, device: torch.device) -> None:
        """Take over, in place, a model that Transformers has loaded; see `lay_out`."""

    @classmethod  # noqa: B027
    def free_gathered(cls, model: Any) -> None:
        """Free what a pass has left gathered, so that the parameters are the shards.

        Args:
            model: or the engine around it, where there is one.
        """

    @classmethod
    def own_classes(cls, model: nn.Module) -> AbstractContextManager[None]:
        """Give the modules, while it is entered, the classes that they had before sharding."""
        return nullcontext()

    @classmethod
    def from_model(cls, model: nn.Module, param_groups: list[dict]) -> Self:
        """Bind the back end to a model and the groups of an optimizer over its parameters.

        Raises:
            UserError: if an engine has to do it, or for ways to shard that are not served.
        """
        return cls(model, param_groups)

    @staticmethod
    def full_shape(parameter: Tensor) -> torch.Size:
        """Shape of the unsharded parameter."""
        return parameter.shape

    @staticmethod
    def local_slice(parameter: Tensor) -> tuple[int, Tensor]:
        """Return the slice of a parameter that this rank holds.

        Returns:
            Flat index of its first element in the unsharded parameter, and its stored elements
            without padding, flat where it is a part: writing to them writes the weights.
        """
        return 0, parameter.detach()

    # ---- the model and optimizer of an instance ------------------------------------------------

    @property
    def trainable_elements(self) -> int:
        """Number of trainable elements of the whole model."""
        return sum(self.group_elements)

    @property
    def is_attached(self) -> bool:
        """Whether the gradients of the model go to an optimizer."""
        return self._on_gradients is not None

    def check_unchanged(self) -> None:
        """Check that the optimizer is attached, and that no parameter was frozen or unfrozen since.

        Raises:
            UserError: if one was; it would be updated, or left alone, in silence.
        """
        if not self.is_attached:
            raise UserError("the optimizer was detached from the model: attach it again")
        if any(p.requires_grad != trainable for p, trainable in self._held):
            raise UserError(
                "requires_grad of a parameter has changed since the optimizer was attached: freeze "
                "and unfreeze before, or make a new optimizer"
            )

    def _note_forward(self, *_: Any) -> None:
        # Without autograd it has no backward.
        self.calls.forward_ran |= torch.is_grad_enabled()

    def _gradient_of(self, parameter: nn.Parameter) -> Tensor:
        """Take the gradient that has just arrived away from a parameter.

        Raises:
            UserError: if the parameter was frozen after its forward.
        """
        self.calls.gradient_arrived = True
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            self.check_unchanged()
        assert gradient is not None
        return gradient

    def unapplied_gradient(self) -> str | None:
        """Name a parameter with a gradient that was not handed to ``on_gradients``, or None."""
        return next((info.name for info in self.infos if info.parameter.grad is not None), None)

    def shards(self, without: Container[int] = ()) -> Iterator[Shard]:
        """Yield this rank's part of every trainable parameter, empty ones left out.

        Args:
            without: numbers of parameters that are left out, too.
        """
        for info in self.infos:
            if info.index not in without and (shard := self._shard(info)).data.numel():
                yield shard

    def _shard(self, info: ParameterInfo) -> Shard:
        """Return this rank's part of a trainable parameter, which may be empty.

        The same object as long as the weights lie at the same place.
        """
        shard, stored = self._shards.get(info), self._stored(info)
        if shard is None or shard.data.data_ptr() != stored.data_ptr():
            start, part = self.local_slice(info.parameter)
            data = stored.detach().view(-1)[: part.numel()]
            shard = self._shards[info] = Shard(
                data=data,
                parameter_id=info.parameter_id,
                start=start,
                index=info.index,
                name=info.name,
                decayed=info.decayed,
                group=info.group,
            )
        return shard

    def _at_device(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return shards where they are gathered: offloaded ones travel, on the current stream.

        The host waits for none that is pinned.
        """
        arrived = [shard.data.to(self.device, non_blocking=True) for shard in shards]
        return [
            shard if data is shard.data else replace(shard, data=data)
            for shard, data in zip(shards, arrived, strict=True)
        ]

    def _stored(self, info: ParameterInfo) -> Tensor:
        """Return the tensor that begins with this rank's part of a parameter."""
        return info.parameter

    @abstractmethod
    def forward_only(self) -> AbstractContextManager[None]:
        """Announce forward passes without a backward, so that prefetching can follow them."""

    @abstractmethod
    def perturbed(self, perturb: Perturb) -> AbstractContextManager[None]:
        """Show perturbed weights to forward passes; stored weights are never written."""

    def attach(self, on_gradients: OnGradients) -> None:
        """Call ``on_gradients`` with reduced gradient shards as soon as they exist.

        What is reduced together is handed over together.

        Raises:
            UserError: if another optimizer is attached to the model.
        """
        trained = {info.parameter for info in self.infos}
        holders = [
            module
            for module in modules_of(self.model)
            if not trained.isdisjoint(module._parameters.values())
        ]
        if any(module in _ATTACHED for module in holders):
            raise UserError(
                "another Addax optimizer is attached to this model, or to a part of it, and both "
                "would apply its gradients: call detach() on what its attach() returned, first"
            )
        _ATTACHED.update(holders)
        self._holders = holders
        self._on_gradients = on_gradients
        self._hooks.append(self.model.register_forward_hook(self._note_forward))

    def detach(self) -> None:
        """Remove every hook and wrapper from the model and its parameters."""
        _ATTACHED.difference_update(self._holders)
        self._holders.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._on_gradients = None
        self._waiting.clear()

    def _hold(self, shard: Shard, gradient: Tensor, unit: object, complete: bool) -> None:
        """Keep a gradient until its unit is complete, or backward ends, and hand all over then."""
        if unit is not self._unit_waiting:
            self.hand_over()
            self._unit_waiting = unit
        if shard.data.numel():
            if not self._waiting:
                # Runs when this backward ends, which may leave a unit incomplete.
                torch.autograd.Variable._execution_engine.queue_callback(self.hand_over)
            self._waiting.append((shard, gradient))
        if complete:
            self.hand_over()

    def hand_over(self) -> None:
        """Hand over gradients that wait for others of their unit."""
        if self._waiting:
            assert self._on_gradients is not None
            shards, gradients = zip(*self._waiting, strict=True)
            self._waiting.clear()
            self._on_gradients(shards, gradients)

    def backward(self, loss: Tensor) -> None:
        """Run a backward that is not the last of its step."""
        loss.backward()

    def _all_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that optimizers see, those of others included."""
        return self.model.parameters()

    @contextmanager
    def other_gradients_kept(self) -> Iterator[None]:
        """Restore, after a backward, the gradients that another optimizer applies."""
        own = {info.parameter for info in self.infos}
        others = [p for p in self._all_parameters() if p.requires_grad and p not in own]
        before = [None if p.grad is None else p.grad.clone() for p in others]
        try:
            yield
        finally:
            for parameter, gradient in zip(others, before, strict=True):
                parameter.grad = gradient

    @abstractmethod
    def weights_changed(self) -> None:
        """Drop what is gathered: the next pass reads the shards as they are now."""

    def abandon(self) -> None:
        """Give up a pass that an exception has ended at any point, in backward too.

        Drops gradients on their way, and has to free what is gathered, so that the next step finds
        what it would have found without that pass. All ranks have to have left it at the same
        point: collectives that only some of them began are still waited for.
        """
        self.calls.clear()
        self._waiting.clear()
        for info in self.infos:
            info.parameter.grad = None

    def step_without_backward(self) -> None:  # noqa: B027
        """Complete a step that ran no backward.

        Engines that call the optimizer themselves do it from their own ``step``; where the training
        loop calls the optimizer, there is nothing to do.
        """

    def resume_at(self, step: int) -> None:  # noqa: B027
        """Set the step counter of an engine that has its own."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of ranks over which the batch is split."""

    @property
    def replicas(self) -> int:
        """Number of ranks that hold each shard."""
        return 1

    @abstractmethod
    def sum_over_ranks(self, values: Tensor) -> None:
        """Sum a small tensor over all ranks, in place; every rank gets the same bits."""

    @property
    def device(self) -> torch.device:
        """Device of scalars to be reduced."""
        return next(self.model.parameters()).device


def describe_parameters(
    model: nn.Module, param_groups: list[dict], full_shape: Callable[[Tensor], torch.Size]
) -> list[ParameterInfo]:
    """Name the optimizer's parameters canonically and check that z can serve them.

    Raises:
        UserError: for a parameter that the model does not have, two names with one id, or a
            parameter with more elements than z has counters for.
    """
    names = {p: canonical_name(name) for name, p in model.named_parameters()}
    infos: list[ParameterInfo] = []
    by_id: dict[int, str] = {}
    for group, entry in enumerate(param_groups):
        for parameter in entry["params"]:
            if not parameter.requires_grad:
                continue
            if parameter not in names:
                raise UserError(
                    f"the optimizer holds a parameter of shape {tuple(full_shape(parameter))} that "
                    "the model does not have: build Addax from the parameters of the attached "
                    "model. Under FSDP2 they stay gathered after a forward: call model.reshard() "
                    "before"
                )
            name, shape = names[parameter], full_shape(parameter)
            if shape.numel() > MAX_PARAMETER_ELEMENTS:
                raise UserError(f"{name} has {shape.numel()} elements; the limit is 2**35")
            pid = parameter_id(name)
            if by_id.setdefault(pid, name) != name:
                raise UserError(
                    f"parameters {by_id[pid]!r} and {name!r} share the id {pid:#010x}, so they "
                    "would share their z: rename one of the two modules"
                )
            infos.append(ParameterInfo(parameter, len(infos), name, pid, len(shape) >= 2, group))
    return infos


def padded(data: Tensor, numel: int) -> Tensor:
    """Pad a flat copy of a shard to the length that is gathered; the padding is never read."""
    missing = numel - data.numel()
    return torch.cat((data, data.new_zeros(missing))) if missing else data


def hook_of_parameter(
    sharding: S, method: Callable[Concatenate[S, nn.Parameter, ...], None], *where: int
) -> Callable[[nn.Parameter], None]:
    """Return a hook that calls a method of a back end with the parameter and where it is.

    The hook keeps neither the back end nor anything of the model alive: Python does not see the
    references of a parameter's hooks, which torch holds, and would never free such a circle.
    """
    of = ref(sharding)

    def hook(parameter: nn.Parameter) -> None:
        found = of()
        if found is not None:
            method(found, parameter, *where)

    return hook
