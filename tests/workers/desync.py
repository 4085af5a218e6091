"""Lets ranks come apart in several ways, and writes down what `DesyncCheck` says on each."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from addax_ds import UserError
from addax_ds.optim.addax import unwrap
from addax_ds.training.desync import DesyncCheck
from tests.support.cases import Case, batches
from tests.support.layouts import LAYOUTS, Run
from tests.workers.attached_cases import train_step
from tests.workers.teardown import shut_down

PARAMETER = "model.decoder.layers.1.fc1.weight"


def nothing(run: Run) -> None:
    pass


def one_weight_of_one_rank(run: Run) -> None:
    if dist.get_rank() == 1:
        shard = next(s for s in unwrap(run.optimizer).sharding.shards() if s.name == PARAMETER)
        with torch.no_grad():
            shard.data[7] += 1e-6


def learning_rate_of_one_rank(run: Run) -> None:
    if dist.get_rank() == 1:
        unwrap(run.optimizer).param_groups[0]["lr"] *= 1.5


HARM = (nothing, one_weight_of_one_rank, learning_rate_of_one_rank)


def train(layout: str, harm, step: int) -> str | None:
    """Check every other step; do harm before the given one."""
    case = Case(model={"activation": "gelu"})
    run = LAYOUTS[layout].run(case.build(), case.hyperparameters)
    check = DesyncCheck(unwrap(run.optimizer), every=2)
    try:
        for index, (long, short) in enumerate(batches()[:6]):
            if index == step:
                harm(run)
            check.before_step()
            train_step(run, case, long, short)
            check.after_step()
    except UserError as error:
        return f"{index}: {error}"
    finally:
        run.close()
    return None


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for layout in LAYOUTS:
        if LAYOUTS[layout].world_size == 2:
            # Before step 2 the check of step 1 is fresh; before step 3 there is none.
            found[layout] = {f"{h.__name__} {s}": train(layout, h, s) for h in HARM for s in (2, 3)}
    (folder / f"desync-{dist.get_rank()}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main()
