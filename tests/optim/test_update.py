"""The pure update: arithmetic against float64, rounding, and independence of how it is sliced."""

import math
from dataclasses import replace

import pytest
import torch

import addax_ds
from addax_ds.optim.update import Step
from tests.support.slices import apply_update, perturb

NARROW = [torch.bfloat16, torch.float16]
STEP = Step(
    seed=9, index=3, lr=0.1, alpha=0.25, zo_eps=1e-2, coefficients=(1.5,), rounding="nearest"
)


def random(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gains(count: int, dtype=torch.bfloat16) -> torch.Tensor:
    """Numbers near 1, of which a small perturbation in 16 bits moves few."""
    return (1 + 0.02 * random(count)).to(dtype)


def realised_difference(
    weight: torch.Tensor, parameter_id: int, start: int, step: Step, probe: int
) -> torch.Tensor:
    """What the two passes saw of a z, in float64."""
    plus, minus = (perturb(weight, parameter_id, start, step, sign, probe) for sign in (1, -1))
    return (plus.double() - minus.double()) / (2 * step.zo_eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("zo_eps", [1e-2, 1e-3])
@pytest.mark.parametrize("coefficients", [(1.5,), (1.5, -0.5), (0.25, -1.0, 0.0, 0.75)])
def test_update_is_the_equation_rounded_once(
    dtype, gradient_dtype, weight_decay, zo_eps, coefficients
):
    step = replace(STEP, weight_decay=weight_decay, zo_eps=zo_eps, coefficients=coefficients)
    weight = torch.cat([random(5000, dtype), gains(5000, dtype)])
    gradient = None if gradient_dtype is None else random(10_000, gradient_dtype, seed=1)
    zeroth = torch.zeros(10_000, dtype=torch.float64)
    for probe, coefficient in enumerate(coefficients):
        if dtype == torch.float32:
            d = addax_ds.gaussian(9, 3, 77, 123, 10_000, probe=probe).double()
        else:
            d = realised_difference(weight, 77, 123, step, probe)
        zeroth += coefficient * d
    g1 = 0 if gradient is None else gradient.double()
    exact = weight.double() * (1 - 0.1 * weight_decay) - 0.1 * (0.25 * zeroth + 0.75 * g1)
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
    apply_update(first, gradient, 5, 7, replace(step, coefficients=(0.0,)), decayed=False)
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
    for probe in (0, 3):
        z = addax_ds.gaussian(9, 3, 5, 7, 1000, probe=probe)
        for sign in (1, 0, -1):
            expected = (weight.float() + sign * torch.tensor(1e-2) * z).to(dtype)
            assert torch.equal(perturb(weight, 5, 7, STEP, sign, probe), expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slicing_does_not_change_a_bit(rounding, dtype):
    step = replace(STEP, rounding=rounding, coefficients=(1.5, -0.5))
    whole, gradient = random(300_000, dtype), random(300_000, seed=1)
    parts = whole.clone()
    apply_update(whole, gradient, 5, 1000, step, decayed=True)
    for low, high in ((0, 1), (1, 137), (137, 131_200), (131_200, 300_000)):
        apply_update(parts[low:high], gradient[low:high], 5, 1000 + low, step, decayed=True)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_applies_tiny_updates_and_nearest_loses_them(dtype):
    """1,000 steps of a constant update of 1/100 of the weights' spacing."""
    start = torch.full((20_000,), 1.0, dtype=dtype)
    gradient = torch.ones(20_000)
    lr = torch.finfo(dtype).eps / 2 / 100  # spacing below 1.0
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weight = start.clone()
        for index in range(1000):
            step = Step(1, index, lr, alpha=0.0, zo_eps=1e-3, rounding=rounding)
            apply_update(weight, gradient, 5, 0, step, decayed=True)
        moved[rounding] = (start.double() - weight.double()).mean().item() / (1000 * lr)
    assert 0.97 <= moved["stochastic"] <= 1.03
    assert moved["nearest"] == 0.0


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_is_unbiased(dtype):
    """On both signs, and around fp16's smallest normal number, 2**-14, and below."""
    normal = 2.0**-14
    edge = (-1.0001 * normal, normal - 2.0**-27, -(2.0**-23) - 2.0**-27, 2.0**-27)
    value = torch.tensor((1 + 1 / 3000, -1 - 1 / 300, 3e-5 * (1 + 1 / 300), *edge))
    count = 40_000
    weight = torch.zeros(len(value) * count, dtype=dtype)
    step = Step(1, 0, lr=1.0, alpha=0.0, zo_eps=1e-3)
    apply_update(weight, -value.repeat_interleave(count), 5, 0, step, decayed=False)
    info = torch.finfo(dtype)
    for exact, rounded in zip(value.tolist(), weight.view(-1, count).double(), strict=True):
        exponent = max(math.floor(math.log2(abs(exact))), math.log2(info.tiny))
        spacing = info.eps * 2**exponent
        below = math.floor(exact / spacing)
        fraction = exact / spacing - below
        if fraction == 0:
            assert (rounded == exact).all()
            continue
        assert rounded.unique().tolist() == [below * spacing, (below + 1) * spacing]
        deviation = spacing * math.sqrt(fraction * (1 - fraction) / count)
        assert abs(rounded.mean().item() - exact) < 5 * deviation


@pytest.mark.parametrize("dtype", NARROW)
def test_stochastic_rounding_never_moves_what_the_type_can_hold(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[every.isfinite()]
    weight = torch.ones_like(numbers)
    step = Step(1, 0, lr=1.0, alpha=0.0, zo_eps=1e-3, weight_decay=1.0)
    apply_update(weight, -numbers.float(), 5, 0, step, decayed=True)  # 1 * 0 + number
    assert torch.equal(weight, numbers)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_no_update_makes_a_weight_nan_or_infinite(dtype, rounding):
    largest = torch.finfo(dtype).max
    before = torch.tensor([1.0, 1.0, -1.0, largest, 1.0], dtype=dtype)
    gradient = torch.tensor([math.nan, math.inf, -math.inf, -largest, 0.5])
    step = Step(1, 0, lr=1.0, alpha=0.0, zo_eps=1e-3, rounding=rounding)
    weight, kept = before.clone(), torch.zeros(1, dtype=torch.int32)
    apply_update(weight, gradient, 5, 0, step, decayed=False, kept=kept)
    assert torch.equal(weight[:4], before[:4])
    assert weight[4] == 0.5
    assert kept.item() == 1

    for bad in (math.nan, math.inf):
        weight, kept = before.clone(), torch.zeros(1, dtype=torch.int32)
        spoilt = replace(step, alpha=0.5, coefficients=(bad,))
        apply_update(weight, None, 5, 0, spoilt, decayed=False, kept=kept)
        assert torch.equal(weight, before)
        assert kept.item() == 1

    kept = torch.zeros(1, dtype=torch.int32)
    apply_update(weight, gradient[4:].repeat(5), 5, 0, step, decayed=False, kept=kept)
    assert kept.item() == 0


def test_a_weight_that_a_perturbation_would_overflow_is_seen_as_it_is():
    weight = torch.full((1000,), torch.finfo(torch.float16).max, dtype=torch.float16)
    step = replace(STEP, zo_eps=100.0)
    plus, minus = (perturb(weight, 5, 7, step, sign) for sign in (1, -1))
    for seen in (plus, minus):
        assert 0.3 < (seen < weight).double().mean() < 0.6
        assert (seen <= weight).all()
