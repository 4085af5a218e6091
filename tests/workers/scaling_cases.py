"""Measures points of the scaling study on 2 ranks, and counts their collectives a second time.

``python -m tests.workers.scaling_cases FOLDER``; ``FOLDER/model`` holds a configuration. The second
count is by torch's dispatcher (`studies.collectives.CollectiveCounter`), over the same steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed import ProcessGroup, Work

from addax_ds.optim import step
from studies.collectives import CollectiveCounter
from studies.scaling import measure
from studies.scaling.phases import PhaseTimer
from studies.scaling.point import Point
from tests.workers.teardown import shut_down

STEPS = 2
LENGTH = 16
ROWS = {"zo_rows": 1, "fo_rows": 2}
CASES = (  # those of FSDP2 first: TrainingArguments with a DeepSpeed JSON leave a variable behind
    ("addax", "fsdp2"),
    ("ip-sgd", "fsdp2"),
    ("addax", "zero3"),
    ("addax-wa", "zero3"),
    ("mezo", "zero3"),
    ("ip-sgd", "zero3"),
    ("sgd", "zero3"),
    ("adamw", "zero3"),
)


class CountedTimer(PhaseTimer):
    """Counts the collectives of the steps that it times."""

    counters: tuple[CollectiveCounter, ...] = ()

    def start(self) -> None:
        super().start()
        counter = CollectiveCounter()
        CountedTimer.counters += (counter,)
        counter.__enter__()

    def stop(self) -> dict[str, float]:
        CountedTimer.counters[-1].__exit__(None, None, None)
        return super().stop()


def run(method: Any, sharding: str, folder: Path) -> dict[str, Any]:
    AcceleratorState._reset_state()
    CountedTimer.counters = ()
    model = str(folder / "model" / "config.json")
    point = Point(model, method, dist.get_world_size(), LENGTH, sharding, **ROWS)
    ds_config = None
    if sharding == "zero3":
        ds_config = json.loads((folder / "ds_config.json").read_text())
    found = measure.measure(point, STEPS, ds_config, folder)
    return {**found, "dispatched": [counter.calls for counter in CountedTimer.counters]}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    measure.PhaseTimer = CountedTimer
    before = {owner: dict(vars(owner)) for owner in (ProcessGroup, Work, step)}
    found = {f"{method} {sharding}": run(method, sharding, folder) for method, sharding in CASES}
    found["left in place"] = [
        name
        for owner, attributes in before.items()
        for name, value in vars(owner).items()
        if value is not attributes.get(name)
    ]
    (folder / f"scaling-{dist.get_rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
