"""Addax inside DeepSpeed ZeRO-3, 1 and 2 ranks, against the float64 loop and against each other."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.support.cases import CASES, STEPS
from tests.support.rank_group import Lazy, RankGroup
from tests.support.reference import distance, norm

pytestmark = pytest.mark.slow

WORLD_SIZES = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    """Outcome of a case on each rank, and what was said meanwhile, by world size."""
    with ExitStack() as stack:

        def of_size(world_size: int) -> Lazy[str, list[dict]]:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            group = RankGroup("zero3_cases", world_size, folder)
            stack.callback(group.close)

            def of_case(name: str) -> list[dict]:
                return [{**found, "output": group.output} for found in group.call("run_case", name)]

            return Lazy(CASES, of_case)

        yield Lazy(WORLD_SIZES, of_size)


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


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", ["frozen", "frozen-persistence-0"])
def test_frozen_parameters_do_not_move(results, name, world_size):
    start = CASES[name].build()
    frozen = {n for n, p in start.named_parameters() if not p.requires_grad}
    assert frozen
    end = results[world_size][name][0]["weights"]
    for n, p in start.named_parameters():
        assert torch.equal(p, end[n]) == (n in frozen), n


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "forwards"), [("tied", 3), ("ip-sgd", 1), ("mezo", 2)])
def test_number_of_passes(results, name, forwards, world_size):
    assert results[world_size][name][0]["forwards"] == forwards * STEPS


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_prefetching_keeps_its_trace_after_the_first_step(results, name, world_size):
    after_the_first = results[world_size][name][0]["output"].split("step 1\n")[1]
    assert "Invalidate trace cache" not in after_the_first
