"""What a training says of its parts: their cost, their predicted gain, and what to try."""

import logging
import re
from typing import Any

import pytest

from addax_ds import AddaxTrainer
from addax_ds.optim.report import StepReport
from addax_ds.training.worth import ENOUGH_STEPS, Worth
from tests.support.tiny import examples, row, tiny_model
from tests.training.test_mixin import config


@pytest.fixture(autouse=True)
def _alone(program_alone) -> None:
    pass


def report(zeroth: float | None, first: float | None) -> StepReport:
    return StepReport(
        index=0,
        g0=1.0,
        zeroth_order_loss=1.0,
        first_order_loss=1.0,
        zeroth_order_norm=1.0,
        first_order_norm=1.0,
        gradient_norm=1.0,
        zeroth_order_decrease=zeroth,
        first_order_decrease=first,
    )


def after(steps: int, decreases: tuple[float, float], units: tuple[float, float]) -> Worth:
    worth = Worth()
    for _ in range(steps):
        worth.add(report(*decreases), *units)
    return worth


@pytest.mark.parametrize(
    ("decreases", "units", "said"),
    [
        (
            (1.0, 199.0),
            (60, 40),
            "The zeroth-order part takes 60% of the computation.* 0.50%",
        ),
        ((199.0, 1.0), (40, 60), "The first-order part takes 60% .* 0.50% .* a smaller --alpha"),
        ((1.0, 199.0), (40, 60), None),  # it costs less than half
        ((3.0, 197.0), (60, 40), None),  # it buys more than 1 %
        ((0.0, 0.0), (60, 40), None),
    ],
)
def test_half_of_the_computation_for_less_than_a_hundredth_is_said_once(decreases, units, said):
    assert after(ENOUGH_STEPS - 1, decreases, units).advice() is None
    worth = after(ENOUGH_STEPS, decreases, units)
    advice = worth.advice()
    assert (advice is None) if said is None else re.match(said, advice)
    assert worth.advice() is None


def test_steps_without_one_of_the_parts_do_not_count():
    worth = Worth()
    for decreases in ((None, 1.0), (1.0, None), (float("nan"), 1.0), (1.0, float("inf"))):
        worth.add(report(*decreases), 1, 1)
    worth.add(report(1.0, 1.0), 0, 1)
    assert worth == Worth()


def trained(folder: Any, **more: Any) -> AddaxTrainer:
    """Twelve steps of two rows of 16 tokens, zeroth-order, and two of 6."""
    usual = {"max_steps": 12, "logging_steps": 1, "learning_rate": 1e-3, "alpha": 1e-6}
    data = examples([row(*(10, 5) if number % 2 else (3, 2), number) for number in range(12)])
    trainer = AddaxTrainer(tiny_model("opt"), config(folder, **usual | more), train_dataset=data)
    trainer.train()
    return trainer


def test_a_run_says_what_its_parts_cost_and_buy(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "addax_ds"):
        trainer = trained(tmp_path)
    said = [record.getMessage() for record in caplog.records if "part takes" in record.message]
    assert len(said) == 1
    # Two passes over 32 tokens; a forward and a backward, which counts twice, over 12.
    assert f"takes {64 / (64 + 36):.0%} of the computation" in said[0]
    assert "--method ip-sgd" in said[0]
    logs = [entry for entry in trainer.state.log_history if "zo_decrease" in entry]
    assert len(logs) == 12
    for entry in logs:
        norms = entry["zo_update_norm"], entry["fo_update_norm"]
        assert entry["zo_decrease"] == pytest.approx(1e-3 * 1e-6 * entry["g0"] ** 2)
        assert entry["fo_decrease"] == pytest.approx(1e-3 * entry["grad_norm"] ** 2, rel=1e-4)
        share = norms[0] ** 2 / (norms[0] ** 2 + norms[1] ** 2)
        assert entry["zo_update_share"] == pytest.approx(share)
    zeroth, first = (sum(e[f"{part}_decrease"] for e in logs) for part in ("zo", "fo"))
    assert f"gave {zeroth / (zeroth + first):.2%} of the decrease" in trainer.worth.describe()
    assert "(12 logged steps)" in trainer.worth.describe()


@pytest.mark.parametrize(
    ("more", "units"),
    [
        ({"activation_checkpointing": True}, (64, 4 * 12)),
        ({"max_grad_norm": 1.0}, (64, 6 * 12)),
        ({"zo_directions": 2}, (128, 3 * 12)),
    ],
)
def test_units_are_those_of_the_passes_that_run(tmp_path, more, units):
    worth = trained(tmp_path, max_steps=1, **more).worth
    assert (worth.zeroth_order_units, worth.first_order_units) == units


@pytest.mark.parametrize(("method", "logged"), [("mezo", "zo_decrease"), ("ip-sgd", "fo_decrease")])
def test_of_one_part_alone_there_is_nothing_to_weigh(tmp_path, method, logged):
    more = {"method": method, "alpha": None, "length_threshold": None, "max_steps": 1}
    trainer = trained(tmp_path, **more)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name for name in entry if "decrease" in name or "share" in name} == {logged}
    assert trainer.worth == Worth()
