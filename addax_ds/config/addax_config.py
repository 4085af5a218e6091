"""`AddaxConfig`: every argument of a training, checked and settled when it is made."""

import os
from collections.abc import Collection, Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments

from addax_ds.config import trials
from addax_ds.config.deepspeed import check_ds_config, load_ds_config, warn_of_unused_keys
from addax_ds.config.settings import AddaxSettings, check_can_resume, settle
from addax_ds.config.training_arguments import check_training_arguments
from addax_ds.config.values import OBJECTS, value_problems
from addax_ds.distributed.startup import init_deepspeed, raise_on_all_ranks_at_start
from addax_ds.optim.hyperparameters import IN_JSON_PARAMS, HyperparameterFlags
from addax_ds.optim.methods import BASELINES, FIRST_ORDER, Method
from addax_ds.utils.command_line import flag
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import parse_json
from addax_ds.utils.messages import raise_problems

# Where Transformers' own defaults would be refused or would not run.
GENERAL_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "learning_rate": None,
    "max_grad_norm": 0.0,
    "use_cpu": not torch.accelerator.is_available(),
}


def _default(name: str) -> Any:
    """Declare a field of `TrainingArguments` with another default."""
    inherited = TrainingArguments.__dataclass_fields__[name]
    return field(default=GENERAL_DEFAULTS[name], metadata=inherited.metadata)


@dataclass
class AddaxConfig(HyperparameterFlags, TrainingArguments):
    """Arguments of `AddaxTrainer`: those of `transformers.TrainingArguments`, and Addax's own.

    ``launch/train.py`` takes the same, as flags. docs/arguments.md lists them, with their defaults
    and with what Addax does with each field of Trainer. Defaults that differ from Trainer's:
    ``output_dir`` is "output", ``max_grad_norm`` 0, and ``use_cpu`` true where torch sees no
    accelerator. ``learning_rate`` has none, but for "sgd" and "adamw".

    All of it is checked when it is made, and settled once against the DeepSpeed JSON: a
    hyperparameter or number of micro-batches that stands there alone wins over a default, and a
    value that stands in both places has to be the same. What comes of it is ``settings``; a field
    that is changed afterwards does not change them. As `TrainingArguments` does, it makes the
    process group, and DeepSpeed's where it is used, if a launcher has started this process.

    Attributes:
        settings: how the run trains.
        given_names: of the fields that a user has given.

    Args:
        alpha: weight α of the zeroth-order gradient, above 0 and below 1.
        zo_eps: perturbation scale ε.
        rounding: "stochastic" or "nearest", of bf16 and fp16 weight updates.
        zo_directions: independent directions z of a step, from 1 to 1024.
        method: "addax", "addax-wa", "mezo", "ip-sgd"; "sgd" and "adamw" for `BaselineTrainer`.
        length_threshold: L_T in tokens, or "median"; "auto" is for ``launch/train.py``.
        device_memory: GB of a rank, for "auto".
        per_device_zo_batch_size: rows of a zeroth-order micro-batch.
        desync_check_steps: steps between two comparisons of the ranks; 0 for none.
        find_learning_rate: there is to be no training, but `AddaxMixin.find_learning_rate`.
        given: for parsers: names of the fields that a user has given (default: those that differ
            from their defaults). What is not given yields to the DeepSpeed JSON.

    Raises:
        UserError: for every value, flag without effect and contradiction that can be refused
            before a model exists, before a process group exists wherever it can be known by then.
    """

    method: Method = flag(
        "addax",
        "addax: long sequences zeroth-order, short ones first-order. addax-wa: both "
        "from all data. mezo: zeroth-order only. ip-sgd: first-order only, in place. sgd, "
        "adamw: for comparison, torch's under ZeRO-3, with fp32 master weights.",
    )
    length_threshold: int | str | None = flag(
        None,
        "L_T in tokens, median, or auto: longer sequences are zeroth-order (default "
        "median). auto is the largest that fits into memory, and needs --max_steps. With ip-sgd "
        "longer sequences are left out (default: none).",
    )
    device_memory: float | None = flag(
        None,
        "GB (1e9 bytes) of a rank that tensors may take, for --length_threshold auto "
        "(default: what is free, less 4 on a GPU and 2 on a CPU).",
    )
    per_device_zo_batch_size: int | None = flag(
        None, "Rows of a zeroth-order micro-batch (default: --per_device_train_batch_size)."
    )
    desync_check_steps: int = flag(
        100,
        "Steps between two comparisons of the ranks' weights and step values, which "
        "read the weights twice; 0 for none.",
    )
    find_learning_rate: bool = flag(
        False,
        "Train a few steps at each of ten learning rates, from the same weights, say which lowers "
        "the loss most, and end. Nothing is written (docs/choosing.md).",
    )
    output_dir: str | None = _default("output_dir")
    learning_rate: float = _default("learning_rate")
    max_grad_norm: float = _default("max_grad_norm")
    use_cpu: bool = _default("use_cpu")
    given: InitVar[Collection[str] | None] = None

    def __post_init__(self, given: Collection[str] | None) -> None:
        # Trainer's own part makes the process group, where a rank would wait for one with a
        # mistake, so all ranks first say whether they have met one.
        with raise_on_all_ranks_at_start():
            source, config, where = self._check_before_start(given)
        self.deepspeed = config  # so that nobody reads the file again
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as Trainer's own for load_best_model_at_end
        try:
            super().__post_init__()
        except UserError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"TrainingArguments: {error}") from error
        self.deepspeed = source
        if source and dist.is_initialized():
            # On CPUs Accelerate has set up torch's process group only; from_pretrained asks
            # DeepSpeed's for the number of ranks.
            init_deepspeed()
        deepspeed = getattr(self, "hf_deepspeed_config", None)
        if deepspeed is None:
            self._check_devices()
            # --bf16 and --fp16 are types of the weights; Accelerate would add autocast and a
            # scaler.
            self.mixed_precision = "no"
        else:
            self._check_filled(deepspeed, where)
            _write_json(deepspeed.config, self)

    def _check_before_start(
        self, given: Collection[str] | None
    ) -> tuple[Any, dict[str, Any] | None, str]:
        """Check and settle what is known without a process group.

        Returns:
            The field ``deepspeed`` as it was given, the JSON's content, and its name in messages.
        """
        if given is None:
            given = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        self.given_names: frozenset[str] = frozenset(given)
        source, config, where = self.deepspeed, None, "the DeepSpeed config"
        if not source:
            _check_accelerate()
        else:
            config, where = load_ds_config(source)
            check_ds_config(config, where)
            warn_of_unused_keys(config, where)
        raise_problems("These arguments cannot be used:", list(value_problems(vars(self))))
        for name in OBJECTS:  # Transformers would make numbers of texts in them
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, parse_json(value))
        check_training_arguments(self)
        if self.resume_from_checkpoint not in (None, False):
            check_can_resume(self.method)
        self.settings: AddaxSettings = settle(self, config or {}, where, given)
        in_json = "scheduler" in (config or {})
        raise_problems("These arguments cannot be used:", list(trials.problems(self, in_json)))
        trials.warn_of_unused_arguments(self, in_json, given)
        return source, config, where

    def _check_devices(self) -> None:
        if self.n_gpu > 1:
            raise UserError(
                f"One process sees {self.n_gpu} GPUs: start one a GPU (torchrun "
                "--nproc_per_node), or let it see one (CUDA_VISIBLE_DEVICES=0)."
            )

    def _check_filled(self, deepspeed: Any, where: str) -> None:
        """Check the JSON after Trainer has filled its "auto" values."""
        # Trainer would report these after the model is loaded.
        raise_problems(
            f'{where} contradicts the training arguments; "auto" in the JSON takes the argument:',
            [mismatch.removeprefix("- ") for mismatch in deepspeed.mismatches],
        )
        for name in ("bf16", "fp16"):
            block: Mapping[str, Any] = deepspeed.config.get(name, {})
            if getattr(self, name) != block.get("enabled", False):
                raise UserError(
                    f"--{name} is {getattr(self, name)}, but {where} has {name}.enabled "
                    f'{block.get("enabled", "not at all")}: write "{name}": {{"enabled": "auto"}} '
                    "there"
                )
        from deepspeed.accelerator import get_accelerator  # users of other back ends have none

        if self.fp16 and not get_accelerator().is_fp16_supported():
            raise UserError(
                "DeepSpeed does not train fp16 weights on this device: use --bf16, or --sharding "
                "fsdp2 without --deepspeed"
            )


def _check_accelerate() -> None:
    """Raise `UserError` if Accelerate has been told to shard the model."""
    for variable, cause, instead in (
        ("ACCELERATE_USE_FSDP", "", "--sharding fsdp2"),
        (
            "ACCELERATE_USE_DEEPSPEED",  # which an Accelerator sets, too, for good
            "or this process has trained under DeepSpeed before, ",
            "--deepspeed zero3",
        ),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"the configuration of `accelerate launch` sets {variable}, {cause}and Accelerate "
                "would shard the model in its own way: use launch/accelerate.yaml of the "
                f"repository, which starts ranks and nothing else, with {instead}"
            )


def global_batches(args: AddaxConfig) -> tuple[int, int]:
    """Return K0 and K1, the rows of a step over all ranks; 0 for a part that the method lacks."""
    settings = args.settings
    shares = args.world_size * settings.gradient_accumulation_steps
    first_order = args.per_device_train_batch_size if settings.method in FIRST_ORDER else 0
    return settings.per_device_zo_batch_size * shares, first_order * shares


def order_seed(args: TrainingArguments) -> int:
    """Return the seed of the order of the data."""
    return args.seed if args.data_seed is None else args.data_seed


def divide_batches(args: AddaxConfig, parts: int) -> None:
    """Take ``parts`` times as many micro-batches of as many times fewer rows; K0 and K1 stay.

    Args:
        args: changed in place, with their settings and the DeepSpeed JSON that they hold.
        parts: divides both batch sizes of a device.
    """
    args.per_device_train_batch_size //= parts
    args.gradient_accumulation_steps *= parts
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size"):
        if deepspeed is not None and key in deepspeed.config:
            deepspeed.config[key] //= parts
    args.settings = replace(
        args.settings,
        per_device_zo_batch_size=args.settings.per_device_zo_batch_size // parts,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def _write_json(config: dict[str, Any], args: AddaxConfig) -> None:
    """Write numbers for every setting, so that `deepspeed.initialize` builds the optimizer.

    Numbers, not "auto": Trainer has filled its "auto" values by now, and Accelerate would put its
    own default learning rate into one that is left.
    """
    method, values = args.settings.method, args.settings.hyperparameters
    # Of an Addax engine a backward is a step; sums over micro-batches are Addax's.
    in_engine = args.gradient_accumulation_steps if method in BASELINES else 1
    config["gradient_accumulation_steps"] = in_engine
    config["gradient_clipping"] = values.max_grad_norm  # Accelerate would write 1 into a gap
    rows = args.per_device_train_batch_size
    if "train_batch_size" in config:
        config["train_batch_size"] = args.world_size * rows * in_engine
    else:
        config.setdefault("train_micro_batch_size_per_gpu", rows)
    if method in BASELINES:
        # DeepSpeed's own AdamW would have to be compiled, and computes the same.
        kind, more = ("SGD", {}) if method == "sgd" else ("AdamW", {"torch_adam": True})
        params = {"lr": values.lr, "weight_decay": values.weight_decay, **more}
        config["optimizer"] = {"type": kind, "params": params}
        config["zero_allow_untested_optimizer"] = True
    else:
        optimizer = config.setdefault("optimizer", {"type": "Addax"})
        own = {known.name: getattr(values, known.name) for known in IN_JSON_PARAMS}
        optimizer.setdefault("params", {}).update(own)
