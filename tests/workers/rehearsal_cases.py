"""Rehearsals that go well and ones that run out of memory anywhere, on every layout."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from addax_ds.optim.addax import unwrap
from tests.support.cases import Case, mean_loss
from tests.support.layouts import LAYOUTS, Layout, Run
from tests.support.models import token_batches
from tests.support.reference import Hyperparameters

STEPS = 2
ROWS = 8
POINTS = 5
"""So many operations of a rehearsal, evenly spread, find no memory, each in its turn."""

MEASURED = (0.25, 0.45)
"""Shares of a rehearsal's operations after which a step finds no memory, in `measure`."""

MODEL = {"dropout": 0.2, "vocabulary": 1004}
"""Its parameters divide over all ranks, which therefore do the same operations."""

VARIANTS: dict[str, tuple[int, Case]] = {
    "plain": (1, Case(model=MODEL)),
    "accumulated": (
        2,
        Case(
            model=MODEL,
            hyperparameters=Hyperparameters(max_grad_norm=0.4),
            gradient_checkpointing=True,
        ),
    ),
}
"""Micro-batches and what is trained."""


LEFT_OUT = ("unsharded x1", "ZeRO-3 x1", "ZeRO-3 x2, CPU offload")
"""Layouts in which nothing is given up that is not in another."""


class FailsAt(TorchDispatchMode):
    """Lets the operation of this number find no memory; counts them."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError(f"injected into operation {self.number}, {func}")
        return func(*args, **(kwargs or {}))


def closures(run: Run, batch: Tensor, micro_batches: int) -> list[Callable[[], Tensor]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = batch.chunk(world_size * micro_batches)
    own = [parts[i * world_size + rank] for i in range(micro_batches)]
    return [lambda x=x: mean_loss(run.model, x) for x in own]


def rehearse(run: Run, micro_batches: int, fails_at: int | None = None) -> int:
    """Rehearse; return the number of operations, or 0 if it ran out of memory."""
    ((long, short),) = token_batches(1, rows=ROWS, length=40)
    mode = FailsAt(fails_at)
    try:
        with mode:
            unwrap(run.optimizer).rehearse(
                closures(run, long, 1), closures(run, short, micro_batches)
            )
    except torch.OutOfMemoryError:
        return 0
    return mode.count


def fail_to_measure(run: Run, micro_batches: int, number: int) -> None:
    """Begin a step that runs out of memory before it is measured, and leave no other trace."""
    ((long, short),) = token_batches(1, rows=ROWS, length=40)
    generator = torch.random.get_rng_state()
    try:
        with FailsAt(number):
            run.optimizer.measure(
                closures(run, long, micro_batches), closures(run, short, micro_batches)
            )
    except torch.OutOfMemoryError:
        torch.random.set_rng_state(generator)
    else:
        raise AssertionError(f"a step has fewer than {number} operations")


def state(run: Run) -> dict[str, Any]:
    """All that a later step reads."""
    addax = unwrap(run.optimizer)
    return {
        "weights": run.weights(),
        "state": addax.state_dict()["addax"],
        "generator": torch.random.get_rng_state(),
        "unapplied": addax.sharding.unapplied_gradient(),
        "forward": addax.sharding.calls.forward_ran,
    }


def fail_everywhere(run: Run, micro_batches: int, operations: int) -> list[int]:
    """Rehearse with failures all over the step, and then a whole one."""
    numbers = [operations * (2 * point + 1) // (2 * POINTS) for point in range(POINTS)]
    return [rehearse(run, micro_batches, number) for number in (*numbers, None)]


def train(layout: Layout, name: str, rehearses: bool) -> dict[str, Any]:
    """Take two steps; rehearse before the first, and fail to do so before the second.

    The first forward of FSDP2 sets it up, which is not begun anew if it fails.
    """
    micro_batches, case = VARIANTS[name]
    torch.manual_seed(dist.get_rank())
    run = layout.run(case.build(), case.hyperparameters)
    found: dict[str, Any] = {"steps": [], "rehearsed": []}
    for long, short in token_batches(STEPS, rows=ROWS):
        run.model.train()
        before = state(run)
        if rehearses and not found["steps"]:
            found["rehearsed"] = [rehearse(run, micro_batches) for _ in range(2)]
        elif rehearses:
            operations = found["rehearsed"][-1]
            found["rehearsed"] += fail_everywhere(run, micro_batches, operations)
            for share in MEASURED:
                fail_to_measure(run, micro_batches, int(share * operations))
        found["steps"].append({"before": before, "after": state(run)})
        loss = run.optimizer.measure(
            closures(run, long, micro_batches), closures(run, short, micro_batches)
        )
        assert loss is not None
        run.backward(loss)
        run.step()
        found["steps"][-1]["report"] = vars(unwrap(run.optimizer).report)
    found["weights"] = run.weights()
    run.close()
    return found


def set_up() -> None:
    dist.init_process_group("gloo")


def run_case(layout: str, variant: str) -> list[dict[str, Any]]:
    """Train without rehearsals, and with them."""
    return [train(LAYOUTS[layout], variant, rehearses) for rehearses in (False, True)]
