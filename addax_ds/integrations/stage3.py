"""DeepSpeed's ZeRO-3 optimizer without master weights and gradient partitions.

Private names of DeepSpeed (0.19.8). Buckets, streams, hooks and reduce-scatter stay as they are,
and each reduced gradient shard is applied to ``param.ds_tensor`` as soon as it exists.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import defragment
from torch import Tensor, nn

from addax_ds.optim.step import Closure
from addax_ds.sharding.zero3 import Zero3Sharding
from addax_ds.sharding.zero3_layers import mangled
from addax_ds.utils.errors import UserError


class Stage3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3 whose only model state is the partitioned weights.

    `deepspeed.initialize` returns it as the optimizer, hence `measure`, as `Addax` has it.
    """

    sharding: Zero3Sharding
    reduce_bucket_size: int

    def _create_fp16_partitions_with_defragmentation(self, fp16_param_groups: list[dict]) -> None:
        # The base class moves all shards into one flat buffer, for its optimizer's update: through
        # host memory, on all ranks at once, or with offload into a second, pinned copy of them.
        # They are good where they are; the branch for offload fills buffers that are none (below).
        self.offload_param, offloaded = True, self.offload_param
        super()._create_fp16_partitions_with_defragmentation(fp16_param_groups)
        self.offload_param = offloaded
        get_accelerator().empty_cache()  # whole weights that were cut into shards

    def _create_param_groups_fp16_flat_cpu_memory(self) -> None:
        for group in self.trainable_param_groups:
            count = sum(parameter.partition_numel() for parameter in group["params"])
            placeholder = torch.empty(count, dtype=self.dtype, device="meta")
            self.param_groups_fp16_flat_cpu_memory.append(placeholder)

    def _move_to_flat_buffer(self, *_: Any, **__: Any) -> None:
        """Nothing: there is no buffer (above)."""

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Move the weights to host memory and back by `reload_states`: in one buffer, from now."""
        if not hasattr(self, "lp_param_buffer"):
            self.lp_param_buffer = defragment(self._get_parameter_partitions())
        super().offload_states(*args, **kwargs)

    def _setup_for_real_optimizer(self) -> None:
        self.gradient_accumulation_dtype = self.communication_data_type
        # The base class looks up gradient partitions here after each backward; there are none.
        nothing = torch.empty(0)
        self.grad_partitions_flat_buffer = nothing
        trainable = itertools.chain.from_iterable(self.fp16_groups)
        partitions = {parameter.ds_id: nothing for parameter in trainable}
        setattr(
            self,
            mangled(DeepSpeedZeroOptimizer_Stage3, "__param_id_to_grad_partition"),
            partitions,
        )
        self.sharding = Zero3Sharding(self)
        # One collective and one update for a decoder layer.
        self.reduce_bucket_size = max(self.reduce_bucket_size, self.sharding.largest_gradient)
        self.optimizer.bind(self.sharding)

    def measure(
        self,
        zeroth_order: Closure | Sequence[Closure] | None,
        first_order: Closure | Sequence[Closure] | None,
    ) -> Tensor | None:
        """See `Addax.measure`."""
        return self.optimizer.measure(zeroth_order, first_order)

    def reduce_ready_partitions_and_remove_grads(self, param: nn.Parameter) -> None:
        """Put a gradient into its bucket, which the first one makes: MeZO needs none.

        Raises:
            UserError: for a parameter that was frozen between its forward and its backward.
        """
        if param.grad is None:
            self.sharding.check_unchanged()
        for dtype, bucket in self.ipg_buckets.items() if self.contiguous_gradients else ():
            if bucket.buffer is None:
                device = get_accelerator().current_device_name()
                bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)
        super().reduce_ready_partitions_and_remove_grads(param)

    def partition_grads(
        self, params_to_release: list[nn.Parameter], grad_partitions: list[Tensor]
    ) -> None:
        """Apply the step to each shard whose gradient a bucket's reduce-scatter delivered."""
        self.sharding.deliver(params_to_release, grad_partitions)
        for parameter in params_to_release:
            if parameter.grad is not None and not get_accelerator().is_synchronized_device():
                # A gradient too large for the bucket is read where it lies, on this stream.
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None

    def step(self, closure: None = None) -> None:
        """Finish the step; most of it has happened during backward."""
        self._pre_step()
        self._global_grad_norm = 0.0
        self.optimizer.step(closure)

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and ours."""
        self.sharding.detach()
        super().destroy()

    def state_dict(self) -> dict[str, Any]:
        """Refuse, as DeepSpeed's checkpoints are of fp32 partitions, and there are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "DeepSpeed's save_checkpoint does not hold what Addax trains: write the weights with "
            "addax_ds.save_weights, and the state_dict() of the Addax optimizer, or "
            "train with AddaxTrainer, which does both"
        )
