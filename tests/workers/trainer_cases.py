"""Trains cases with `AddaxTrainer`, on ranks or in one process; returns what came of each.

``FOLDER/models/NAME`` holds each case's model.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM

from addax_ds import UserError
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.data.examples import Example
from addax_ds.evaluation import output_head
from addax_ds.evaluation.scored_set import EvaluationSet
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.training import learning_rate
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.dtypes import weights_dtype
from tests.support.tiny import (
    MARKER,
    VOCABULARY,
    choice_set,
    examples,
    repeatable,
    rows,
    tiny_tokenizer,
    write_model,
)

GLOBAL_BATCH = {"zo": 2, "train": 4}
THRESHOLD = 12
SEED = 3


@dataclass(frozen=True)
class Case:
    """``long`` and ``short`` rows; the short ones fill no whole number of batches of 4.

    ``shares``: ranks times micro-batches, where it is more than the number of ranks.
    """

    family: str = "opt"
    model: dict[str, Any] = field(default_factory=dict)
    addax: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    long: int = 7
    short: int = 9
    lora: bool = False
    marked: tuple[int, ...] = ()
    resume: bool = False
    shares: int = 1

    def examples(self) -> list[Example]:
        texts = rows(self.long, self.short)
        for index in self.marked:
            texts[index]["prompt"] += f" w{MARKER - 3}"
        return examples(texts)


CASES = {
    "addax": Case(
        addax={"length_threshold": THRESHOLD, "alpha": 0.01},
        training={
            "num_train_epochs": 2,
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "report_to": ["tensorboard"],
            "save_steps": 4,
        },
    ),
    "addax-wa": Case(
        family="llama",
        model={"tie_word_embeddings": True},
        addax={"method": "addax-wa", "alpha": 0.1},
        training={"max_steps": 4, "gradient_checkpointing": True},
        zero={"stage3_param_persistence_threshold": 0},
    ),
    "mezo": Case(
        model={"tie_word_embeddings": False},
        addax={"method": "mezo"},
        training={"max_steps": 6, "learning_rate": 1e-3, "save_steps": 4},
        resume=True,
    ),
    "ip-sgd": Case(family="gemma3", addax={"method": "ip-sgd"}, training={"num_train_epochs": 1}),
    "dropout": Case(model={"dropout": 0.3}, addax={"alpha": 0.1}, training={"max_steps": 1}),
    "lora": Case(
        family="llama",
        addax={"length_threshold": THRESHOLD, "alpha": 0.1},
        training={"max_steps": 6, "learning_rate": 0.1, "save_steps": 4},
        lora=True,
        resume=True,
    ),
    # Row 2 is a long one and row 10 a short one: their losses are NaN.
    "not-a-number": Case(
        addax={"length_threshold": THRESHOLD, "alpha": 0.01},
        training={"num_train_epochs": 1.34},
        marked=(2, 10),
    ),
    "resume": Case(
        family="llama",
        addax={"length_threshold": THRESHOLD, "alpha": 0.01},
        training={
            "bf16": True,
            "max_steps": 7,
            "save_steps": 2,
            "save_total_limit": 3,
            "warmup_steps": 1,
        },
        resume=True,
    ),
    "accumulated": Case(
        addax={"length_threshold": THRESHOLD, "alpha": 0.01},
        training={"max_steps": 4, "max_grad_norm": 0.5},
        shares=2,
    ),
    "everything": Case(
        model={"dropout": 0.2},
        addax={"length_threshold": THRESHOLD, "alpha": 0.01},
        training={
            "fp16": True,
            "max_steps": 6,
            "save_steps": 4,
            "logging_steps": 3,
            "max_grad_norm": 0.5,
        },
        shares=2,
        resume=True,
    ),
}


MOVED = "addax"
"""The case that goes on from the checkpoint of another topology."""

ATTACHED = ("addax", "mezo", "lora", "resume", "accumulated", "everything")
"""The cases that several ranks run without DeepSpeed; the rest is about batches and logs."""


CHUNKED = ("addax", "addax-wa", "lora")
"""The cases whose output projection computes losses, of two tokens at a time."""


def write_models(folder: Path) -> None:
    for name, case in CASES.items():
        write_model(folder / "models" / name, case.family, **case.model)


OTHER_RUNS = ("moved", "best", "evaluation", "sweep")


def set_up() -> None:
    deepspeed.init_distributed()


def run_case(
    name: str, folder: Path, sharding: str, world_size: int, previous: str | None
) -> dict[str, Any]:
    """Run a case or one of `OTHER_RUNS`; in the result everything is plain Python or a tensor.

    Args:
        previous: a topology that has trained `MOVED` before and left a checkpoint to go on from.
    """
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed asks for fast fp16 alone
    if name in CHUNKED:
        with patch.object(output_head, "CHUNK_ELEMENTS", 2 * VOCABULARY):
            return run(name, folder, sharding, world_size)
    if name == "moved":
        output = folder / f"{sharding}-{world_size}" / "moved"
        args = arguments(CASES[MOVED], output, sharding, world_size)
        checkpoint = str(folder / f"{previous}" / MOVED / "checkpoint-4")
        return train(MOVED, folder, sharding, args, checkpoint)
    if name == "best":
        return best(folder, sharding, world_size)
    if name == "evaluation":
        return evaluate(folder, sharding, world_size)
    if name == "sweep":
        return sweep(folder, sharding, world_size)
    return run(name, folder, sharding, world_size)


def run(name: str, folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    case, output = CASES[name], folder / f"{sharding}-{world_size}" / name
    found = train(name, folder, sharding, arguments(case, output, sharding, world_size))
    if case.resume:
        again = arguments(case, output / "again", sharding, world_size)
        checkpoint = str(output / "checkpoint-4")
        found["resumed"] = train(name, folder, sharding, again, checkpoint)
        other = arguments(case, output / "other", sharding, world_size, seed=SEED + 1)
        try:
            train(name, folder, sharding, other, checkpoint)
        except UserError as error:
            found["other seed"] = str(error)
    AcceleratorState._reset_state()
    return found


def best(folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    """Go back to the best model, here the worst one, which is not the last."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    metric = {"metric_for_best_model": "loss", "greater_is_better": True}
    case = Case(training={"max_steps": 4, "save_steps": 2, **evaluation, **metric})
    output = folder / f"{sharding}-{world_size}" / "best"
    args = arguments(case, output, sharding, world_size)
    trainer = make_trainer("addax", folder, sharding, args, choice_set())
    trainer.train()
    found: dict[str, Any] = {"weights": gathered(trainer.model)}
    if sharding == "zero3":
        try:
            trainer.model_wrapped.save_checkpoint(str(output / "deepspeed"))
        except UserError as error:
            found["save_checkpoint"] = str(error)
        trainer.model_wrapped.destroy()
    return found


def sweep(folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    """Try learning rates twice on one trainer, without dropout and with it."""
    found: dict[str, Any] = {}
    for name in ("addax", "dropout"):
        output = folder / f"{sharding}-{world_size}" / "sweep"
        options = {"learning_rate": None, "find_learning_rate": True}
        case = Case(addax=CASES[name].addax)
        args = arguments(case, output, sharding, world_size, **options)
        trainer = make_trainer(name, folder, sharding, args)
        before = gathered(trainer.model)
        # A few rates serve to be compared. Under ZeRO-3 a trainer trains once.
        with patch.object(learning_rate, "rates", lambda method: (1e-3, 1e-2, 0.1)):
            times = 1 if sharding == "zero3" else 2
            found[name] = [trainer.find_learning_rate() for _ in range(times)]
        after = gathered(trainer.model)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert {path.name for path in output.iterdir()} <= {"csv"}  # the engine's own monitor
        if sharding == "zero3":
            trainer.model_wrapped.destroy()
    return found


def evaluate(folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    """Evaluate 13 candidates of 5 rows, by 4 a rank, without training."""
    output = folder / "evaluation"
    case = Case(addax=CASES["addax"].addax)
    args = arguments(case, output, sharding, world_size, per_device_eval_batch_size=4)
    trainer = make_trainer("addax", folder, sharding, args, choice_set())
    found: dict[str, Any] = {"metrics": trainer.evaluate()}
    try:
        trainer.train()
    except UserError as error:
        found["train"] = str(error)
    AcceleratorState._reset_state()
    return found


def arguments(
    case: Case, output: Path, sharding: str, world_size: int, **options: Any
) -> AddaxConfig:
    # Accelerate keeps the DeepSpeed settings of the first run in this process otherwise.
    AcceleratorState._reset_state()
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "initial_scale_power": 8, "loss_scale_window": 3},
        "optimizer": {"type": "Addax", "params": {"lr": "auto", "alpha": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5000,
            "stage3_prefetch_bucket_size": 4000,
            **case.zero,
        },
        "csv_monitor": {"enabled": True, "output_path": str(output), "job_name": "csv"},
    }
    defaults = {
        "output_dir": str(output),
        "use_cpu": True,
        "learning_rate": 0.05,
        "per_device_train_batch_size": GLOBAL_BATCH["train"] // max(world_size, case.shares),
        "gradient_accumulation_steps": max(case.shares // world_size, 1),
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "steps" if "save_steps" in case.training else "no",
        "seed": SEED,
        "disable_tqdm": True,
        "deepspeed": config if sharding == "zero3" else None,
    }
    if case.addax.get("method", "addax") in ("addax", "addax-wa"):
        shares = max(world_size, case.shares)
        defaults["per_device_zo_batch_size"] = GLOBAL_BATCH["zo"] // shares
    return AddaxConfig(**{**defaults, **case.addax, **case.training, **options})


def train(
    name: str, folder: Path, sharding: str, args: AddaxConfig, checkpoint: str | None = None
) -> dict[str, Any]:
    trainer = make_trainer(name, folder, sharding, args)
    passes = record_passes(trainer.model)
    if CASES[name].marked:
        trainer.model.register_forward_hook(spoil_marked, with_kwargs=True)
    with warnings() as lines:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(Path(args.output_dir) / "model"))
    found = {
        "log": [entry for entry in repeatable(trainer.state.log_history) if "loss" in entry],
        "result": result.metrics,
        "passes": passes,
        "weights": gathered(trainer.model),
        "warnings": lines,
        "training": all(module.training for module in trainer.model.modules()),
    }
    if args.deepspeed:
        trainer.model_wrapped.destroy()
    return found


def make_trainer(
    name: str,
    folder: Path,
    sharding: str,
    args: AddaxConfig,
    eval_dataset: EvaluationSet | None = None,
) -> AddaxTrainer:
    case, dtype = CASES[name], weights_dtype(args)
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / name, dtype=dtype)
    if case.lora:
        model = with_adapters(model)
    if sharding == "fsdp2":
        shard_model(model)
    return AddaxTrainer(
        model,
        args,
        train_dataset=case.examples(),
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
    )


def with_adapters(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0
    )
    # A random B: with the usual zeros the adapters' A would get no gradient in the first step.
    config.init_lora_weights = False
    return get_peft_model(model, config)


def record_passes(model: nn.Module) -> list[dict[str, Any]]:
    """Note what each forward pass is given, padding removed, and in which mode it runs."""
    passes: list[dict[str, Any]] = []

    def note(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        # No row ends with the padding's token, but that of a dummy has no other.
        ends = [max([0, *ids.nonzero()[:, 0].tolist()]) + 1 for ids in inputs["input_ids"]]
        rows = [ids[:end].tolist() for ids, end in zip(inputs["input_ids"], ends, strict=True)]
        passes.append({"rows": rows, "grad": torch.is_grad_enabled(), "train": module.training})

    model.register_forward_pre_hook(note, with_kwargs=True)
    return passes


def spoil_marked(module: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> Any:
    if (inputs["input_ids"] == MARKER).any():
        output.logits = output.logits * torch.nan
        if output.loss is not None:
            output.loss = output.loss * torch.nan
    return output


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect the package's warnings."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: lines.append(entry.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("addax_ds")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def gathered(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {
            name: getattr(p, "full_tensor", p.detach)().detach().clone()
            for name, p in parameters.items()
        }
