"""The pure update: arithmetic against float64, rounding, and independence of how it is sliced."""

import math
from dataclasses import replace

import pytest
import torch

import addax_ds
from addax_ds.update import Step, apply_update, perturb

STEP = Step(seed=9, index=3, lr=0.1, alpha=0.25, zo_eps=1e-2, g0=1.5, rounding="nearest")


def random(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gains(count: int, dtype=torch.bfloat16) -> torch.Tensor:
    """Numbers near 1, of which a small perturbation in 16 bits moves few."""
    return (1 + 0.02 * random(count)).to(dtype)


def realised_difference(
    weight: torch.Tensor, parameter_id: int, start: int, step: Step
) -> torch.Tensor:
    """What the two passes saw of z, in float64."""
    plus, minus = (perturb(weight, parameter_id, start, step, sign) for sign in (1, -1))
    return (plus.double() - minus.double()) / (2 * step.zo_eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("zo_eps", [1e-2, 1e-3])
def test_update_is_the_equation_rounded_once(dtype, gradient_dtype, weight_decay, zo_eps):
    step = replace(STEP, weight_decay=weight_decay, zo_eps=zo_eps)
    weight = torch.cat([random(5000, dtype), gains(5000, dtype)])
    gradient = None if gradient_dtype is None else random(10_000, gradient_dtype, seed=1)
    if dtype == torch.float32:
        d = addax_ds.gaussian(9, 3, 77, 123, 10_000).double()
    else:
        d = realised_difference(weight, 77, 123, step)
    g1 = 0 if gradient is None else gradient.double()
    exact = weight.double() * (1 - 0.1 * weight_decay) - 0.1 * (0.25 * 1.5 * d + 0.75 * g1)
    apply_update(weight, gradient, 77, 123, step, decayed=True)
    unit = torch.finfo(dtype).eps
    assert weight.dtype == dtype
    assert ((weight.double() - exact).abs() <= 0.51 * unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_neither_pass_moved_gets_no_zeroth_order_update(rounding):
    step = replace(STEP, alpha=0.9, zo_eps=1e-3, rounding=rounding)
    weight, gradient = gains(10_000), random(10_000, seed=1)
    plus, minus = (perturb(weight, 5, 7, step, sign) for sign in (1, -1))
    unmoved = (plus == weight) & (minus == weight)
    assert 0.5 < unmoved.double().mean() < 0.99  # eps z is mostly below half the spacing at 1

    zeroth = weight.clone()
    apply_update(zeroth, None, 5, 7, step, decayed=False)
    assert torch.equal(zeroth[unmoved], weight[unmoved])
    assert (zeroth[~unmoved] != weight[~unmoved]).double().mean() > 0.99

    both, first = weight.clone(), weight.clone()
    apply_update(both, gradient, 5, 7, step, decayed=False)
    apply_update(first, gradient, 5, 7, replace(step, g0=0.0), decayed=False)
    assert torch.equal(both[unmoved], first[unmoved])
    assert (both[~unmoved] != first[~unmoved]).double().mean() > 0.9


def test_weight_decay_spares_undecayed_parameters():
    weight = torch.ones(10)
    apply_update(weight, None, 1, 0, replace(STEP, weight_decay=0.5, alpha=0.0), decayed=False)
    assert torch.equal(weight, torch.ones(10))


def test_alpha_1_ignores_a_gradient_even_if_it_is_infinite():
    one, two = random(100), random(100)
    step = replace(STEP, alpha=1.0)
    apply_update(one, torch.full((100,), math.inf), 1, 0, step, decayed=True)
    apply_update(two, None, 1, 0, step, decayed=True)
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturb_adds_z_and_leaves_the_weight(dtype):
    weight = random(1000, dtype)
    before = weight.clone()
    for sign in (1, -1):
        z = addax_ds.gaussian(9, 3, 5, 7, 1000)
        expected = (weight.float() + sign * torch.tensor(1e-2) * z).to(dtype)
        assert torch.equal(perturb(weight, 5, 7, STEP, sign), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slicing_does_not_change_a_bit(rounding, dtype):
    step = replace(STEP, rounding=rounding)
    whole, gradient = random(300_000, dtype), random(300_000, seed=1)
    parts = whole.clone()
    apply_update(whole, gradient, 5, 1000, step, decayed=True)
    for low, high in ((0, 1), (1, 137), (137, 131_200), (131_200, 300_000)):
        apply_update(parts[low:high], gradient[low:high], 5, 1000 + low, step, decayed=True)
    assert torch.equal(whole, parts)


def test_stochastic_rounding_applies_tiny_updates_and_nearest_loses_them():
    """1,000 steps of a constant update of 1/100 of the weights' spacing."""
    start = torch.full((20_000,), 1.0, dtype=torch.bfloat16)
    gradient = torch.ones(20_000)
    lr = torch.finfo(torch.bfloat16).eps / 2 / 100  # spacing below 1.0
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weight = start.clone()
        for index in range(1000):
            step = Step(1, index, lr, alpha=0.0, zo_eps=1e-3, rounding=rounding)
            apply_update(weight, gradient, 5, 0, step, decayed=True)
        moved[rounding] = (start.double() - weight.double()).mean().item() / (1000 * lr)
    assert 0.97 <= moved["stochastic"] <= 1.03
    assert moved["nearest"] == 0.0


def test_stochastic_rounding_is_unbiased_on_both_signs_and_exact_values_stay():
    value = torch.tensor([1 + 1 / 512, -1 - 1 / 512, 3e-5 * (1 + 1 / 300)]).repeat_interleave(
        40_000
    )
    weight = torch.zeros(120_000, dtype=torch.bfloat16)
    step = Step(1, 0, lr=1.0, alpha=0.0, zo_eps=1e-3)
    apply_update(weight, -value, 5, 0, step, decayed=False)
    for exact, rounded in zip(value.view(3, -1).double(), weight.view(3, -1).double(), strict=True):
        spacing = 2.0 ** (math.floor(math.log2(abs(exact[0].item()))) - 7)
        error = (rounded.mean() - exact[0]).abs().item()
        assert error < 5 * spacing / 2 / math.sqrt(40_000)
        assert len(rounded.unique()) == 2
    exact = random(1000, torch.bfloat16)
    kept = exact.clone()
    apply_update(kept, torch.zeros(1000), 5, 0, step, decayed=False)
    assert torch.equal(kept, exact)


def test_non_finite_values_are_not_rounded_into_numbers():
    gradient = torch.tensor([math.nan, math.inf, -math.inf])
    weight = torch.ones(3, dtype=torch.bfloat16)
    apply_update(weight, gradient, 5, 0, Step(1, 0, 1.0, 0.0, 1e-3), decayed=False)
    assert weight[0].isnan()
    assert weight[1:].tolist() == [-math.inf, math.inf]
