"""TRL's trainers with an Addax step, and the same steps in a plain loop with losses of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import trl
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from addax_ds import Addax, AddaxConfig, AddaxMixin, attach
from addax_ds.data.batches import StepSchedule
from addax_ds.data.partition import partition
from addax_ds.sharding.fsdp2 import shard_model
from tests.support.tiny import rows, tiny_tokenizer
from tests.workers.trainer_cases import gathered

STEPS, SEED, BETA = 10, 3, 0.1
BATCH = 2  # over all ranks


@dataclass
class SFTConfig(AddaxConfig, trl.SFTConfig):
    pass


@dataclass
class DPOConfig(AddaxConfig, trl.DPOConfig):
    pass


@dataclass
class RewardConfig(AddaxConfig, trl.RewardConfig):
    pass


class SFTTrainer(AddaxMixin, trl.SFTTrainer):
    pass


class DPOTrainer(AddaxMixin, trl.DPOTrainer):
    pass


class RewardTrainer(AddaxMixin, trl.RewardTrainer):
    pass


KINDS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "reward": (RewardTrainer, RewardConfig),
}


def load(kind: str, folder: Path) -> nn.Module:
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    return auto.from_pretrained(folder / kind, dtype=torch.float32)


def data(kind: str) -> datasets.Dataset:
    texts = rows(5, 6)
    if kind == "sft":
        return datasets.Dataset.from_list(texts)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" w{3 + i} w9"}
        for i, row in enumerate(texts)
    ]
    return datasets.Dataset.from_list(pairs)


def make(
    kind: str,
    folder: Path,
    output: Path,
    sharding: str,
    world_size: int,
    *,
    adapters: bool = False,
    eval_dataset: Any = None,
    **more: Any,
) -> Any:
    AcceleratorState._reset_state()
    trainer, config = KINDS[kind]
    zero3 = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "Addax"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    usual = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // world_size,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "alpha": 0.1,
        "seed": SEED,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "deepspeed": zero3 if sharding == "zero3" else None,
    }
    args = config(**(usual | more))
    model = load(kind, folder)
    others: dict[str, Any] = {"ref_model": load(kind, folder)} if kind == "dpo" else {}
    if adapters:
        others["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if sharding == "fsdp2":
        shard_model(model)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token_id = 0
    return trainer(
        model=model,
        args=args,
        train_dataset=data(kind),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        **others,
    )


def run_case(kind: str, folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    output = folder / f"{kind}-{sharding}-{world_size}"
    trainer = make(kind, folder, output, sharding, world_size)
    trainer.train()
    found = {
        "g0": [entry["g0"] for entry in trainer.state.log_history if "g0" in entry],
        "weights": gathered(trainer.model),
        "rows": trainer.train_dataset.to_list(),
    }
    if sharding == "zero3":
        trainer.model_wrapped.destroy()
    return found


def run_saved(folder: Path, sharding: str, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Train for six steps and save; go on from the fourth. Returns the weights of all three."""
    outputs = [folder / f"{name}-{sharding}" for name in ("whole", "again")]
    found = {}
    for output, checkpoint in zip(outputs, (None, str(outputs[0] / "checkpoint-4")), strict=True):
        trainer = make(
            "sft",
            folder,
            output,
            sharding,
            world_size,
            max_steps=6,
            save_strategy="steps",
            save_steps=4,
            eval_dataset=data("sft"),
            eval_strategy="steps",
            eval_steps=3,
            max_grad_norm=0.5,
        )
        if checkpoint is not None:
            for weight in trainer.model.parameters():
                weight.detach().zero_()  # all comes from the checkpoint
        trainer.train(resume_from_checkpoint=checkpoint)
        found[output.name.partition("-")[0]] = gathered(trainer.model)
        if checkpoint is None:
            trainer.save_model(str(output / "model"))
        if sharding == "zero3":
            trainer.model_wrapped.destroy()
    found["saved"] = load_file(outputs[0] / "model" / "model.safetensors")
    return found


# ---- the same losses, a row at a time ----------------------------------------------------------


def log_likelihood(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    """Sum over the labels that are not -100."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return -cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")


def sft(model: Any, reference: Any, batch: list[dict[str, Any]]) -> Tensor:
    targets = sum(label != -100 for row in batch for label in row["labels"][1:])
    sums = [log_likelihood(model, row["input_ids"], row["labels"]) for row in batch]
    return -torch.stack(sums).sum() / targets


def dpo(model: Any, reference: Any, batch: list[dict[str, Any]]) -> Tensor:
    losses = []
    for row in batch:
        gains = []
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids, labels = row["prompt_ids"] + answer, [-100] * len(row["prompt_ids"]) + answer
            with torch.no_grad():
                before = log_likelihood(reference, ids, labels)
            gains.append(log_likelihood(model, ids, labels) - before)
        losses.append(-logsigmoid(BETA * (gains[0] - gains[1])))
    return torch.stack(losses).mean()


def reward(model: Any, reference: Any, batch: list[dict[str, Any]]) -> Tensor:
    def of(ids: list[int]) -> Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0, 0].double()

    margins = [of(row["chosen_ids"]) - of(row["rejected_ids"]) for row in batch]
    return -logsigmoid(torch.stack(margins)).mean()


LOSSES: dict[str, Callable[..., Tensor]] = {"sft": sft, "dpo": dpo, "reward": reward}


def lengths_of(table: list[dict[str, Any]]) -> list[int]:
    def tokens(row: dict[str, Any]) -> int:
        if "input_ids" in row:
            return len(row["input_ids"])
        return sum(len(value) for name, value in row.items() if name.endswith("_ids"))

    return [tokens(row) for row in table]


def plain_loop(kind: str, folder: Path, table: list[dict[str, Any]]) -> dict[str, Any]:
    """Ten steps on the rows that the trainer has made."""
    streams = partition(lengths_of(table), "addax", "median")
    schedule = StepSchedule(
        streams.zeroth_order, streams.first_order, BATCH, BATCH, SEED, drop_last=True
    )
    model, reference = load(kind, folder).train(), load(kind, folder).eval()
    optimizer = Addax(model.parameters(), lr=0.05, alpha=0.1, seed=SEED)
    attach(optimizer, model)
    g0 = []

    def closure(indices: Any) -> Callable[[], Tensor]:
        return lambda: LOSSES[kind](model, reference, [table[i] for i in indices])

    for step in range(STEPS):
        loss = optimizer.measure(
            closure(schedule.zeroth_order_indices(step)),
            closure(schedule.first_order_indices(step)),
        )
        assert loss is not None
        loss.backward()
        optimizer.step()
        assert optimizer.report is not None
        g0.append(optimizer.report.g0)
    return {"g0": g0, "weights": dict(model.state_dict())}


def set_up() -> None:
    deepspeed.init_distributed("gloo")
