"""Accumulation, clipping, fp16 and numbers that are not finite, on every layout."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import addax_ds
from tests.support.cases import float64_outcome
from tests.support.layouts import LAYOUTS, on_layouts
from tests.support.reference import distance, norm
from tests.workers.step_variants import (
    CLIPPING,
    EXACT,
    NARROW,
    POISON_ROW,
    POISONED,
    ROUTED,
    RUNS,
    expert_of,
    global_batches,
)

pytestmark = pytest.mark.slow

POISONS = ("nan", "inf")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    """Outcome of a run, by layout and rank."""
    with on_layouts("step_variants", tmp_path_factory.mktemp, RUNS) as found:
        yield found


@pytest.fixture(scope="module")
def float64_runs() -> dict[str, dict[str, Any]]:
    return {n: float64_outcome(v.case, global_batches(v.steps)) for n, v in EXACT.items()}


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accumulation_and_clipping_equal_the_float64_loop(results, float64_runs, layout, variant):
    reference = float64_runs[variant]
    moved = distance(reference["start"], reference["end"])
    assert moved >= 1e-3 * norm(reference["start"])
    for rank in results[layout]:
        found = rank[variant]
        end = {name: found["weights"][name] for name in reference["end"]}
        assert distance(end, reference["end"]) <= 5e-4 * moved
        g0 = [report["g0"] or 0.0 for report in found["reports"]]
        assert g0 == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)
        assert found["reports"] == results[layout][0][variant]["reports"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reported_norms_are_those_before_and_after_clipping(results, layout):
    for variant in ("clipped", "clipped, accumulated"):
        for report in results[layout][0][variant]["reports"]:
            assert report["gradient_norm"] > 2 * CLIPPING.max_grad_norm
            part = CLIPPING.lr * (1 - CLIPPING.alpha) * CLIPPING.max_grad_norm
            assert report["first_order_norm"] == pytest.approx(part, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_second_forward_has_the_dropout_of_the_first(results, layout):
    for rank in results[layout]:
        with_dropout, without = (
            rank[name]["reports"][0]["first_order_loss"] for name in ("dropout", "accumulated")
        )
        assert with_dropout != pytest.approx(without, rel=1e-4)
        weights = rank["dropout, norm taken"]["weights"]
        assert all(torch.equal(weights[n], w) for n, w in rank["dropout"]["weights"].items())


# ---- parameters that a step does not read -------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_no_rank_reads_in_a_step_gets_no_zeroth_order_part(results, layout):
    ranks = LAYOUTS[layout].world_size
    for rank in results[layout]:
        found = rank["routed", None]
        wanted = {name: weight.clone() for name, weight in found["start"].items()}
        for step, g0 in enumerate(found["g0"]):
            assert g0 != 0.0
            chosen = {f"layers.0.experts.{expert_of(r, step)}." for r in range(ranks)}
            read = [n for n in wanted if n.startswith((*chosen, "borrowed"))]
            for name in read:
                w = wanted[name]
                z = addax_ds.gaussian(ROUTED.seed, step, name, 0, w.numel()).view(w.shape)
                w -= ROUTED.lr * g0 * z
            elements = sum(wanted[name].numel() for name in read)
            norm_of_step = ROUTED.lr * abs(g0) * elements**0.5
            assert found["norms"][step] == pytest.approx(norm_of_step)
        for name, weight in wanted.items():
            torch.testing.assert_close(found["end"][name], weight, rtol=1e-5, atol=1e-6)
        for name in ("layers.0.experts.3.weight", "layers.0.experts.3.bias"):
            assert torch.equal(found["end"][name], found["start"][name])


# ---- numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_poisoned_gradient_leaves_its_elements_and_nothing_else(results, layout, dtype, poison):
    for rank in results[layout]:
        clean, spoilt = rank[dtype, "None"], rank[dtype, poison]
        assert [report["has_nonfinite"] for report in spoilt["reports"]] == [False, True, False]
        before, after = spoilt["weights"][1], spoilt["weights"][2]
        assert torch.equal(after[POISONED][POISON_ROW], before[POISONED][POISON_ROW])
        others = torch.ones(len(after[POISONED]), dtype=torch.bool)
        others[POISON_ROW] = False
        for name, weight in clean["weights"][2].items():
            kept = others if name == POISONED else slice(None)
            assert torch.equal(after[name][kept], weight[kept]), name
        assert all(weight.isfinite().all() for weight in spoilt["weights"][3].values())


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_not_finite_in_an_early_micro_batch_of_one_rank(results, layout, clip):
    for rank in results[layout]:
        found = rank["early NaN", clip]
        assert found["report"]["has_nonfinite"]
        assert found["report"]["first_order_loss"] != found["report"]["first_order_loss"]
        assert all(torch.equal(found["after"][n], w) for n, w in found["before"].items())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("poison", POISONS)
def test_layouts_agree_to_the_bit_also_when_something_is_not_finite(results, dtype, poison):
    wanted = results["unsharded x1"][0][dtype, poison]
    for layout, ranks in results.items():
        for rank in ranks:
            assert rank[dtype, poison]["state"] == wanted["state"], layout
            for name, weight in wanted["weights"][3].items():
                assert torch.equal(rank[dtype, poison]["weights"][3][name], weight), (layout, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_scale_of_fp16_is_halved_once(results, layout):
    for rank in results[layout]:
        scales = [report["loss_scale"] for report in rank["fp16", "inf"]["reports"]]
        assert scales == [256.0, 256.0, 128.0]
        assert rank["fp16", "inf"]["state"]["loss_scale"]["clean_steps"] == 1
        assert rank["fp16", "inf"]["state"]["non_finite_in_a_row"] == 0
        assert {r["loss_scale"] for r in rank["bf16", "inf"]["reports"]} == {1.0}


def test_scaling_leaves_the_update_as_it_is(results):
    """The scale is a power of two: fp16 weights equal those of fp32 up to their own rounding."""
    fp16, fp32 = (results["unsharded x1"][0][d, "None"]["weights"] for d in ("fp16", "fp32"))
    compared = 0
    for name, start in fp16[0].items():
        moved = fp16[3][name].float() - start.float()
        wanted = fp32[3][name] - fp32[0][name]
        tolerance = 2**-9 * start.float().abs().max()
        assert (moved - wanted).abs().max() <= tolerance
        compared += bool(wanted.abs().max() > 3 * tolerance)
    assert compared >= 5
