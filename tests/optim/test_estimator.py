"""Zeroth-order estimators: their numbers, and that a step takes any of them."""

import math

import pytest
import torch
from torch import Tensor, nn

import addax_ds
from addax_ds.optim.estimator import Estimate, Estimator, Pass, TwoSidedDifference
from tests.support.passes import measured_g0

TARGET = torch.linspace(-1, 1, 12).view(3, 4)


class Quadratic(nn.Module):
    """A loss whose gradient is known: ``weight - TARGET``, and that of a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self) -> Tensor:
        return (self.weight - TARGET).square().sum() / 2 + self.bias.square().sum() / 2


class OneSidedDifference(Estimator):
    """The mean of (L(theta + eps z) - L(theta)) / eps along some directions."""

    def __init__(self, directions: int) -> None:
        self.passes = (Pass(0, 0), *(Pass(probe, +1) for probe in range(directions)))

    def estimate(self, losses, zo_eps) -> Estimate:
        here, *there = losses
        projected = tuple((loss - here) / zo_eps for loss in there)
        return Estimate(here, projected, tuple(g0 / len(projected) for g0 in projected))


def attached(**options) -> tuple[Quadratic, addax_ds.Addax]:
    model = Quadratic()
    options = {"lr": 0.01, "alpha": 1.0, "zo_eps": 1e-2, "seed": 6, **options}
    optimizer = addax_ds.Addax(model.parameters(), **options)
    addax_ds.attach(optimizer, model)
    return model, optimizer


def z_of(step: int, probe: int) -> dict[str, Tensor]:
    """One direction, in float64."""
    return {
        n: addax_ds.gaussian(6, step, n, 0, p.numel(), probe=probe).view(p.shape).double()
        for n, p in Quadratic().named_parameters()
    }


def exact_loss(weights: dict[str, Tensor], z: dict[str, Tensor], scale: float) -> float:
    seen = {n: w + scale * z[n] for n, w in weights.items()}
    off = seen["weight"] - TARGET.double()
    return (off.square().sum() / 2 + seen["bias"].square().sum() / 2).item()


def test_one_direction_is_the_difference_of_the_paper():
    estimator = TwoSidedDifference()
    assert estimator.passes == (Pass(0, +1), Pass(0, -1))
    estimate = estimator.estimate([2.5, 2.0], zo_eps=0.125)
    assert estimate == Estimate(loss=2.25, projected_gradients=(2.0,), coefficients=(2.0,))
    assert estimate.g0 == 2.0
    assert estimator.estimate([2.0, 2.5], zo_eps=0.125).g0 == -2.0


def test_several_directions_are_averaged():
    estimator = TwoSidedDifference(2)
    assert estimator.passes == (Pass(0, +1), Pass(0, -1), Pass(1, +1), Pass(1, -1))
    estimate = estimator.estimate([2.5, 1.0, 2.0, 4.0], zo_eps=0.25)
    assert estimate.loss == 9.5 / 4
    assert estimate.projected_gradients == (3.0, -4.0)
    assert estimate.coefficients == (1.5, -2.0)
    assert estimate.g0 == pytest.approx(math.sqrt((9 + 16) / 2))


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_all_losses_of_a_step_travel_in_one_reduction(directions, monkeypatch):
    model, optimizer = attached(alpha=0.5, zo_directions=directions)
    reduced = []
    monkeypatch.setattr(optimizer.sharding, "sum_over_ranks", lambda t: reduced.append(t.numel()))
    loss = optimizer.measure(model, model)
    assert reduced == [2 * directions + 1 + 1]  # and the number of unread parameters
    loss.backward()
    optimizer.step()
    assert len(reduced) == 2  # and the one at the end of each step


def test_the_number_of_directions_may_change_between_two_steps():
    model, optimizer = attached()
    for directions in (1, 3, 2):
        optimizer.zo_directions = directions
        assert len(optimizer.estimator.passes) == 2 * directions
        optimizer.measure(model, None)
        optimizer.step()
        assert len(optimizer.report.projected_gradients) == directions
    optimizer.estimator = OneSidedDifference(2)
    assert len(optimizer.estimator.passes) == 3


@pytest.mark.parametrize("directions", [1, 3])
def test_the_report_has_every_direction_and_the_norm_of_their_mean(directions):
    model, optimizer = attached(zo_directions=directions)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    g0 = measured_g0(optimizer, model)
    optimizer.step()
    report = optimizer.report
    assert len(report.projected_gradients) == directions
    exact = {n: p.double() for n, p in before.items()}
    for probe, found in enumerate(report.projected_gradients):
        plus, minus = (exact_loss(exact, z_of(0, probe), sign * 1e-2) for sign in (1, -1))
        assert found == pytest.approx((plus - minus) / 2e-2, rel=1e-3, abs=1e-3)
    assert report.g0 == g0
    assert abs(g0) == pytest.approx(math.hypot(*report.projected_gradients) / directions**0.5)
    norm = 0.01 * math.hypot(*report.projected_gradients) / directions * 16**0.5
    assert report.zeroth_order_norm == pytest.approx(norm)


def test_one_loss_of_four_that_is_not_finite_leaves_the_whole_part_out(caplog):
    model, optimizer = attached(zo_directions=2)
    before = [p.detach().clone() for p in model.parameters()]
    losses = iter([1.0, 2.0, 3.0, math.inf])
    assert measured_g0(optimizer, lambda: 0 * model() + next(losses)) == 0.0
    assert "zeroth-order losses inf: that part" in caplog.text  # not the three that are sound
    optimizer.step()
    assert optimizer.report.has_nonfinite
    assert optimizer.report.projected_gradients == ()
    assert optimizer.report.zeroth_order_norm == 0.0
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("directions", [1, 2])
def test_an_estimator_of_ones_own_trains_like_its_float64_loop(directions):
    model, optimizer = attached()
    optimizer.estimator = OneSidedDifference(directions)
    exact = {n: p.detach().double() for n, p in model.named_parameters()}
    start = exact["weight"]
    for step in range(10):
        optimizer.measure(model, None)
        optimizer.step()
        here = exact_loss(exact, exact, 0.0)
        update = dict.fromkeys(exact, 0.0)
        for probe in range(directions):
            z = z_of(step, probe)
            g0 = (exact_loss(exact, z, 1e-2) - here) / 1e-2
            update = {n: u + g0 / directions * z[n] for n, u in update.items()}
        exact = {n: w - 0.01 * update[n] for n, w in exact.items()}
        assert optimizer.report.zeroth_order_loss == pytest.approx(here, rel=1e-5)
    moved = (exact["weight"] - start).norm()
    assert moved > 0.1
    for name, parameter in model.named_parameters():
        assert (parameter - exact[name]).norm() <= 1e-3 * moved
