"""The whole model on each rank, one or several.

Several ranks are replicas: gradients are averaged over them when backward has made them, a few
together, before they are applied. (A hook runs before DistributedDataParallel has reduced anything,
so a model wrapped by that would drift apart.)

During a perturbed pass a block of the model sees ``theta + c z`` because its parameters' ``data``
point to perturbed copies while the block runs, and to the untouched weights again afterwards. A
block is an element of an outermost ``nn.ModuleList`` (a decoder layer); what lies outside all
blocks, and what blocks share, is perturbed for the whole pass. So the extra memory is one block
plus the embeddings. A parameter of a block that is read while its block does not run is perturbed
from then on.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from addax_ds.distributed.collectives import get_world_size
from addax_ds.sharding.base import OnGradients, ParameterInfo, Perturb, Sharding, hook_of_parameter
from addax_ds.sharding.modules import blocks, materialize, modules_of, of_one_block
from addax_ds.utils.errors import UserError


class Unsharded(Sharding):
    """Sharding back end of a plain model, in one process or replicated on several ranks.

    Raises:
        UserError: if the model is wrapped by an engine, or a parameter is not contiguous.
    """

    name = "none"
    is_placed = False
    is_sharded = False
    loads_whole_on = None
    why_no_replicas = "each rank holds a copy of the whole model as it is"
    why_no_cpu_offload = "each rank holds the whole model on its device; use --sharding fsdp2"

    def __init__(self, model: nn.Module, param_groups: list[dict]) -> None:
        _check_whole(model)
        super().__init__(model, param_groups)
        for info in self.infos:
            if not info.parameter.is_contiguous():
                raise UserError(f"{info.name} is not contiguous: call .contiguous() on its data")
        self._replicate()
        self._blocks, self._outside = _split_into_blocks(model, self.infos)
        in_blocks = [info.parameter.numel() for _, infos in self._blocks for info in infos]
        self._largest = max(in_blocks, default=0)

    @classmethod
    @override
    def accepts(cls, model: nn.Module) -> bool:
        return True  # what no other back end has accepted is a plain model, or wrongly wrapped

    @classmethod
    @override
    def lay_out(cls, model: Any, device: torch.device) -> None:
        materialize(model, device)

    @override
    def forward_only(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    @override
    def perturbed(self, perturb: Perturb) -> Iterator[None]:
        swapped: dict[ParameterInfo, Tensor] = {}
        hooks = []
        try:
            for block, infos in self._blocks:
                enter = partial(self._swap_in, infos, perturb, swapped)
                leave = partial(_swap_out, infos, swapped)
                hooks.append(block.register_forward_pre_hook(enter))
                hooks.append(block.register_forward_hook(leave, always_call=True))
            self._swap_in(self._outside, perturb, swapped)
            # What another module reads of a block that does not run, it keeps for the whole pass.
            self.reads.on_read = lambda info: (
                None if info in swapped else self._swap_in([info], perturb, swapped)
            )
            yield
        finally:
            self.reads.on_read = None
            for hook in hooks:
                hook.remove()
            _swap_out(self.infos, swapped)

    def _swap_in(
        self,
        infos: list[ParameterInfo],
        perturb: Perturb,
        swapped: dict[ParameterInfo, Tensor],
        *_: Any,
    ) -> None:
        infos = [info for info in infos if info not in swapped]
        copies = perturb([self._shard(info) for info in infos])
        for info, copy in zip(infos, copies, strict=True):
            swapped[info] = stored = info.parameter.data
            info.parameter.data = copy.view(stored.shape)

    @override
    def attach(self, on_gradients: OnGradients) -> None:
        super().attach(on_gradients)
        for number, info in enumerate(self.infos):
            hook = hook_of_parameter(self, Unsharded._on_gradient, number)
            self._hooks.append(info.parameter.register_post_accumulate_grad_hook(hook))

    def _on_gradient(self, parameter: nn.Parameter, number: int) -> None:
        gradient = self._gradient_of(parameter).contiguous()
        # Those that wait have fewer elements together than a block's largest parameter.
        waiting = sum(each.numel() for _, each in self._waiting)
        complete = waiting + gradient.numel() >= self._largest
        self._hold(self._shard(self.infos[number]), gradient.view(-1), None, complete)

    @override
    def hand_over(self) -> None:
        """Average the gradients that wait over the replicas, and hand them over.

        The collectives meet as long as backward has the same order on every rank: a model that
        leaves out layers by chance (layerdrop) has not.
        """
        if self.world_size > 1:
            alike: dict[torch.dtype, list[Tensor]] = {}
            for _, gradient in self._waiting:
                alike.setdefault(gradient.dtype, []).append(gradient)
            world = dist.group.WORLD
            assert world is not None
            for gradients in alike.values():
                # In place: NCCL takes them in one launch as they are, gloo through a buffer.
                world.allreduce_coalesced(gradients).wait()
                torch._foreach_div_(gradients, self.world_size)
        super().hand_over()

    @override
    def weights_changed(self) -> None:
        pass  # the weights that a pass reads are the weights that were updated

    @override
    def check_unchanged(self) -> None:
        super().check_unchanged()
        owned: set[int] = set()
        for module in modules_of(self.model):
            if isinstance(module, FSDPModule):
                raise UserError(
                    "fully_shard was applied after the optimizer was attached, which then no "
                    "longer sees the weights: shard first, then make the optimizer and attach it"
                )
            owned.update(map(id, module._parameters.values()))
        for info in self.infos:
            if id(info.parameter) not in owned:
                raise UserError(
                    f"{info.name} was replaced by another parameter after the optimizer was "
                    "attached, which would train the old one: make a new optimizer and attach it"
                )

    @property
    @override
    def world_size(self) -> int:
        return get_world_size()

    @property
    @override
    def replicas(self) -> int:
        return self.world_size

    @override
    def sum_over_ranks(self, values: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(values)

    def _replicate(self) -> None:
        """Broadcast rank 0's weights and buffers."""
        if self.world_size > 1:
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.data, src=0)


def _check_whole(model: nn.Module) -> None:
    wrapped = (DistributedDataParallel, FullyShardedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, wrapped):
            raise UserError(
                f"{name or 'the model'} is wrapped in {type(module).__name__}, whose gradients are "
                "reduced too late for updates in place: attach model.module, which Addax "
                "replicates itself, or a model that fully_shard has sharded"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(
                f"{name} is distributed without fully_shard (tensor parallelism?), which Addax "
                "does not serve: attach a plain model, or one that fully_shard has sharded"
            )


def _split_into_blocks(
    model: nn.Module, infos: list[ParameterInfo]
) -> tuple[list[tuple[nn.Module, list[ParameterInfo]]], list[ParameterInfo]]:
    """Return the blocks with the parameters that only they use, and the parameters left over."""
    exclusive = of_one_block(model)
    own = {info.parameter: info for info in infos if info.parameter in exclusive}
    split = [(block, [own[p] for p in block.parameters() if p in own]) for block in blocks(model)]
    return split, [info for info in infos if info.parameter not in exclusive]


def _swap_out(infos: list[ParameterInfo], swapped: dict[ParameterInfo, Tensor], *_: Any) -> None:
    for info in infos:
        if info in swapped:
            info.parameter.data = swapped.pop(info)
