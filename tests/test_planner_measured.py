"""What the planner says against live tensors of real steps on two ranks, by category."""

import json

import pytest

from benchmarks.plan import worst
from tests.ranks import run_ranks
from tests.workers.planner_cases import CASES

RANKS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("planner")
    run_ranks("planner_cases", RANKS, folder)
    return json.loads((folder / "plan.json").read_text())


def test_totals_are_within_ten_percent(results):
    assert len(results) == len(CASES)
    for result in results:
        total = result["total"]
        assert total["planned"] == pytest.approx(total["measured"], rel=0.1), result["case"]


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
