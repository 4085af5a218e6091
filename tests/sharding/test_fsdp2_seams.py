"""The private names of FSDP2 that addax_ds relies on; a failure here says which one moved."""

import inspect
import re

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

SOURCES = {
    FSDPParam: (
        "self._sharded_param_data = padded_sharded_param.view(-1)",
        "sharded_param_data = self._sharded_param_data",  # what all_gather_inputs gathers
        "self.sharded_param = nn.Parameter(",
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
    FSDPState: (
        "self._fsdp_param_groups",
        "self._is_root",
        "self._comm_ctx.post_forward_order.clear()",
        "fsdp_param_group._reset_iter_state()",
        # An abandoned pass: what it has in flight is dropped by the same method.
        "self._comm_ctx.reduce_scatter_states.clear()",
        "self._state_ctx.post_backward_final_callback_queued = False",
    ),
    _fully_shard: (
        "def _get_fsdp_state(self)",
        "def reset_iter_state(self)",
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


@pytest.mark.parametrize(
    ("owner", "text"), [(owner, text) for owner, texts in SOURCES.items() for text in texts]
)
def test_torch_still_has_the_seam(owner, text):
    assert text in inspect.getsource(owner), (
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
