"""The fields of `transformers.TrainingArguments` (5.23) that Addax refuses or that have no effect.

All others work as Transformers documents. A test compares both kinds with the installed class, so
that a field of a new version is examined before it passes.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from addax_ds.config.support import Rule, Status, no_effect, only
from addax_ds.utils.messages import raise_problems

logger = logging.getLogger(__name__)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


# What Transformers uses for a field that nobody gives.
DEFAULTS: dict[str, Any] = {
    field.name: _default(field) for field in dataclasses.fields(TrainingArguments) if field.init
}


_NO_MOMENTS = "Addax has no moments, so Adam's settings mean nothing to it; remove it."
_LOADER = "Addax's own loader prepares the batches and does not take it; remove it."
_FSDP = "It is Accelerate's way to shard, after the optimizer is made; use --sharding fsdp2."
_METRIC_SCHEDULERS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)

# Only Transformers' default is accepted: names, separated by spaces, and why.
_DEFAULT_ONLY = {
    "optim optim_args optim_target_modules": "The optimizer is Addax; set it up with --method, "
    "--alpha, --zo_eps and --rounding.",
    "adam_beta1 adam_beta2": _NO_MOMENTS,
    "adam_epsilon": f"{_NO_MOMENTS} The perturbation scale is --zo_eps.",
    "average_tokens_across_devices": "Both losses are divided by the global number of target "
    "tokens; leave it on.",
    "label_smoothing_factor": "The loss is the likelihood of the target tokens, computed from the "
    "logits at their positions; Trainer's label smoother is never called. Remove it.",
    "bf16_full_eval fp16_full_eval": "It casts the training weights for good; --bf16 stores and "
    "evaluates them in bf16.",
    "torch_compile torch_compile_backend torch_compile_mode": "Compiled graphs read weights past "
    "the hooks that perturb and update them; remove it.",
    "use_liger_kernel liger_kernel_config": "Liger's fused loss is not verified with the two "
    "zeroth-order passes; remove it.",
    "neftune_noise_alpha": "Noise in the embeddings would differ between the two zeroth-order "
    "passes; remove it.",
    "torch_empty_cache_steps": "Emptying the cache inside a step is not supported; "
    "try PYTORCH_ALLOC_CONF=expandable_segments:True against fragmentation.",
    "auto_find_batch_size": "A retry would start from weights that are already updated; set the "
    "batch sizes yourself.",
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
    "include_for_metrics batch_eval_metrics label_names": "Evaluation is Addax's own (loss and "
    "candidate accuracy over the global batch); remove it, and size its batches with "
    "--per_device_eval_batch_size.",
    "enable_jit_checkpoint": "It may save between the backward pass and the end of the update, "
    "when part of the weights has moved; use --save_strategy steps.",
    "ignore_data_skip": "The data order is a function of the step, so resuming at a step skips "
    "nothing; remove it.",
    "dataloader_multiprocessing_context dataloader_in_order": _LOADER,
    "parallelism_config": "Only data parallelism is supported; remove it.",
    "train_sampling_strategy length_column_name": "Addax draws its two streams itself, by length "
    "(--length_threshold) and seed; remove it.",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph": "The "
    "model is never wrapped in DistributedDataParallel; remove it.",
    "fsdp_config": _FSDP,
}

RULES: dict[str, Rule] = {
    **{
        name: Rule(Status.RESTRICTED, note, (DEFAULTS.get(name),))
        for names, note in _DEFAULT_ONLY.items()
        for name in names.split()
    },
    **only(
        tuple(kind for kind in SchedulerType if kind not in _METRIC_SCHEDULERS),
        {
            "lr_scheduler_type": "reduce_lr_on_plateau and greedy need a metric at every step, "
            "which DeepSpeed's engine does not hand to a scheduler; choose another."
        },
    ),
    **only(
        ("no", False),
        {
            "include_num_input_tokens_seen": "A step holds two batches, which Trainer cannot "
            "count; remove it."
        },
    ),
    # TrainingArguments makes an AcceleratorConfig of None.
    **only((None, AcceleratorConfig()), {"accelerator_config": _LOADER}),
    **only((None, False, ""), {"fsdp": _FSDP}),
    **no_effect(
        {
            "do_train": "The command always trains.",
            "do_predict": "Test rows are evaluated at the end whenever there are any.",
        }
    ),
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
        if name in values and not rule.accepts(values[name])
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
