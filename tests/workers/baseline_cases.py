"""Trains with SGD and AdamW under ZeRO-3. ``FOLDER/model`` holds the model."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoModelForCausalLM

from addax_ds.training.baseline import BaselineTrainer
from tests.support.tiny import choice_set, repeatable, tiny_tokenizer
from tests.workers.trainer_cases import Case, arguments, gathered

STEPS = 4
CASES = {
    "sgd": Case(addax={"method": "sgd"}, training={"learning_rate": 0.05, "max_steps": STEPS}),
    "adamw": Case(
        addax={"method": "adamw"},
        training={"learning_rate": 1e-3, "max_steps": STEPS, "weight_decay": 0.1},
    ),
    "clipped and accumulated": Case(
        addax={"method": "adamw"},
        training={"learning_rate": 1e-3, "max_steps": STEPS, "max_grad_norm": 0.5},
        shares=2,
    ),
    "best": Case(
        addax={"method": "sgd"},
        training={
            "learning_rate": 10.0,  # so large that the loss grows
            "max_steps": STEPS,
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
        },
    ),
}


def set_up() -> None:
    dist.init_process_group("gloo")  # the config then sets up DeepSpeed's own part


def run_case(name: str, folder: Path) -> dict[str, Any]:
    world_size = dist.get_world_size()
    case, output = CASES[name], folder / f"{name}-{world_size}"
    args = arguments(case, output, "zero3", world_size)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = BaselineTrainer(
        model,
        args,
        train_dataset=case.examples(),
        eval_dataset=choice_set(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    log = trainer.state.log_history
    found = {
        "log": [entry for entry in repeatable(log) if "loss" in entry],
        "evaluations": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "weights": gathered(model),
    }
    if args.load_best_model_at_end:
        found["evaluated again"] = trainer.evaluate()["eval_loss"]
    trainer.model_wrapped.destroy()
    return found
