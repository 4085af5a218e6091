"""``--find_learning_rate``, unsharded: what it says is what trainings at each rate come to.

tests/training/test_trainer.py has the other back ends.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from addax_ds import AddaxConfig, AddaxTrainer, UserError
from addax_ds.training.learning_rate import HELD_STEPS, STEPS, Sweep, rates
from tests.support.tiny import examples, rows, tiny_model, tiny_tokenizer
from tests.support.trainer_reference import global_loss

ROWS = examples(rows(9, 14))


def trainer(folder: Path, *, dropout: float = 0.0, **options: Any) -> AddaxTrainer:
    usual = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "report_to": "none"},
        **{"per_device_zo_batch_size": 2, "length_threshold": 12, "alpha": 0.01, "seed": 3},
        **{"disable_tqdm": True, "use_cpu": True},
    }
    return AddaxTrainer(
        model=tiny_model("opt", dropout=dropout),
        args=AddaxConfig(**{**usual, **options}),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )


def finding(folder: Path, **options: Any) -> AddaxTrainer:
    return trainer(folder, find_learning_rate=True, **options)


def held_loss(of: AddaxTrainer) -> float:
    """Of the batches that the schedule has after the steps of a sweep, in float64."""
    model, schedule = of.model.double().eval(), of._steps.schedule
    losses = []
    with torch.no_grad():
        for step in range(STEPS, STEPS + HELD_STEPS):
            for indices in (schedule.zeroth_order_indices, schedule.first_order_indices):
                batch = indices(step)
                if batch is not None:
                    losses.append(float(global_loss(model, [ROWS[i] for i in batch])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", ["addax", "ip-sgd"])
def test_every_loss_is_that_of_a_training_at_its_rate(method, tmp_path):
    addax = {} if method == "addax" else {"alpha": None, "length_threshold": None}
    more = {"method": method, **addax, "per_device_zo_batch_size": None}
    sweep = finding(tmp_path / "sweep", **more).find_learning_rate()
    untrained = trainer(tmp_path / "0", learning_rate=1.0, **more)
    assert sweep.before == pytest.approx(held_loss(untrained), rel=1e-5)
    assert list(sweep.losses) == list(rates(method)[: len(sweep.losses)])
    for rate, loss in sweep.losses.items():
        constant = {"lr_scheduler_type": "constant", "max_steps": STEPS, "save_strategy": "no"}
        trained = trainer(tmp_path / f"{rate}", learning_rate=rate, **constant, **more)
        trained.train()
        assert loss == pytest.approx(held_loss(trained), rel=1e-4), rate
    best = min(sweep.losses, key=sweep.losses.get)
    assert sweep.proposal == best
    assert f"--learning_rate {best:g}" in str(sweep)


def test_it_gives_the_same_twice_and_keeps_nothing(tmp_path):
    """With dropout, whose masks are those of each training's own start."""
    found = finding(tmp_path / "output", dropout=0.3)
    before = {name: p.detach().clone() for name, p in found.model.named_parameters()}
    generator = torch.random.get_rng_state()
    first = found.find_learning_rate()
    assert found.find_learning_rate() == first
    assert all(torch.equal(p, before[name]) for name, p in found.model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not list((tmp_path / "output").iterdir())
    assert found.addax.index == 0
    with pytest.raises(UserError, match=r"no learning rate to train with: call"):
        found.train()


def test_a_rate_that_diverges_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("addax_ds.training.learning_rate.rates", lambda _: (0.03, 1e30, 2e30))
    sweep = finding(tmp_path).find_learning_rate()
    assert list(sweep.losses) == [0.03, 1e30]
    assert not sweep.losses[1e30] < sweep.before
    assert sweep.proposal == 0.03
    assert "at the edge of what was tried" in str(sweep)


def test_no_rate_may_be_better(tmp_path):
    assert Sweep(1.0, {0.1: 1.5, 0.2: math.nan}).proposal is None
    assert "No rate from 0.1 to 0.2" in str(Sweep(1.0, {0.1: 1.5, 0.2: math.nan}))


def test_the_rates_of_mezo_are_smaller():
    assert rates("addax")[0] == 1e-5
    assert rates("addax")[-1] == 0.3
    assert rates("mezo") == pytest.approx([rate * 1e-3 for rate in rates("addax")])
