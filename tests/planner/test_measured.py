"""What the planner says against live tensors of real steps, by category."""

import json

import pytest

from benchmarks.plan import worst
from tests.support.ranks import run_ranks
from tests.workers.planner_cases import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("planner")
    found = []
    for ranks in CASES:
        run_ranks("planner_cases", ranks, folder)
        found += json.loads((folder / f"plan-{ranks}.json").read_text())
    return found


@pytest.mark.parametrize("place", ["total", "host"])
def test_totals_are_within_ten_percent(results, place):
    assert len(results) == sum(map(len, CASES.values()))
    for result in results:
        size = result[place]
        assert size["planned"] == pytest.approx(size["measured"], rel=0.1), result["case"]


def test_shards_lie_in_host_memory_if_they_are_offloaded(results):
    """Where they are, "weights" would be zero on both sides, and "host" elsewhere."""
    for result in results:
        case = result["case"]
        offloaded = case["cpu_offload"] or "offload_param" in case["zero_optimization"]
        assert (result["host"]["measured"] > 0) == offloaded
        assert ("weights" in result["categories"]) != offloaded
    assert any(result["host"]["measured"] for result in results)


def test_categories_are_within_fifteen_percent(results):
    for result in results:
        name, off = worst(result)
        assert abs(off) <= 0.15, (name, result["categories"], result["case"])


def test_every_category_is_measured(results):
    """Each is a tenth of the total in some case, so that no comparison is of zeros."""
    large = {
        name
        for result in results
        for name, sizes in result["categories"].items()
        if sizes["measured"] > result["total"]["measured"] / 10
    }
    assert large >= {
        *("weights", "gathered", "buckets", "gradients"),
        *("optimizer", "activations", "logits"),
    }
