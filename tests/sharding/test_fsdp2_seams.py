"""The private names of FSDP2 that addax_ds relies on; a failure here says which one moved."""

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import (
    _fsdp_collectives,
    _fsdp_param_group,
    _fully_shard,
)
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from addax_ds.sharding import fsdp2
from addax_ds.sharding.fsdp2_versions import BEFORE_2_13
from addax_ds.utils.errors import UserError

SOURCES: dict[Any, tuple[str, ...]] = {
    FSDPParam: (
        "self._sharded_param_data = padded_sharded_param.view(-1)",
        "sharded_param_data = self._sharded_param_data",  # what all_gather_inputs gathers
        "self.sharded_param = nn.Parameter(",
        "self._module_info",
        "new_param = getattr(module_info.module, module_info.param_name)",
        "self.sharded_param = new_param",  # what reset_sharded_param is called for
        "self._unsharded_param = nn.Parameter(",
        "self.unsharded_accumulated_grad = ",
        "def free_unsharded_param(self)",
        "self.fsdp_placement = fsdp_placement",
        "self.mesh_info = mesh_info",
        "self.is_dtensor = ",
        "self.device = device",
    ),
    FSDPParamGroup: (
        "self.fsdp_params = [",
        "self.mesh_info = mesh_info",
        "self.post_forward_mesh_info = post_forward_mesh_info",
        "self._partial_reduce_output",
        # reshard_after_forward=True: the same mesh, and nothing is kept of a smaller one
        "self.mesh_info != self.post_forward_mesh_info",
    ),
    FSDPState: ("self._is_root", "self._comm_ctx.post_forward_order.clear()"),
    _fully_shard: (
        "def _get_fsdp_state(self)",
        "def reshard(self)",
        "orig_cls = cls.__mro__[cls._orig_cls_mro_index]",
    ),
    _fsdp_collectives: (
        "fsdp_param._sharded_param_data",  # what the foreach path of mixed precision gathers
        "param_all_gather_inputs[i] = fsdp_param.all_gather_inputs",
        "hook(fsdp_param.sharded_param)",
        '"_post_accumulate_grad_hooks"',
    ),
}

if BEFORE_2_13:
    SOURCES[FSDPState] += (
        "self._fsdp_param_group",
        "self._modules_to_run_forward",
        "self._state_ctx.iter_forward_root",
        "self._state_ctx.post_backward_final_callback_queued = False",
    )
    SOURCES[FSDPParamGroup] += (
        "self.all_gather_copy_in_stream = ",
        "self.all_gather_stream = ",
        "self.reduce_scatter_stream = ",
        "self.all_reduce_stream = ",
        "self.all_gather_state: ",
        "self.reduce_scatter_state",
        "self._all_gather_result: ",
        "self._post_reduce_event: ",
        "self._all_reduce_state: ",
        "self._reshard_after_forward_event: ",
        "self._post_forward_indices: ",
        "def _wait_all_gather_streams_on_event(",
        "def _to_sharded(self)",
    )
else:
    SOURCES[FSDPState] += (
        "self._fsdp_param_groups",
        "fsdp_param_group._reset_iter_state()",
        # An abandoned pass: what it has in flight is dropped by the same method.
        "self._comm_ctx.reduce_scatter_states.clear()",
        "self._state_ctx.post_backward_final_callback_queued = False",
    )
    SOURCES[_fully_shard] += ("def reset_iter_state(self)",)
    SOURCES[_fsdp_collectives] += ("has_post_acc_grad_hook",)  # pinned gradients are waited for


def source(owner: Any) -> str:
    """Of the module, where communication of a group of parameters is another class beside it."""
    return inspect.getsource(_fsdp_param_group if owner is FSDPParamGroup else owner)


def test_gradients_that_have_not_arrived_in_pinned_memory_are_refused(monkeypatch):
    monkeypatch.setattr(fsdp2, "BEFORE_2_13", True)
    mesh = SimpleNamespace(size=lambda: 1)
    param = SimpleNamespace(
        mesh_info=SimpleNamespace(mesh=mesh),
        is_dtensor=False,
        fsdp_placement=SimpleNamespace(dim=0),
        pin_memory=True,
    )
    monkeypatch.setattr(fsdp2.dist, "get_world_size", lambda: 1)
    with pytest.raises(UserError, match=r"CPUOffloadPolicy\(pin_memory=False\)"):
        fsdp2._check(param)
    param.pin_memory = False
    fsdp2._check(param)


@pytest.mark.parametrize(
    ("owner", "text"), [(owner, text) for owner, texts in SOURCES.items() for text in texts]
)
def test_torch_still_has_the_seam(owner, text):
    assert text in source(owner), (
        f"torch {torch.__version__}: {owner.__name__} has no {text!r} any more; "
        "addax_ds/sharding/fsdp2.py relies on it"
    )


def test_a_gather_reads_the_shard_in_no_other_place():
    """One read in `all_gather_inputs`, three that keep it valid, one in the foreach path."""
    reads = {
        owner: len(re.findall(r"\._sharded_param_data\b(?! =)", inspect.getsource(owner)))
        for owner in (FSDPParam, FSDPParamGroup, FSDPState, _fsdp_collectives)
    }
    assert reads == {FSDPParam: 4, FSDPParamGroup: 0, FSDPState: 0, _fsdp_collectives: 1}, (
        f"torch {torch.__version__} reads the sharded weights in other places than 2.13: check "
        "that a perturbed pass still gathers perturbed copies"
    )


def test_a_property_can_stand_in_for_the_shard():
    assert not hasattr(FSDPParam, "__slots__")
    assert "fsdp_param.reset_sharded_param()" in inspect.getsource(FSDPParamGroup)
    assert "_sharded_param_data" not in vars(FSDPParam)
