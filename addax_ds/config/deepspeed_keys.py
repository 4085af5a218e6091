"""Every key of the DeepSpeed JSON (DeepSpeed 0.19), and what Addax does with it.

Keys are dotted paths. A block that appears only as a whole (`scheduler`, `tensorboard`) is handed
to DeepSpeed unseen; a block with entries of its own is checked key by key. A test reads DeepSpeed's
own sources and fails when they know a key that is not listed here.
"""

from addax_ds.config.support import Rule, no_effect, only, works
from addax_ds.optim.hyperparameters import IN_JSON_PARAMS

_STAGE = (
    "Addax updates the weight shards in place as gradients are reduce-scattered, and perturbs them "
    "as they are gathered; only stage 3 shards the weights. Stages 1 and 2 average whole buffers "
    "after the backward pass and keep a full copy of the weights on every rank: write 3, or drop "
    "--deepspeed on a single device."
)
_NO_STATE = (
    "Addax keeps no optimizer state, so there is nothing to offload; "
    "remove the block and use offload_param to keep the weights in host memory."
)
_CHECKPOINT = "Checkpoints are Hugging Face folders, which addax_ds writes itself."
_ONE_STAGE_OLDER = "It belongs to ZeRO stages 1 and 2."
_QUANTIZED = (
    "Quantised transport would round away the perturbation of the zeroth-order passes; remove it."
)
_REMOVED = "DeepSpeed 0.19 has removed this feature and refuses the key; remove it."
_LEAF = (
    "Gathering a module as one unit is not verified with perturbed weights "
    "and in-place updates; remove it."
)
_REDUCE = (
    "ZeRO-3 reduce-scatters plain averages, and the update reads them as they land; remove the key."
)
_PARALLEL = "Only data parallelism under ZeRO-3 is supported; remove it."
_NVME = "It belongs to NVMe offload, which is not supported."
_BF16_STATE = (
    "Model state is the 16-bit weights alone: there are no master weights and no optimizer states."
)
_ACCUMULATION = "Each backward is reduced, and the step adds the results up; remove the key."
_HYSTERESIS = "The scale is halved at every overflow."

ZERO_KEYS: dict[str, Rule] = {
    "stage": only(3, note=_STAGE),
    "contiguous_gradients": works(),
    "reduce_scatter": only(
        True,
        note="With all-reduce every rank would hold the whole averaged bucket and nothing is "
        "gained; remove the key.",
    ),
    "reduce_bucket_size": works('"auto" becomes hidden_size squared.'),
    "use_multi_rank_bucket_allreduce": no_effect(_ONE_STAGE_OLDER),
    "allgather_partitions": no_effect(_ONE_STAGE_OLDER),
    "allgather_bucket_size": no_effect(_ONE_STAGE_OLDER),
    "overlap_comm": works(),
    "compute_grad_norm": only(True, note=f"{_ONE_STAGE_OLDER} DeepSpeed refuses false."),
    "load_from_fp32_weights": no_effect("There are no fp32 master weights."),
    "elastic_checkpoint": only(False, note="DeepSpeed no longer supports it under ZeRO-3."),
    "offload_param": works("Keeps the weight shards in host memory."),
    "offload_param.device": only(
        "cpu", "none", note="NVMe offload is not supported: a shard on disk cannot be updated."
    ),
    "offload_param.nvme_path": no_effect(_NVME),
    "offload_param.buffer_count": no_effect(_NVME),
    "offload_param.buffer_size": no_effect(_NVME),
    "offload_param.max_in_cpu": no_effect(_NVME),
    "offload_param.pin_memory": works(),
    "offload_optimizer": only(None, {"device": "none"}, note=_NO_STATE),
    "zenflow": only(None, note=_NO_STATE),
    "sub_group_size": works(),
    "cpu_offload_param": only(
        None, False, note='Deprecated: write offload_param {"device": "cpu"}.'
    ),
    "cpu_offload_use_pin_memory": no_effect("Deprecated: write offload_param.pin_memory."),
    "cpu_offload": only(None, False, note=f"Deprecated name of offload_optimizer. {_NO_STATE}"),
    "stage3_prefetch_bucket_size": works('"auto" becomes 0.9 times hidden_size squared.'),
    "stage3_param_persistence_threshold": works('"auto" becomes 10 times hidden_size.'),
    "stage3_model_persistence_threshold": works(),
    "stage3_max_live_parameters": works(),
    "stage3_max_reuse_distance": works(),
    "stage3_gather_16bit_weights_on_model_save": no_effect("Model folders are always written."),
    "stage3_module_granularity_threshold": only(0, note=_LEAF),
    "stage3_use_all_reduce_for_fetch_params": only(
        False, note="Fetching by all-reduce is not verified with perturbed weights; remove it."
    ),
    "stage3_allgather_sequential": works(),
    "stage3_gather_fp16_weights_on_model_save": no_effect(
        "Deprecated name of stage3_gather_16bit_weights_on_model_save."
    ),
    "ignore_unused_parameters": no_effect(_ONE_STAGE_OLDER),
    "legacy_stage1": only(False, note=_ONE_STAGE_OLDER),
    "round_robin_gradients": no_effect(_ONE_STAGE_OLDER),
    "parameter_alignment": no_effect(_ONE_STAGE_OLDER),
    "zero_hpz_partition_size": only(
        1,
        note="Hierarchical partitioning gathers a secondary copy of the shards, which the "
        "perturbation of the zeroth-order passes would miss; remove the key.",
    ),
    "zero_quantized_weights": only(False, note=_QUANTIZED),
    "zero_quantized_nontrainable_weights": only(False, note=_QUANTIZED),
    "zero_quantized_gradients": only(False, note="Not verified with in-place updates; remove it."),
    "memory_efficient_linear": works(),
    "pipeline_loading_checkpoint": works(),
    "override_module_apply": works(),
    "log_trace_cache_warnings": works(),
    "enable_sanity_checks": works(),
    "save_muon_momentum_buffer_in_memory": only(False, note="It belongs to the Muon optimizer."),
    "leaf_module": only(note=_LEAF),
    "mics_shard_size": only(note=_REMOVED),
    "mics_hierarchical_params_gather": only(note=_REMOVED),
    "zeropp_loco_param": only(note=_REMOVED),
}
# DeepSpeed accepts these with and without their prefix.
for _name in (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
):
    ZERO_KEYS[_name] = ZERO_KEYS[f"stage3_{_name}"]

OPTIMIZER_PARAMS: dict[str, Rule] = {known.name: works(known.note) for known in IN_JSON_PARAMS}

DS_KEYS: dict[str, Rule] = {
    "train_batch_size": works('"auto" is best: micro batch times ranks.'),
    "train_micro_batch_size_per_gpu": works("K1 / ranks: per_device_train_batch_size."),
    "gradient_accumulation_steps": works(
        "Micro-batches of a step. Without Trainer it is 1: give measure() a closure for each."
    ),
    "managed_gradient_accumulation": only(True, note=_ACCUMULATION),
    "gradient_clipping": works(
        "max_grad_norm: of the first-order gradient, exactly. Without the key it is 0, not 1."
    ),
    "optimizer": works(),
    "optimizer.type": only("Addax", note='This package trains with "type": "Addax" only.'),
    "optimizer.params": works(),
    **{f"optimizer.params.{name}": rule for name, rule in OPTIMIZER_PARAMS.items()},
    "optimizer.legacy_fusion": only(False, note="It belongs to DeepSpeed's fused Adam."),
    "scheduler": works("One of DeepSpeed's; without it Trainer's lr_scheduler_type is used."),
    "zero_optimization": works(),
    **{f"zero_optimization.{name}": rule for name, rule in ZERO_KEYS.items()},
    "zero_allow_untested_optimizer": no_effect("Addax registers itself with ZeRO."),
    "zero_force_ds_cpu_optimizer": no_effect("It belongs to offload_optimizer."),
    "bf16": works(),
    "bf16.enabled": works("Stores the weights in bf16: no master copy, no autocast."),
    "bf16.immediate_grad_update": no_effect("It belongs to DeepSpeed's own bf16 optimizer."),
    "bf16.check_grad_overflow": no_effect(_ONE_STAGE_OLDER),
    "bf16.bf16_master_weights_and_grads": only(False, note=_BF16_STATE),
    "bf16.bf16_optimizer_states": only(False, note=_BF16_STATE),
    "bfloat16": only(note="An old name that Transformers does not read: write bf16."),
    "fp16": works(),
    "fp16.enabled": works("Stores the weights in fp16, with a loss scale. Prefer bf16."),
    "fp16.auto_cast": only(False, note="Inputs of a language model are integers; remove it."),
    "fp16.loss_scale": works("0 adjusts itself; another value stays."),
    "fp16.initial_scale_power": works("The scale starts at 2 to this power."),
    "fp16.loss_scale_window": works("Steps without an overflow after which it doubles."),
    "fp16.hysteresis": no_effect(_HYSTERESIS),
    "fp16.consecutive_hysteresis": no_effect(_HYSTERESIS),
    "fp16.min_loss_scale": works(),
    "fp16.fp16_master_weights_and_grads": only(False, note=_BF16_STATE),
    "torch_autocast": works(),
    "torch_autocast.enabled": only(
        False, note="Weights, activations and gradients share one dtype: use bf16 or fp32."
    ),
    "torch_autocast.dtype": no_effect("Autocast is off."),
    "torch_autocast.lower_precision_safe_modules": no_effect("Autocast is off."),
    "data_types": works(),
    "data_types.grad_accum_dtype": no_effect(
        "An update sees the gradient in communication_data_type."
    ),
    "data_types.param_dtype": works("DeepSpeed requires it to agree with bf16.enabled."),
    "data_types.buffer_dtype": works(),
    "data_types.keep_in_fp32_modules": works(),
    "communication_data_type": only(
        None, "bf16", "fp16", "fp32", note="Gradients travel in one of bf16, fp16 and fp32."
    ),
    "seq_parallel_communication_data_type": no_effect("It belongs to sequence parallelism."),
    "prescale_gradients": only(False, note=_REDUCE),
    "gradient_predivide_factor": only(1, note=_REDUCE),
    "gradient_allreduce_op": only("mean", note=_REDUCE),
    "disable_allgather": no_effect("DeepSpeed 0.19 reads it and does nothing with it."),
    "activation_checkpointing": no_effect(
        "Transformers models use their own: --activation_checkpointing."
    ),
    "checkpoint": no_effect(
        "Checkpoints are addax_ds's own: docs/architecture.md, weights on disk."
    ),
    "checkpoint.tag_validation": no_effect("Checkpoints are addax_ds's own."),
    "checkpoint.use_node_local_storage": no_effect("--save_on_each_node says it."),
    "checkpoint.checkpoint_serialization": no_effect("Checkpoints are addax_ds's own."),
    "checkpoint.load_universal": only(
        False, note="Universal checkpoints hold fp32 master weights, which Addax does not keep."
    ),
    "checkpoint.parallel_write": no_effect("It belongs to pipeline parallelism."),
    "checkpoint.writer": only(None, note="The asynchronous writer is not verified; remove it."),
    "datastates_ckpt": only(
        False, note="It copies weights in the background while Addax updates them in place."
    ),
    "tensorboard": works(),
    "wandb": works(),
    "csv_monitor": works(),
    "comet": works(),
    "comms_logger": works(),
    "flops_profiler": works(),
    "timers": works(),
    "wall_clock_breakdown": works(),
    "memory_breakdown": works(),
    "steps_per_print": works("Trainer switches these lines off; it logs by itself."),
    "dump_state": works(),
    "log_level": works(),
    "disable_python_gc": works(),
    "vocabulary_size": works("DeepSpeed warns when it is not a multiple of 8."),
    "dataloader_drop_last": no_effect("DeepSpeed's own data loader is not used."),
    "aio": no_effect(_NVME),
    "autotuning": works(),
    "autotuning.enabled": only(False, note="The tuner would change batch sizes and stages."),
    "compile": works(),
    "compile.deepcompile": only(
        False, note="Compiled graphs gather weights past the hooks that perturb them; remove it."
    ),
    "data_efficiency": works(),
    "data_efficiency.enabled": only(False, note="Addax draws its own two streams of batches."),
    "hybrid_engine": works(),
    "hybrid_engine.enabled": only(False, note="It is for generation during RLHF training."),
    "tensor_parallel": works(),
    "tensor_parallel.autotp_size": only(0, note=_PARALLEL),
    "expert_parallel": works(),
    "expert_parallel.enabled": only(False, note=_PARALLEL),
    "use_data_before_expert_parallelism": only(False, note=_PARALLEL),
    "sequence_parallel_size": only(1, note=_PARALLEL),
    "data_parallel_size": only(note=f"DeepSpeed counts the ranks by itself. {_PARALLEL}"),
    "pipeline": only(note=_PARALLEL),
    "inference": only(note="It configures DeepSpeed-Inference; remove it."),
    "weight_quantization": only(note="Quantised weights cannot be trained; remove it."),
    "msamp": only(note="MS-AMP does not run under ZeRO-3; remove it."),
    "allgather_size": only(note=f"{_ONE_STAGE_OLDER} Remove it."),
    **{
        name: only(note=_REMOVED)
        for name in (
            "nebula",
            "compression_training",
            "amp",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
        )
    },
}

# The keys whose "auto" Transformers' Trainer replaces by a number (`HfTrainerDeepSpeedConfig`), and
# those of `optimizer.params` that `addax_ds.config.addax_config` replaces.
AUTO_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
        *(f"optimizer.params.{name}" for name in OPTIMIZER_PARAMS),
    }
)
