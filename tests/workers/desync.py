"""Lets ranks come apart in several ways, and returns what `DesyncCheck` says on each."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from addax_ds import UserError
from addax_ds.optim.addax import unwrap
from addax_ds.training.desync import DesyncCheck
from tests.support.cases import Case, batches
from tests.support.layouts import LAYOUTS, Run
from tests.workers.attached_cases import train_step

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
CASES: dict[str, tuple[Callable[[Run], None], int]] = {
    f"{harm.__name__} {step}": (harm, step) for harm in HARM for step in (2, 3)
}
"""Before step 2 the check of step 1 is fresh; before step 3 there is none."""


def set_up() -> None:
    dist.init_process_group("gloo")


def run_case(layout: str, name: str) -> str | None:
    """Check every other step; do harm before the given one."""
    harm, step = CASES[name]
    case = Case()
    run = LAYOUTS[layout].run(case.build(), case.hyperparameters)
    optimizer, check = unwrap(run.optimizer), DesyncCheck(every=2)
    try:
        for index, (long, short) in enumerate(batches()[:6]):
            if index == step:
                harm(run)
            check.before_step(optimizer)
            train_step(run, case, long, short)
            check.after_step(optimizer)
    except UserError as error:
        return f"{index}: {error}"
    finally:
        run.close()
    return None
