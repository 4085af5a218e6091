"""Messages about a run before it starts."""

from types import SimpleNamespace
from typing import Any

import pytest

from addax_ds.checkpoint.identity import Run
from addax_ds.cli import summary


@pytest.mark.parametrize(("directions", "said"), [(1, ""), (4, ", directions 4")])
def test_the_method_is_announced_with_its_directions(directions, said):
    run = Run(
        sharding="none",
        ranks=2,
        dtype="bf16",
        method="addax-wa",
        data_seed=0,
        drop_last=False,
        zeroth_order_batch=6,
        first_order_batch=4,
        hyperparameters={"alpha": 0.5, "zo_eps": 1e-3, "zo_directions": directions},
    )
    args: Any = SimpleNamespace(learning_rate=0.1, max_steps=7)
    schedule: Any = None  # for trainings without max_steps
    assert summary._method(args, run, schedule) == (
        f"addax-wa, alpha 0.5, zo_eps 0.001{said}, learning rate 0.1, K0 6, K1 4, ranks 2, steps 7"
    )
