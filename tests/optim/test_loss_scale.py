import pytest

from addax_ds import UserError
from addax_ds.optim.loss_scale import UNSCALED, LossScale


def test_it_halves_at_an_overflow_and_doubles_after_clean_steps():
    scale = LossScale(8.0, growth_interval=3, minimum=2.0)
    overflows = [False, False, True, False, False, False, False, True, True, True]
    values = []
    for overflow in overflows:
        values.append(scale.value)
        scale = scale.after(overflow)
    assert values == [8, 8, 8, 4, 4, 4, 8, 8, 4, 2]
    assert scale.value == 2.0
    assert not scale.can_shrink


def test_a_fixed_scale_stays():
    assert LossScale(4.0, growth_interval=0).after(True) == LossScale(4.0, growth_interval=0)
    assert UNSCALED.after(True) is UNSCALED
    assert not UNSCALED.can_shrink


def test_it_never_becomes_infinite():
    scale = LossScale(2.0**126, growth_interval=1)
    assert scale.after(False).value == 2.0**126


@pytest.mark.parametrize(
    "values",
    [{"value": 0.5}, {"value": float("inf")}, {"value": float("nan")}, {"growth_interval": -1}],
)
def test_values_out_of_range(values):
    with pytest.raises(UserError, match="loss scale"):
        LossScale(**values)


def test_a_resume_goes_on_under_the_rules_of_this_run():
    saved = LossScale(4.0, growth_interval=1000, minimum=1.0, clean_steps=30)
    shorter = LossScale(2.0**16, growth_interval=20, minimum=8.0).resumed(saved)
    assert shorter == LossScale(8.0, growth_interval=20, minimum=8.0, clean_steps=30)
    assert shorter.after(False).value == 16.0
    fixed = LossScale(2.0, growth_interval=0)
    assert fixed.resumed(saved) == fixed
    assert LossScale().resumed(fixed) == LossScale()
