"""What `addax_ds.sharding.fsdp2` uses of FSDP2, on versions of torch that lack it (2.11, 2.12).

These also copy gradients to pinned host memory without waiting, and call hooks before the copy has
arrived: `fsdp2` refuses that policy.
"""

from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

BEFORE_2_13 = not hasattr(FSDPModule, "reset_iter_state")


def param_groups(module: FSDPModule) -> list[Any]:
    """Return the groups of parameters that are gathered with a module: one, in torch 2.11."""
    return _groups_of(module._get_fsdp_state())


def reset_iter_state(root: FSDPModule) -> None:
    """Free all that is gathered and forget the iteration, as torch 2.13 does by this name."""
    if not BEFORE_2_13:
        root.reset_iter_state()
        return
    state: Any = root._get_fsdp_state()
    comm, shared = state._comm_ctx, state._state_ctx
    states = shared.all_states
    groups = [group for s in states for group in _groups_of(s)]
    for group in groups:
        work = group._all_gather_result and group._all_gather_result.all_gather_work
        if isinstance(work, dist.Work):
            work.wait()
    current = state._device_handle.current_stream()
    for stream in (
        comm.all_gather_copy_in_stream,
        comm.all_gather_stream,
        comm.reduce_scatter_stream,
        comm.all_reduce_stream,
    ):
        current.wait_stream(stream)
    comm.all_gather_state = None
    if hasattr(comm, "reduce_scatter_states"):
        comm.reduce_scatter_states.clear()
    else:  # torch 2.11
        comm.reduce_scatter_state = None
    comm.post_forward_order.clear()
    for other in states:
        other._modules_to_run_forward.clear()
        other._training_state = TrainingState.IDLE
    for group in groups:
        if group._reshard_after_forward_event is not None:
            group._wait_all_gather_streams_on_event(group._reshard_after_forward_event)
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = group._partial_reduce_output = None
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()
    shared.iter_forward_root = None
    shared.post_backward_final_callback_queued = False


def _groups_of(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
