"""``--length_threshold auto`` when rehearsals run out of memory, on one back end.

``python -m tests.workers.auto_threshold_cases FOLDER SHARDING WHERE`` lets it run out on one rank
alone. ``FOLDER/model`` holds the model.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import nn
from transformers import AutoModelForCausalLM

from addax_ds import UserError
from addax_ds.optim.addax import Addax
from addax_ds.sharding.fsdp2 import shard_model
from addax_ds.sharding.modules import blocks
from addax_ds.training import rehearsal
from addax_ds.training.length_threshold import AutoThreshold
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import examples, repeatable, rows, tiny_tokenizer
from tests.workers.trainer_cases import Case, arguments, gathered

PLANNED = 28
FITS = 18
"""Sequences up to this one fit; 25 and 20 are tried between, being at most 0.9 of the last."""

PLAN = AutoThreshold(PLANNED, (8, 12, 17, 18, 20, 25, 28), 1, 1_000_000, None, "it is planned")
CASE = Case(training={"max_steps": 5, "save_steps": 3, "gradient_accumulation_steps": 1})


@contextmanager
def short_of_memory(model: nn.Module, where: str, longest: int = FITS) -> Iterator[None]:
    """Let the second block find no memory for a first-order pass over longer sequences."""
    block = list(blocks(model))[1]

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory (injected)")

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled() and hidden.shape[1] > longest:
            if where == "backward":
                hidden.register_hook(fail)
            elif where == "forward":
                fail()

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counted_rehearsals() -> Iterator[list[int]]:
    """Note each rehearsal."""
    found: list[int] = []
    rehearse = Addax.rehearse

    def counted(self: Addax, *closures: Any) -> None:
        found.append(self.index)
        rehearse(self, *closures)

    Addax.rehearse = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Addax.rehearse = rehearse  # type: ignore[method-assign]


def train(
    folder: Path,
    sharding: str,
    name: str,
    threshold: int,
    plan: AutoThreshold | None = None,
    where: str = "nowhere",
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    world_size = comm.get_world_size() if comm.is_initialized() else 1
    output = folder / f"{sharding}-{world_size}" / name
    args = arguments(CASE, output, sharding, world_size, length_threshold=threshold, alpha=0.01)
    if args.deepspeed:  # its timers are running when a pass fails
        args.hf_deepspeed_config.config["wall_clock_breakdown"] = True
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    if sharding == "fsdp2":
        shard_model(model)
    trainer = AddaxTrainer(
        model,
        args,
        train_dataset=examples(rows(7, 9)),
        processing_class=tiny_tokenizer(),
        planned=plan,
    )
    torch.manual_seed(comm.get_rank() if comm.is_initialized() else 0)
    with counted_rehearsals() as rehearsals, short_of_memory(model, where):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = json.loads((output / "checkpoint-3" / "addax_state.json").read_text())
    found = {
        "weights": gathered(trainer.model),
        "log": [
            {key: value for key, value in entry.items() if key != "epoch"}
            for entry in repeatable(trainer.state.log_history)
        ],
        "generator": torch.random.get_rng_state(),
        "rehearsals": len(rehearsals),
        "noted": state["run"]["length_threshold"],
        "partition": trainer.partition.threshold if trainer.partition else None,
    }
    if args.deepspeed:
        trainer.model_wrapped.destroy()
    return found


CASES: dict[str, tuple[Any, ...]] = {
    "number": (FITS,),
    "forward": (PLANNED, PLAN, "forward"),
    "backward": (PLANNED, PLAN, "backward"),
    "planned": (PLANNED, PLAN),
    "planned number": (PLANNED,),
    "resumed": (FITS, PLAN),
}
"""Runs with L_T as a number, and ones that come to it by themselves."""


def set_up() -> None:
    deepspeed.init_distributed()


def run_case(name: str, folder: Path, sharding: str) -> dict[str, Any]:
    """Train; "resumed" goes on from a checkpoint of "backward"."""
    if name != "resumed":
        return train(folder, sharding, name, *CASES[name])
    world_size = comm.get_world_size() if comm.is_initialized() else 1
    checkpoint = folder / f"{sharding}-{world_size}" / "backward" / "checkpoint-3"
    return train(folder, sharding, "backward", *CASES[name], checkpoint=checkpoint)


def one_rank(folder: Path, sharding: str, where: str) -> str:
    """Memory runs out on rank 1 alone; return what this rank says about it."""
    rehearsal.WAIT_SECONDS = 3.0
    try:
        train(folder, sharding, "alone", PLANNED, PLAN, where if comm.get_rank() else "nowhere")
    except UserError as error:
        return str(error)
    return "trained"


def main() -> None:
    folder, sharding, where = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    set_up()
    said = one_rank(folder, sharding, where)
    (folder / f"{sharding}-alone-{comm.get_rank()}.txt").write_text(said)
    os._exit(0)  # there are collectives that will never end


if __name__ == "__main__":
    main()
