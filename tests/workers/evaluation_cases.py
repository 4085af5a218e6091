"""Evaluates choices and questions without training and in its course, on each rank.

``FOLDER/model`` holds the model.
"""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from addax_ds.evaluation.scored_set import ScoredSet
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import choice_set, examples, question_set, rows, tiny_tokenizer
from tests.workers.trainer_cases import Case, arguments

SETS = {"choices": choice_set, "questions": question_set}


class _NoteScores(TrainerCallback):
    """Keeps what each evaluation has scored."""

    def __init__(self) -> None:
        self.trainer: AddaxTrainer | None = None
        self.scores: list[torch.Tensor] = []

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.scores.append(torch.from_numpy(self.trainer.scores.copy()))


STEPS = {"untrained": 0, "in training": 2}
CASES = [f"{kind}, {moment}" for kind in SETS for moment in STEPS]


def set_up() -> None:
    deepspeed.init_distributed()


def run_case(name: str, folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    kind, moment = name.split(", ")
    return evaluate(folder, sharding, world_size, SETS[kind](), STEPS[moment])


def evaluate(
    folder: Path, sharding: str, world_size: int, dataset: ScoredSet, steps: int
) -> dict[str, Any]:
    """Evaluate by 3 a rank; with ``steps``, after each of them, of which the last changes much."""
    case = Case(
        addax={"length_threshold": 12},
        training={"max_steps": steps or 1, "eval_strategy": "steps", "eval_steps": 1},
    )
    args = arguments(case, folder / "output", sharding, world_size, per_device_eval_batch_size=3)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    if sharding == "fsdp2":
        shard_model(model)
    note = _NoteScores()
    trainer = AddaxTrainer(
        model,
        args,
        train_dataset=examples(rows(4, 8)),
        eval_dataset=dataset,
        processing_class=tiny_tokenizer(),
        callbacks=[note],
    )
    note.trainer = trainer
    found: dict[str, Any] = {}
    if steps:
        trainer.train()
    else:
        found["metrics"] = trainer.evaluate()
    found["scores"] = note.scores
    found["training"] = model.training
    if sharding == "zero3":
        trainer.model_wrapped.destroy()
    return found
