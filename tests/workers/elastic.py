"""Trains under ZeRO-3 and FSDP2, from the start or from what other numbers of ranks have saved.

``python -m tests.workers.elastic FOLDER NAME FROM...``: checkpoints of the runs FROM are gone on
from; without any, the whole training runs. Rank 0 writes ``FOLDER/NAME.pt``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed import comm
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import examples, repeatable, rows, tiny_tokenizer
from tests.workers.teardown import shut_down
from tests.workers.trainer_cases import gathered

BATCH = 4  # over all ranks, in either stream
STEPS, SAVED_AT = 6, 3
SHARDINGS = ("zero3", "fsdp2")


def train(folder: Path, sharding: str, output: Path, checkpoint: Path | None) -> dict[str, Any]:
    AcceleratorState._reset_state()
    # Of the training before, which would partition this model, too.
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "Addax", "params": {"lr": "auto", "alpha": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5000},
    }
    args = AddaxConfig(
        length_threshold=12,
        alpha=0.01,
        output_dir=str(output),
        use_cpu=True,
        learning_rate=0.05,
        max_steps=STEPS,
        save_steps=SAVED_AT,
        logging_steps=1,
        per_device_train_batch_size=BATCH // comm.get_world_size(),
        report_to=[],
        disable_tqdm=True,
        deepspeed=config if sharding == "zero3" else None,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if sharding == "fsdp2":
        shard_model(model)
    trainer = AddaxTrainer(
        model,
        args,
        train_dataset=examples(rows(9, 10)),
        processing_class=tiny_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    log = [entry for entry in repeatable(trainer.state.log_history) if "g0" in entry]
    found = {"log": log, "weights": gathered(trainer.model)}
    if sharding == "zero3":
        trainer.model_wrapped.destroy()
    return found


def main() -> None:
    folder, name, before = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    found = {}
    for sharding in SHARDINGS:
        output = folder / name / sharding
        if not before:
            found[sharding] = train(folder, sharding, output, None)
        for other in before:
            # What ZeRO-3 has saved goes on under FSDP2, and the other way round.
            for writer in SHARDINGS:
                checkpoint = folder / other / writer / f"checkpoint-{SAVED_AT}"
                resumed = train(folder, sharding, output / f"{other}-{writer}", checkpoint)
                found[sharding, other, writer] = resumed
    if comm.get_rank() == 0:
        torch.save(found, folder / f"{name}.pt")
    shut_down()


if __name__ == "__main__":
    main()
