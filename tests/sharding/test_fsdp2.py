"""Addax on FSDP2: what passes see, the float64 loop, order of collectives, live gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.cases import CASES
from tests.support.rank_group import Lazy, ranks_by_size
from tests.support.reference import distance, norm
from tests.workers import fsdp2_passes, fsdp2_steps
from tests.workers.fsdp2_passes import AGAINST_UNINTERRUPTED, H

pytestmark = pytest.mark.slow

PASSES = dict.fromkeys(fsdp2_passes.CASES, 2) | dict.fromkeys(fsdp2_passes.HYBRID, 4)
"""Number of ranks, by case."""
TEN_STEPS = [name for names in fsdp2_steps.CASES_BY_LAYOUT.values() for name in names]


@pytest.fixture(scope="module")
def passes(tmp_path_factory) -> Iterator[Any]:
    with ranks_by_size("fsdp2_passes", (2, 4), PASSES, tmp_path_factory.mktemp) as found:
        yield Lazy(PASSES, lambda name: found[PASSES[name]][name])


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Iterator[Any]:
    names = ("order", "others", "memory", *TEN_STEPS, *fsdp2_steps.SHARDED_BY_HAND)
    with ranks_by_size("fsdp2_steps", (2,), names, tmp_path_factory.mktemp) as found:
        yield found[2]


@pytest.mark.parametrize("name", PASSES)
def test_passes_see_perturbed_weights_and_the_shards_stay(passes, name):
    ranks = passes[name]
    for found in ranks:
        assert found["seen"] == found["plain"]
        assert found["unchanged"] == [True] * 2  # also after a pass that raised
        assert found["raised"] == [True] * 2
        assert all(sharded == plain for sharded, plain in found["clean"])
        assert found["training"]
    assert len({tuple(found["g0"]) for found in ranks}) == 1
    for step, g0 in enumerate(ranks[0]["g0"]):
        plus, minus = (sum(f["seen"][step][k] for f in ranks) / len(ranks) for k in (0, 1))
        assert plus != minus
        assert g0 == pytest.approx((plus - minus) / (2 * H.zo_eps), rel=1e-6)


@pytest.mark.parametrize("name", PASSES)
def test_steps_move_every_trainable_weight_alike_on_all_ranks(passes, name):
    first, *others = passes[name]
    frozen = {"embed_positions.weight", "layers.1.fc1.weight", "layers.1.self_attn.k_proj.bias"}
    expected = {f"model.decoder.{n}" for n in frozen} if name == "frozen" else set()
    if name in ("unused", "four-shards"):  # no pass reads them, and H has no weight decay
        expected = {"unused.weight", "unused.bias"}
    assert first["end"].keys() - first["moved"] == expected
    for other in others:
        assert all(torch.equal(other["end"][n], weight) for n, weight in first["end"].items())


@pytest.mark.parametrize("name", AGAINST_UNINTERRUPTED)
def test_a_pass_that_raised_leaves_no_trace_in_the_training(passes, name):
    for found in passes[name]:
        wanted = found["uninterrupted_end"]
        assert all(torch.equal(weight, wanted[n]) for n, weight in found["end"].items())


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, name) for name in TEN_STEPS]
    + [(name, "untied") for name in fsdp2_steps.SHARDED_BY_HAND],
)
def test_ten_steps_equal_the_float64_loop(steps, float64_results, name, case):
    reference = float64_results[case]
    moved = distance(reference["start"], reference["end"])
    assert moved >= 3e-3 * norm(reference["start"])
    for found in steps[name]:
        end = {n: found["weights"][n] for n in reference["end"]}
        assert distance(end, reference["end"]) <= 5e-4 * moved
        assert found["g0"] == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)


def test_frozen_parameters_do_not_move(steps):
    end = steps["frozen"][0]["weights"]
    for name, start in CASES["frozen"].build().named_parameters():
        assert torch.equal(start, end[name]) != start.requires_grad, name


def test_passes_leave_gradients_and_the_order_of_collectives_as_they_are(steps):
    for rank in steps["order"]:
        without, with_passes = rank[0.0], rank[0.001]
        assert with_passes["first_order"] == without["first_order"]
        for found in (without, with_passes):
            plain = found["plain_gradients"]
            assert distance(found["gradients"], plain) <= 1e-5 * norm(plain)


def test_clipping_leaves_the_gradients_of_another_optimizer_alone(steps):
    for rank in steps["others"]:
        unclipped, clipped = rank[0.0], rank[1e9]  # a norm that clips nothing
        assert unclipped.keys() == clipped.keys() != set()
        for name, gradient in unclipped.items():
            torch.testing.assert_close(clipped[name], gradient, rtol=1e-6, atol=1e-9)


def test_a_pass_gathers_each_layer_once_and_a_step_reduces_one_scalar_pair(steps):
    for rank in steps["order"]:
        operations = [name for name, _ in rank[0.001]["passes"]]
        groups = 3 + 1  # decoder layers, and the rest with the root
        assert operations == 2 * groups * ["_allgather_base_"] + ["allreduce_"]
        assert rank[0.001]["passes"][-1][1] == 3 * 8  # two losses in fp64, and what was not read
        assert rank[0.0]["passes"] == []


def test_live_sharded_gradients_at_the_peak_are_one_layer_not_the_model(steps):
    for rank in steps["memory"]:
        plain, addax = rank[False], rank[True]
        assert plain["peak"] == sum(plain["groups"])
        assert addax["peak"] == max(addax["groups"])
        # torch's tracker looks before and after each layer's backward: nothing is left by then
        assert plain["tracked"]["Sharded Grad"] == sum(plain["groups"])
        assert addax["tracked"]["Sharded Grad"] == 0
        assert addax["tracked"]["Total"] < plain["tracked"]["Total"]
