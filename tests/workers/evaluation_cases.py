"""Evaluates choices and questions without training and in its course, on each rank.

``python -m tests.workers.evaluation_cases FOLDER SHARDING``; the tests call `run_all` themselves
for one process. ``FOLDER/model`` holds the model.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from transformers import AutoModelForCausalLM, TrainerCallback

from addax_ds.evaluation.scored_set import ScoredSet
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import choice_set, examples, question_set, rows, tiny_tokenizer
from tests.workers.teardown import shut_down
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


def run_all(folder: Path, sharding: str, world_size: int) -> dict[str, Any]:
    return {
        f"{kind}, {moment}": evaluate(folder, sharding, world_size, make(), steps)
        for kind, make in SETS.items()
        for moment, steps in (("untrained", 0), ("in training", 2))
    }


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
        examples(rows(4, 8)),
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


def main() -> None:
    folder, sharding = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    rank, world_size = comm.get_rank(), comm.get_world_size()
    found = run_all(folder, sharding, world_size)
    torch.save(found, folder / f"{sharding}-{world_size}-rank{rank}.pt")
    shut_down()


if __name__ == "__main__":
    main()
