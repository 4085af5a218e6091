"""The private names of DeepSpeed that addax_ds relies on; a failure here says which one moved."""

import inspect

import deepspeed
import pytest
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3, IPGBucketZ3

SOURCES = {
    DeepSpeedZeroOptimizer_Stage3: (
        # Shards stay where they are: the branch for offload, without its buffers.
        "def _create_fp16_partitions_with_defragmentation(self, fp16_param_groups)",
        "self._create_fp16_partitions_with_defragmentation(self.trainable_param_groups)",
        "if not self.offload_param:  # partitioned params remain in GPU",
        "def offload_states(self",
        "self.lp_param_buffer = defragment(parameter_partitions)",
        "parameter_partitions = self._get_parameter_partitions()",
        "def _create_param_groups_fp16_flat_cpu_memory(self)",
        "def _move_to_flat_buffer(self, param_list, flat_buffer",
        "def _setup_for_real_optimizer(self)",
        "self._setup_for_real_optimizer()",
        "def partition_grads(self, params_to_release",
        "self.partition_grads(params_in_bucket, grad_partitions)",
        "def _pre_step(self)",
        "self.__param_id_to_grad_partition[",
        "self.grad_partitions_flat_buffer",
        "self.fp16_partitioned_groups_flat",
        "self.gradient_accumulation_dtype",
        "self.communication_data_type",
        "self.persistent_parameters",
        "bucket.buffer = torch.empty(self.reduce_bucket_size",
        "param.grad.record_stream(get_accelerator().current_stream())",
        "def destroy(self)",
        # What is given up when a pass is abandoned.
        "self.ipg_buckets: ",
    ),
    IPGBucketZ3: ("def clear_params(self)",),
    ZeROOptimizer: ("def _backward_active_depth(self)", "def exit_backward(self)"),
    parameter_offload: (
        "FWD_MODULE_STACK = list()",
        "FWD_MODULE_STACK.append(sub_module)",
        "class ZeROOrderedDict(OrderedDict)",
        "self._in_forward = False",
    ),
    DeepSpeedZeRoOffload: (
        "self.param_coordinator = ",
        "return self.param_coordinator",
        "def partition_all_parameters(self)",
        "self.__allgather_stream",
        "self.__inflight_param_registry",
        "self._prefetch_bucket_sz",
        "self._max_reuse_distance_in_numel",
        "self._max_available_parameters_in_numel",
        "self.log_trace_cache_warnings",
        "module.post_bwd_fn.apply",
        "param.ds_z3_leaf_module = module",
        # What is left out inside a unit, and by passes without a backward.
        "self.forward_hooks.append(module.register_forward_pre_hook(_pre_forward_module_hook))",
        "self.forward_hooks.append(module.register_forward_hook(_post_forward_module_hook))",
        "backward_hooks.append(module.register_forward_hook(_pre_backward_module_hook))",
        "backward_hooks.append(module.register_forward_pre_hook(_post_backward_module_hook))",
    ),
    Init: (
        "param.all_gather = all_gather",
        "param.all_gather_coalesced = all_gather_coalesced",
        "def all_gather(param_list=None, async_op=False, hierarchy=0)",
        "def all_gather_coalesced(params: Iterable[Parameter]",
        "p.ds_tensor.to(get_accelerator().current_device_name())",
        "param.ds_process_group = ",
        "def _convert_to_deepspeed_param(self, param)",
        "self.local_device = ",
        "param.partition = partition",
        "def partition(param_list=None",
        "param.ds_status = ZeroParamStatus.INFLIGHT",
    ),
    PartitionedParameterCoordinator: (
        "param_group[0].all_gather_coalesced(param_group",
        "Invalidate trace cache",  # what test_zero3 looks for in the log
        # A unit is fetched and released as a whole, which begins after gradients have their hooks.
        "params_to_fetch = set(iter_params(current_submodule, recurse=is_leaf))",
        "is_leaf = z3_leaf_module(current_submodule)",
        "param.ds_active_sub_modules.add(current_submodule.ds_id)",
        "param.ds_active_sub_modules.discard(submodule.ds_id)",
        "self.__params_to_release(submodule, self.__step_id)",
        "def __params_to_release(self, submodule_to_release: Module, step_id: int) -> Set[int]",
        "self.__most_recent_step_id_param_fetched_for[param] > step_id",
        "for module in self.__submodule_order[step_id:]",
    ),
    DeepSpeedEngine: (
        "def _configure_zero_optimizer(self, optimizer)",
        "from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3",
        "getattr(torch.optim, self.optimizer_name())",
        "self.global_steps += 1",
        "self.micro_steps += 1",
        "self.global_samples += self.train_batch_size()",
        "module._parameters._in_forward = True",
    ),
}


@pytest.mark.parametrize(
    ("owner", "text"), [(owner, text) for owner, texts in SOURCES.items() for text in texts]
)
def test_deepspeed_still_has_the_seam(owner, text):
    assert text in inspect.getsource(owner), (
        f"DeepSpeed {deepspeed.__version__}: {owner.__name__} has no {text!r} any more; "
        "addax_ds/sharding/zero3*.py or addax_ds/integrations relies on it"
    )


def test_the_start_of_the_ranks_and_the_planner_still_have_their_names():
    from deepspeed.ops import __compatible_ops__ as compatible
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from torch.utils import cpp_extension

    assert ShareMemCommBuilder.NAME in compatible
    assert list(inspect.signature(cpp_extension._get_build_directory).parameters) == [
        "name",
        "verbose",
    ]
    assert list(inspect.signature(zero3_linear_wrap).parameters) == ["input", "weight", "bias"]
