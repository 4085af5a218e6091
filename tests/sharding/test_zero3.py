"""Addax inside DeepSpeed ZeRO-3, 1 and 2 ranks, against the float64 loop and against each other."""

import pytest
import torch

from tests.support.cases import CASES, STEPS
from tests.support.ranks import run_ranks
from tests.support.reference import distance, norm

WORLD_SIZES = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    """Outcome of every case, by world size."""
    outcome = {}
    for world_size in WORLD_SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        log = run_ranks("zero3_cases", world_size, folder)
        outcome[world_size] = {
            "log": log,
            **{
                n: [torch.load(folder / f"{n}-rank{r}.pt") for r in range(world_size)]
                for n in CASES
            },
        }
    return outcome


def weights(result: dict, names) -> dict:
    return {n: result["weights"][n] for n in names}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_the_float64_loop(results, float64_results, name, world_size):
    reference = float64_results[name]
    moved = distance(reference["start"], reference["end"])
    assert moved >= 3e-3 * norm(reference["start"])
    for result in results[world_size][name]:
        end = weights(result, reference["end"])
        assert distance(end, reference["end"]) <= 5e-4 * moved
        assert result["g0"] == pytest.approx(reference["g0"], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_on_every_g0_to_the_bit(results, name):
    first, second = results[2][name]
    assert first["g0"] == second["g0"]


@pytest.mark.parametrize("name", CASES)
def test_world_sizes_agree_to_fp32_rounding(results, name):
    one, two = results[1][name][0], results[2][name][0]
    assert one["g0"] == pytest.approx(two["g0"], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("name", ["frozen", "frozen-persistence-0"])
def test_frozen_parameters_do_not_move(results, name):
    start = CASES[name].build()
    frozen = {n for n, p in start.named_parameters() if not p.requires_grad}
    assert frozen
    for world_size in WORLD_SIZES:
        end = results[world_size][name][0]["weights"]
        for n, p in start.named_parameters():
            assert torch.equal(p, end[n]) == (n in frozen), n


@pytest.mark.parametrize(("name", "forwards"), [("tied", 3), ("ip-sgd", 1), ("mezo", 2)])
def test_number_of_passes(results, name, forwards):
    for world_size in WORLD_SIZES:
        assert results[world_size][name][0]["forwards"] == forwards * STEPS


def test_prefetching_keeps_its_trace_after_the_first_step(results):
    for world_size in WORLD_SIZES:
        by_case = results[world_size]["log"].split("case ")[1:]
        assert len(by_case) == len(CASES)
        for log in by_case:
            after_the_first = log.split("step 1\n")[1]
            assert "Invalidate trace cache" not in after_the_first, log.splitlines()[0]
