"""The keys of the DeepSpeed JSON (DeepSpeed 0.19): which work, which are refused and why.

Keys are dotted paths. A block that appears only as a whole (`scheduler`, `tensorboard`) is handed
to DeepSpeed unseen; a block with entries of its own is checked key by key. A test reads DeepSpeed's
own sources and fails when they know a key that is not listed here.
"""

from addax_ds.config.support import Rule, nested, no_effect, only, works
from addax_ds.optim.hyperparameters import IN_JSON_PARAMS

_NO_STATE = (
    "Addax keeps no optimizer state, so there is nothing to offload; "
    "remove the block and use offload_param to keep the weights in host memory."
)
_OTHER_OPTIMIZER = "It belongs to optimizers of DeepSpeed's own."
_STAGES_1_2 = "It belongs to ZeRO stages 1 and 2."
_LEAF = (
    "Decoder layers are gathered as one by themselves, and DeepSpeed's own leaves hold all their "
    "gradients at once; remove it."
)
_REDUCE = (
    "ZeRO-3 reduce-scatters plain averages, and the update reads them as they land; remove the key."
)
_REMOVED = "DeepSpeed 0.19 has removed this feature and refuses the key; remove it."
_PARALLEL = "Only data parallelism is supported; remove it."
_NVME = "It belongs to NVMe offload, which is not supported."
_CHECKPOINT = "Checkpoints are Hugging Face folders, which addax_ds writes itself."

ZERO_KEYS: dict[str, Rule] = {
    **works(
        "contiguous_gradients reduce_bucket_size overlap_comm sub_group_size offload_param "
        "offload_param.pin_memory stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "stage3_allgather_sequential memory_efficient_linear pipeline_loading_checkpoint "
        "override_module_apply log_trace_cache_warnings enable_sanity_checks"
    ),
    **only(
        (3,),
        {
            "stage": "Addax updates the weight shards in place as gradients are reduce-scattered, "
            "and perturbs them as they are gathered; only stage 3 shards the weights. Stages 1 and "
            "2 average whole buffers after the backward pass and keep a full copy of the weights "
            "on every rank: write 3, or drop --deepspeed on a single device."
        },
    ),
    **only(
        ("cpu", "none"),
        {
            "offload_param.device": "NVMe offload is not supported: a shard on disk cannot be "
            "updated."
        },
    ),
    **only((None, {"device": "none"}), {"offload_optimizer": _NO_STATE}),
    **only((None,), {"zenflow": _NO_STATE}),
    **only(
        (None, False),
        {
            "cpu_offload": f"Deprecated name of offload_optimizer. {_NO_STATE}",
            "cpu_offload_param": 'Deprecated: write offload_param {"device": "cpu"}.',
        },
    ),
    **only(
        (True,),
        {
            "reduce_scatter": "With all-reduce every rank would hold the whole averaged bucket and "
            "nothing is gained; remove the key.",
            "compute_grad_norm": f"{_STAGES_1_2} DeepSpeed refuses false.",
        },
    ),
    **only(
        (False,),
        {
            "elastic_checkpoint": "DeepSpeed no longer supports it under ZeRO-3.",
            "legacy_stage1": _STAGES_1_2,
            "save_muon_momentum_buffer_in_memory": _OTHER_OPTIMIZER,
            "stage3_use_all_reduce_for_fetch_params": "Fetching by all-reduce is not verified with "
            "perturbed weights; remove it.",
            "zero_quantized_gradients": "Not verified with in-place updates; remove it.",
            "zero_quantized_weights zero_quantized_nontrainable_weights": "Quantised transport "
            "would round away the perturbation of the zeroth-order passes; remove it.",
        },
    ),
    **only((0,), {"stage3_module_granularity_threshold": _LEAF}),
    **only(
        (1,),
        {
            "zero_hpz_partition_size": "Hierarchical partitioning gathers a secondary copy of the "
            "shards, which the perturbation of the zeroth-order passes would miss; remove the key."
        },
    ),
    **only(
        (),
        {
            "leaf_module": _LEAF,
            "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param": _REMOVED,
        },
    ),
    **no_effect(
        {
            "use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size "
            "ignore_unused_parameters round_robin_gradients parameter_alignment": _STAGES_1_2,
            "load_from_fp32_weights": "There are no fp32 master weights.",
            "offload_param.nvme_path offload_param.buffer_count offload_param.buffer_size "
            "offload_param.max_in_cpu": _NVME,
            "cpu_offload_use_pin_memory": "Deprecated: write offload_param.pin_memory.",
            "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save": (
                "Model folders are always written."
            ),
        }
    ),
}
# DeepSpeed accepts most of these names with and without the prefix; the old fp16 one only with it.
ZERO_KEYS |= {
    name.removeprefix("stage3_"): rule
    for name, rule in ZERO_KEYS.items()
    if name.startswith("stage3_") and "fp16" not in name
}

OPTIMIZER_PARAMS: dict[str, Rule] = works(" ".join(known.name for known in IN_JSON_PARAMS))

DS_KEYS: dict[str, Rule] = {
    **works(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps "
        "gradient_clipping optimizer optimizer.params scheduler zero_optimization bf16 "
        "bf16.enabled fp16 fp16.enabled fp16.loss_scale fp16.initial_scale_power "
        "fp16.loss_scale_window fp16.min_loss_scale torch_autocast data_types "
        "data_types.param_dtype data_types.buffer_dtype data_types.keep_in_fp32_modules "
        "tensorboard wandb csv_monitor comet comms_logger timers timers.throughput "
        "timers.throughput.enabled timers.throughput.synchronized flops_profiler "
        "wall_clock_breakdown memory_breakdown steps_per_print dump_state log_level "
        "disable_python_gc vocabulary_size autotuning compile data_efficiency hybrid_engine "
        "tensor_parallel expert_parallel"
    ),
    **nested("optimizer.params", OPTIMIZER_PARAMS),
    **nested("zero_optimization", ZERO_KEYS),
    **nested(
        "flops_profiler",
        works(
            "enabled recompute_fwd_factor profile_step module_depth top_modules detailed "
            "output_file"
        ),
    ),
    **only(("Addax",), {"optimizer.type": 'This package trains with "type": "Addax" only.'}),
    **only(
        (True,),
        {
            "managed_gradient_accumulation": "Each backward is reduced, and the step adds the "
            "results up; remove the key."
        },
    ),
    **only(
        (None, "bf16", "fp16", "fp32"),
        {"communication_data_type": "Gradients travel in one of bf16, fp16 and fp32."},
    ),
    **only(
        (False,),
        {
            "optimizer.legacy_fusion": _OTHER_OPTIMIZER,
            "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states "
            "fp16.fp16_master_weights_and_grads": "Model state is the 16-bit weights alone: there "
            "are no master weights and no optimizer states.",
            "fp16.auto_cast": "Inputs of a language model are integers; remove it.",
            "torch_autocast.enabled": "Weights, activations and gradients share one dtype: use "
            "bf16 or fp32.",
            "prescale_gradients": _REDUCE,
            "checkpoint.load_universal": "Universal checkpoints hold fp32 master weights, which "
            "Addax does not keep.",
            "datastates_ckpt": "It copies weights in the background while Addax updates them in "
            "place.",
            "autotuning.enabled": "The tuner would change batch sizes and stages.",
            "compile.deepcompile": "Compiled graphs gather weights past the hooks that perturb "
            "them; remove it.",
            "data_efficiency.enabled": "Addax draws its own two streams of batches.",
            "hybrid_engine.enabled": "It is for generation during RLHF training.",
            "expert_parallel.enabled use_data_before_expert_parallelism": _PARALLEL,
        },
    ),
    **only((0,), {"tensor_parallel.autotp_size": _PARALLEL}),
    **only((1,), {"gradient_predivide_factor": _REDUCE, "sequence_parallel_size": _PARALLEL}),
    **only(("mean",), {"gradient_allreduce_op": _REDUCE}),
    **only((None,), {"checkpoint.writer": "The asynchronous writer is not verified; remove it."}),
    **only(
        (),
        {
            "bfloat16": "An old name that Transformers does not read: write bf16.",
            "data_parallel_size": f"DeepSpeed counts the ranks by itself. {_PARALLEL}",
            "pipeline": _PARALLEL,
            "inference": "It configures DeepSpeed-Inference; remove it.",
            "weight_quantization": "Quantised weights cannot be trained; remove it.",
            "msamp": "MS-AMP does not run under ZeRO-3; remove it.",
            "allgather_size": f"{_STAGES_1_2} Remove it.",
            "nebula compression_training amp quantize_training sparse_gradients eigenvalue "
            "sparse_attention elasticity graph_harvesting curriculum_learning "
            "progressive_layer_drop": _REMOVED,
        },
    ),
    **no_effect(
        {
            "zero_allow_untested_optimizer": "Addax registers itself with ZeRO.",
            "zero_force_ds_cpu_optimizer bf16.immediate_grad_update": _OTHER_OPTIMIZER,
            "bf16.check_grad_overflow": _STAGES_1_2,
            "fp16.hysteresis fp16.consecutive_hysteresis": "The scale is halved at every overflow.",
            "torch_autocast.dtype torch_autocast.lower_precision_safe_modules": "Autocast is off.",
            "data_types.grad_accum_dtype": "An update sees the gradient in "
            "communication_data_type.",
            "seq_parallel_communication_data_type checkpoint.parallel_write": "It belongs to "
            "another kind of parallelism.",
            "disable_allgather": "DeepSpeed 0.19 reads it and does nothing with it.",
            "activation_checkpointing": "Transformers models use their own: "
            "--activation_checkpointing.",
            "checkpoint checkpoint.tag_validation checkpoint.checkpoint_serialization": _CHECKPOINT,
            "checkpoint.use_node_local_storage": "--save_on_each_node says it.",
            "dataloader_drop_last": "DeepSpeed's own data loader is not used.",
            "aio": _NVME,
        }
    ),
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
