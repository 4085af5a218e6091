"""Every field of `transformers.TrainingArguments` (5.23), and what Addax does with it.

A test compares the table with the fields of the installed class, both ways.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from addax_ds.config.support import Rule, Status, default_only, no_effect, only, works
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)

_OPTIMIZER = "The optimizer is Addax; set it up with --method, --alpha, --zo_eps and --rounding."
_ADAM = "Addax has no moments, so Adam's settings mean nothing to it; remove it."
_COMPILE = "Compiled graphs read weights past the hooks that perturb and update them; remove it."
_KERNELS = "Liger's fused loss is not verified with the two zeroth-order passes; remove it."
_EVALUATION = (
    "Evaluation is Addax's own (loss and candidate accuracy over the global batch); "
    "remove it, and size its batches with --per_device_eval_batch_size."
)
_SAMPLING = (
    "Addax draws its two streams itself, by length (--length_threshold) and seed; remove it."
)
_LOADER = "Addax's own loader prepares the batches and does not take it; remove it."
_DDP = "The model is never wrapped in DistributedDataParallel; remove it."
_FSDP = "It is Accelerate's way to shard, after the optimizer is made; use --sharding fsdp2."
_FULL_EVAL = "It casts the training weights for good; --bf16 stores and evaluates them in bf16."
_ALIAS = "Deprecated alias of activation_checkpointing"
_METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)

RULES: dict[str, Rule] = {
    "output_dir": works(),
    "per_device_train_batch_size": works("K1 / ranks: the first-order batch of one rank."),
    "num_train_epochs": works("An epoch is one pass over D1 (over D0 for mezo)."),
    "max_steps": works(),
    "learning_rate": works(),
    "lr_scheduler_type": only(
        *(kind for kind in SchedulerType if kind not in _METRIC_SCHEDULERS),
        note="reduce_lr_on_plateau and greedy need a metric at every step, which DeepSpeed's "
        "engine does not hand to a scheduler; choose another.",
    ),
    "lr_scheduler_kwargs": works(),
    "warmup_steps": works("Below 1 it is a fraction of all steps."),
    "optim": default_only(_OPTIMIZER),
    "optim_args": default_only(_OPTIMIZER),
    "weight_decay": works("Decoupled, applied in the same pass as the update."),
    "adam_beta1": default_only(_ADAM),
    "adam_beta2": default_only(_ADAM),
    "adam_epsilon": default_only(f"{_ADAM} The perturbation scale is --zo_eps."),
    "optim_target_modules": default_only(_OPTIMIZER),
    "gradient_accumulation_steps": works(
        "Micro-batches of a step, in either stream. Zeroth-order ones cost passes alone; "
        "first-order ones a sum of gradients in fp32, 4 bytes a parameter over all ranks."
    ),
    "average_tokens_across_devices": default_only(
        "Both losses are divided by the global number of target tokens; leave it on."
    ),
    "max_grad_norm": works(
        "Of the first-order gradient, exactly: without accumulation a step runs its first-order "
        "forward and backward twice. 0, launch/train.py's default, does not clip."
    ),
    "label_smoothing_factor": default_only(
        "Both passes use the model's own loss; label smoothing is not part of it. Remove it."
    ),
    "bf16": works("Stores the weights in bf16: no master copy, no autocast."),
    "fp16": works("Stores the weights in fp16, with a dynamic loss scale. Prefer bf16."),
    "bf16_full_eval": default_only(_FULL_EVAL),
    "fp16_full_eval": default_only(_FULL_EVAL),
    "tf32": works(),
    "activation_checkpointing": works(),
    "activation_checkpointing_kwargs": works(),
    "gradient_checkpointing": works(f"{_ALIAS}."),
    "gradient_checkpointing_kwargs": works(f"{_ALIAS}_kwargs."),
    "torch_compile": default_only(_COMPILE),
    "torch_compile_backend": default_only(_COMPILE),
    "torch_compile_mode": default_only(_COMPILE),
    "use_liger_kernel": default_only(_KERNELS),
    "liger_kernel_config": default_only(_KERNELS),
    "use_cache": works(),
    "neftune_noise_alpha": default_only(
        "Noise in the embeddings would differ between the two zeroth-order passes; remove it."
    ),
    "torch_empty_cache_steps": default_only(
        "Emptying the cache inside a step is not supported; "
        "try PYTORCH_ALLOC_CONF=expandable_segments:True against fragmentation."
    ),
    "auto_find_batch_size": default_only(
        "A retry would start from weights that are already updated; set the batch sizes yourself."
    ),
    "logging_strategy": works(),
    "logging_steps": works(),
    "logging_first_step": works(),
    "log_on_each_node": works(),
    "logging_nan_inf_filter": works("Of the logged loss; training stops after 10 bad steps."),
    "include_num_input_tokens_seen": only(
        "no", False, note="A step holds two batches, which Trainer cannot count; remove it."
    ),
    "log_level": works(),
    "log_level_replica": works(),
    "disable_tqdm": works(),
    "report_to": works(),
    "run_name": works(),
    "project": works(),
    "trackio_space_id": works(),
    "trackio_bucket_id": works(),
    "trackio_static_space_id": works(),
    "eval_strategy": works(),
    "eval_steps": works(),
    "eval_delay": works(),
    "per_device_eval_batch_size": works(),
    "prediction_loss_only": default_only(_EVALUATION),
    "eval_on_start": works(),
    "eval_do_concat_batches": default_only(_EVALUATION),
    "eval_use_gather_object": default_only(_EVALUATION),
    "eval_accumulation_steps": default_only(_EVALUATION),
    "include_for_metrics": default_only(_EVALUATION),
    "batch_eval_metrics": default_only(_EVALUATION),
    "save_only_model": works("Weights alone: no run can be resumed from them."),
    "save_strategy": works(),
    "save_steps": works(),
    "save_on_each_node": works("Else the ranks of the first node write the weights."),
    "save_total_limit": works(),
    "enable_jit_checkpoint": default_only(
        "It may save between the backward pass and the end of the update, when part of the "
        "weights has moved; use --save_strategy steps."
    ),
    "push_to_hub": works(),
    "hub_token": works(),
    "hub_private_repo": works(),
    "hub_model_id": works(),
    "hub_strategy": works(),
    "hub_always_push": works(),
    "hub_revision": works(),
    "load_best_model_at_end": works(),
    "metric_for_best_model": works("Default: the task's own metric; for files, the loss."),
    "greater_is_better": works(),
    "ignore_data_skip": default_only(
        "The data order is a function of the step, so resuming at a step skips nothing; remove it."
    ),
    "restore_callback_states_from_checkpoint": works(),
    "full_determinism": works(),
    "seed": works("Of z, of stochastic rounding and, without data_seed, of the data order."),
    "data_seed": works("Seed of the order of the data (default: seed)."),
    "use_cpu": works("Set by itself where torch sees no accelerator."),
    "accelerator_config": only(
        None,
        AcceleratorConfig(),
        note=_LOADER,
    ),
    "parallelism_config": default_only(
        "Only data parallelism under ZeRO-3 is supported; remove it."
    ),
    "dataloader_drop_last": works(),
    "dataloader_num_workers": works(),
    "dataloader_pin_memory": works(),
    "dataloader_persistent_workers": works(),
    "dataloader_prefetch_factor": works(),
    "dataloader_multiprocessing_context": default_only(_LOADER),
    "dataloader_in_order": default_only(_LOADER),
    "remove_unused_columns": no_effect("Records are encoded before Trainer sees them."),
    "label_names": default_only(_EVALUATION),
    "train_sampling_strategy": default_only(_SAMPLING),
    "length_column_name": default_only(_SAMPLING),
    "ddp_find_unused_parameters": default_only(_DDP),
    "ddp_bucket_cap_mb": default_only(_DDP),
    "ddp_broadcast_buffers": default_only(_DDP),
    "ddp_static_graph": default_only(_DDP),
    "ddp_backend": works("The communication backend on CPUs."),
    "ddp_timeout": works(),
    "fsdp": only(None, False, "", note=_FSDP),
    "fsdp_config": default_only(_FSDP),
    "deepspeed": works("A path, or a mapping in an argument file. ZeRO stage 3 only."),
    "debug": works(),
    "skip_memory_metrics": works(),
    "do_train": no_effect("launch/train.py always trains."),
    "do_eval": works("Follows eval_strategy."),
    "do_predict": no_effect("launch/train.py evaluates the test rows at the end if there are any."),
    "resume_from_checkpoint": works(
        "A path, or True for the newest intact one in output_dir. The number of ranks and the way "
        "to shard may have changed, the global batches may not."
    ),
    "local_rank": works("Given by launchers."),
}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


# What Transformers uses for a field that nobody gives.
DEFAULTS: dict[str, Any] = {
    field.name: _default(field) for field in dataclasses.fields(TrainingArguments) if field.init
}


def check_values(values: Mapping[str, Any]) -> None:
    """Check the values of `TrainingArguments` fields, before or after the object exists.

    Args:
        values: field names and values; a field that is missing counts as acceptable.

    Raises:
        UserError: lists every value that Addax refuses, with the reason and the remedy.
    """
    problems = [
        f"--{name} {values[name]}: {rule.note}"
        for name, rule in RULES.items()
        if name in values and not rule.accepts(values[name], DEFAULTS.get(name))
    ]
    raise_problems("These training arguments cannot be used with Addax:", problems)


def check_training_arguments(args: TrainingArguments) -> None:
    """Check every field of `args`; see `check_values`. Warns of fields without effect.

    Raises:
        UserError: lists every value that Addax refuses, with the reason and the remedy.
    """
    values = {name: getattr(args, name) for name in DEFAULTS}
    check_values(values)
    for name, rule in RULES.items():
        if rule.status is Status.NO_EFFECT and values[name] != DEFAULTS[name]:
            logger.warning("--%s has no effect: %s", name, rule.note)
