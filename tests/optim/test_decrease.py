"""The decrease that a step reports of each part, against the true one in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import addax_ds
from addax_ds.optim.report import StepReport

SEED, ALPHA = 5, 0.3


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return (self.head(x) - 1).square().mean()


torch.manual_seed(2)
LONG, SHORT = torch.randn(5, 6), torch.randn(4, 6)


def a_step(lr: float, groups: bool = False, **options) -> tuple[Small, StepReport]:
    """Run one step; return the model as it was, in float64, and the report."""
    model = Small()
    before = copy.deepcopy(model).double()
    params = [{"params": model.layers.parameters(), "lr": 2 * lr}]
    params += [{"params": model.head.parameters()}]
    optimizer = addax_ds.Addax(
        params if groups else model.parameters(),
        **{"lr": lr, "alpha": ALPHA, "seed": SEED, **options},
    )
    optimizer.track_norm = True
    addax_ds.attach(optimizer, model)
    loss = optimizer.measure(lambda: model(LONG), lambda: model(SHORT))
    if loss is not None:
        loss.backward()
    optimizer.step()
    return before, optimizer.report


def z_of(model: Small, probe: int, step: int = 0) -> list[Tensor]:
    return [
        addax_ds.gaussian(SEED, step, n, 0, p.numel(), probe=probe).view(p.shape).double()
        for n, p in model.named_parameters()
    ]


def gradient(model: Small, batch: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(batch.double()), list(model.parameters())))


def slope(model: Small, along: list[Tensor]) -> float:
    """Derivative of the long rows' loss."""
    pairs = zip(gradient(model, LONG), along, strict=True)
    return sum((g * d).sum().item() for g, d in pairs)


@torch.no_grad()
def decrease(model: Small, batch: Tensor, update: list[Tensor]) -> float:
    """By how much the loss of a batch falls if an update is subtracted."""
    moved = copy.deepcopy(model)
    for weight, change in zip(moved.parameters(), update, strict=True):
        weight -= change
    return (model(batch.double()) - moved(batch.double())).item()


@pytest.mark.parametrize("directions", [1, 3])
def test_the_predicted_decreases_are_the_true_ones_of_small_steps(directions):
    """What is left falls with the step: it is of second order."""
    off = {"zeroth": [], "first": []}
    for lr in (2e-2, 2e-3):
        model, report = a_step(lr, zo_directions=directions)
        zs = [z_of(model, probe) for probe in range(directions)]
        by_z = [[lr * ALPHA / directions * slope(model, z) * part for part in z] for z in zs]
        zeroth = [sum(parts) for parts in zip(*by_z, strict=True)]
        first = [lr * (1 - ALPHA) * g for g in gradient(model, SHORT)]
        for part, predicted, true in (
            ("zeroth", report.zeroth_order_decrease, decrease(model, LONG, zeroth)),
            ("first", report.first_order_decrease, decrease(model, SHORT, first)),
        ):
            off[part].append(abs(predicted / true - 1))
    for large, small in off.values():
        assert small < 0.01
        assert small < large / 5


def test_at_either_end_of_alpha_one_part_is_left():
    model, report = a_step(1e-3, alpha=1.0)
    wanted = 1e-3 * slope(model, z_of(model, 0)) ** 2
    assert report.zeroth_order_decrease == pytest.approx(wanted, rel=1e-3)
    assert report.first_order_decrease is None
    assert report.zeroth_order_share == 1.0
    _, report = a_step(1e-3, alpha=0.0)
    assert report.zeroth_order_decrease is None
    assert report.first_order_decrease == pytest.approx(1e-3 * report.gradient_norm**2)
    assert report.zeroth_order_share == 0.0


def test_clipping_shortens_the_first_order_part_alone():
    _, free = a_step(1e-3)
    limit = free.gradient_norm / 4
    _, clipped = a_step(1e-3, max_grad_norm=limit)
    assert clipped.first_order_decrease == pytest.approx(free.first_order_decrease / 4, rel=1e-4)
    assert clipped.zeroth_order_decrease == free.zeroth_order_decrease


def test_parameter_groups_have_their_own_learning_rates():
    """The slope along z is of all groups together, so no zeroth-order decrease is known."""
    model, report = a_step(1e-3, groups=True)
    names = [name for name, _ in model.named_parameters()]
    squares = [
        (1e-3 if name.startswith("head") else 2e-3) * g.square().sum().item()
        for name, g in zip(names, gradient(model, SHORT), strict=True)
    ]
    assert report.first_order_decrease == pytest.approx((1 - ALPHA) * sum(squares), rel=1e-4)
    assert report.zeroth_order_decrease is None


def test_the_share_is_that_of_the_updates_squared_norm():
    model, report = a_step(1e-3)
    z = z_of(model, 0)
    squares = [
        sum((ALPHA * slope(model, z) * part).square().sum().item() for part in z),
        sum(((1 - ALPHA) * g).square().sum().item() for g in gradient(model, SHORT)),
    ]
    # ||z|| is sqrt(d) to 1 / sqrt(2 d), and d is 91.
    assert report.zeroth_order_share == pytest.approx(squares[0] / sum(squares), abs=0.1)


def test_over_directions_the_mean_is_that_of_the_gradients_square():
    """E (g0)**2 = ||grad||**2, with a standard deviation of sqrt(2) of it."""
    model = Small()
    optimizer = addax_ds.Addax(model.parameters(), lr=1e-20, alpha=1.0, seed=SEED)
    addax_ds.attach(optimizer, model)
    found = []
    for _ in range(100):
        optimizer.measure(lambda: model(LONG), None)
        optimizer.step()
        found.append(optimizer.report.zeroth_order_decrease / 1e-20)
    square = sum(g.square().sum().item() for g in gradient(model.double(), LONG))
    assert sum(found) / 100 == pytest.approx(square, rel=3 * math.sqrt(2 / 100))


def test_a_part_that_is_left_out_lowers_nothing():
    model = Small()
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, alpha=ALPHA, seed=SEED)
    optimizer.track_norm = True
    addax_ds.attach(optimizer, model)
    optimizer.measure(lambda: model(LONG) * math.nan, lambda: model(SHORT)).backward()
    optimizer.step()
    assert optimizer.report.zeroth_order_decrease == 0.0
    assert optimizer.report.first_order_decrease > 0.0
