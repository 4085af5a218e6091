"""A sequence classifier in plain Trainer with an Addax step; its loss is a mean over a batch.

``FOLDER/model`` holds it.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from addax_ds import AddaxConfig, AddaxMixin
from addax_ds.sharding.fsdp2 import shard_model
from tests.support.classifier import classifier, padding
from tests.workers.trainer_cases import gathered

BATCH, STEPS = 4, 3
# Rows of a batch have one length: padding changes the rounding of products.
LENGTHS = (5,) * 8 + (9,) * 8


class ClassifierTrainer(AddaxMixin, Trainer):
    pass


def write_model(folder: Path) -> None:
    classifier().save_pretrained(folder / "model")


def load(folder: Path) -> nn.Module:
    return LlamaForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float32)


def data() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 100, (n,), generator=draw).tolist(), "label": i % 3}
        for i, n in enumerate(LENGTHS)
    ]


def run(folder: Path, sharding: str, world_size: int, micro_batches: int = 1) -> dict[str, Any]:
    """Train with a global batch of `BATCH`; return the losses by step, and the weights."""
    AcceleratorState._reset_state()
    zero3 = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "Addax"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    args = AddaxConfig(
        output_dir=str(folder / f"{sharding}-{world_size}-{micro_batches}"),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world_size // micro_batches,
        gradient_accumulation_steps=micro_batches,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        alpha=0.1,
        length_threshold=7,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=zero3 if sharding == "zero3" else None,
    )
    model = load(folder)
    if sharding == "fsdp2":
        shard_model(model)
    trainer = ClassifierTrainer(
        model=model, args=args, train_dataset=data(), data_collator=padding()
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "g0" in entry]
    found = {
        "losses": [(entry["zo_loss"], entry["fo_loss"]) for entry in logs],
        "weights": gathered(trainer.model),
    }
    if sharding == "zero3":
        trainer.model_wrapped.destroy()
    return found


def run_plain_afterwards(folder: Path) -> tuple[bool, dict[str, Any]]:
    """Train by Addax, then the same model by a plain Trainer; return whether that had DDP."""
    model = load(folder)
    common = {
        "use_cpu": True,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    rows = {"train_dataset": data(), "data_collator": padding()}
    first = AddaxConfig(output_dir=str(folder / "first"), **common)
    ClassifierTrainer(model=model, args=first, **rows).train()
    plain = Trainer(
        model=model, args=TrainingArguments(output_dir=str(folder / "plain"), **common), **rows
    )
    plain.train()
    return isinstance(plain.model_wrapped, DistributedDataParallel), gathered(model)


def set_up() -> None:
    deepspeed.init_distributed("gloo")
