"""Settles training arguments and Addax's against the DeepSpeed JSON."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainingArguments

from addax_ds.config.deepspeed import check_ds_config, load_ds_config, warn_without_effect
from addax_ds.config.settings import AddaxArguments, AddaxSettings, resolve
from addax_ds.config.training_arguments import check_training_arguments
from addax_ds.optim.methods import BASELINES
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import raise_problems


def configure(training_args: TrainingArguments, addax_args: AddaxArguments) -> AddaxSettings:
    """Check the training arguments and settle Addax's against the DeepSpeed JSON, in place.

    The JSON that `training_args` holds gets an `optimizer` block with numbers for every setting, so
    that `deepspeed.initialize` builds Addax from it; a second call changes nothing. For a baseline
    the block becomes that of its optimizer, and there is no second call.

    Raises:
        UserError: a training argument or a key of the JSON that Addax refuses, several GPUs in
            one process, or a contradiction between arguments and JSON.
    """
    check_training_arguments(training_args)
    deepspeed = getattr(training_args, "hf_deepspeed_config", None)
    if deepspeed is None:
        if addax_args.method in BASELINES:
            raise UserError(
                f"--method {addax_args.method} is DeepSpeed's: give --deepspeed "
                "ds_configs/zero3.json."
            )
        if training_args.n_gpu > 1:
            raise UserError(
                f"One process sees {training_args.n_gpu} GPUs: start one a GPU (torchrun "
                "--nproc_per_node), or let it see one (CUDA_VISIBLE_DEVICES=0)."
            )
        # --bf16 and --fp16 are types of the weights; Accelerate would add autocast and a scaler.
        training_args.mixed_precision = "no"
        return resolve(addax_args, training_args, {})
    original, where = load_ds_config(training_args.deepspeed or {})
    warn_without_effect(original, where)
    config = deepspeed.config
    check_ds_config(config, where)
    # Trainer would report these after the model is loaded.
    raise_problems(
        f'{where} contradicts the training arguments; "auto" in the JSON takes the argument:',
        [mismatch.removeprefix("- ") for mismatch in deepspeed.mismatches],
    )
    params = config.get("optimizer", {}).get("params", {})
    _check_dtypes(config, training_args, where)
    settings = resolve(addax_args, training_args, params, where)
    # Of an Addax engine a backward is a step; sums over micro-batches are Addax's.
    baseline = settings.method in BASELINES
    in_engine = settings.gradient_accumulation_steps if baseline else 1
    config["gradient_accumulation_steps"] = in_engine
    config["gradient_clipping"] = settings.max_grad_norm  # Accelerate would write 1 into a gap
    if "train_batch_size" in config:
        config["train_batch_size"] = (
            training_args.world_size * training_args.per_device_train_batch_size * in_engine
        )
    # Numbers, not "auto": Trainer has filled its "auto" values by now, and Accelerate would put
    # its own default learning rate into one that is left.
    if baseline:
        config["optimizer"] = _baseline_optimizer(settings.method, training_args)
        config["zero_allow_untested_optimizer"] = True
    else:
        optimizer = config.setdefault("optimizer", {"type": "Addax"})
        optimizer.setdefault("params", {}).update(
            lr=training_args.learning_rate,
            weight_decay=training_args.weight_decay,
            alpha=settings.alpha,
            zo_eps=settings.zo_eps,
            seed=settings.seed,
            rounding=settings.rounding,
        )
    if "train_batch_size" not in config:
        config.setdefault(
            "train_micro_batch_size_per_gpu", training_args.per_device_train_batch_size
        )
    return settings


def divide_batches(args: TrainingArguments, settings: AddaxSettings, parts: int) -> AddaxSettings:
    """Take ``parts`` times as many micro-batches of as many times fewer rows; K0 and K1 stay.

    Args:
        args: changed in place, with the DeepSpeed JSON that they hold; `configure` has seen them.
        settings: that `configure` returned.
        parts: divides both batch sizes of a device.
    """
    args.per_device_train_batch_size //= parts
    args.gradient_accumulation_steps *= parts
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
        if deepspeed is not None and key in deepspeed.config:
            deepspeed.config[key] //= parts
    return replace(
        settings,
        per_device_zo_batch_size=settings.per_device_zo_batch_size // parts,
        gradient_accumulation_steps=settings.gradient_accumulation_steps * parts,
    )


def _baseline_optimizer(method: str, args: TrainingArguments) -> dict[str, Any]:
    """Return the block from which DeepSpeed builds torch's optimizer."""
    params = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if method == "sgd":
        return {"type": "SGD", "params": params}
    # DeepSpeed's own would have to be compiled, and computes the same.
    return {"type": "AdamW", "params": {**params, "torch_adam": True}}


def _check_dtypes(config: Mapping[str, Any], args: TrainingArguments, where: str) -> None:
    """Raise `UserError` if DeepSpeed would train weights of another type, or cannot train them."""
    for name in ("bf16", "fp16"):
        block = config.get(name, {})
        if getattr(args, name) != block.get("enabled", False):
            raise UserError(
                f"--{name} is {getattr(args, name)}, but {where} has {name}.enabled "
                f'{block.get("enabled", "not at all")}: write "{name}": {{"enabled": "auto"}} there'
            )
    from deepspeed.accelerator import get_accelerator  # users of other back ends have none

    if args.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError(
            "DeepSpeed does not train fp16 weights on this device: use --bf16, or --sharding fsdp2 "
            "without --deepspeed"
        )
