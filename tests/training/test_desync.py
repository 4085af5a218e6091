"""Ranks that come apart are found, and named, on all of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.layouts import LAYOUTS, on_layouts
from tests.support.rank_group import Lazy
from tests.workers.desync import CASES, PARAMETER

pytestmark = pytest.mark.slow

PAIRS = [name for name, layout in LAYOUTS.items() if layout.world_size == 2]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Iterator[Any]:
    """What both ranks are told in a case, by layout."""
    with on_layouts("desync", tmp_path_factory.mktemp, CASES, PAIRS) as found:

        def of_case(layout: str, name: str) -> str | None:
            first, second = (rank[name] for rank in found[layout])
            assert first == second
            return first

        yield Lazy(PAIRS, lambda layout: Lazy(CASES, lambda name: of_case(layout, name)))


@pytest.mark.parametrize("layout", PAIRS)
def test_nothing_is_said_of_ranks_that_agree(said, layout):
    assert said[layout]["nothing 2"] is None


@pytest.mark.parametrize("layout", PAIRS)
def test_a_weight_written_between_two_steps(said, layout):
    message = said[layout]["one_weight_of_one_rank 2"]
    assert message.startswith("2: the weights changed between steps 1 and 2: rank 1: " + PARAMETER)
    assert "Go on from a checkpoint" in message


def test_replicas_that_differ(said):
    """Unnoticed when it happens; the next comparison finds it."""
    message = said["unsharded x2"]["one_weight_of_one_rank 3"]
    assert message.startswith("3: after step 3 rank 1 has other weights than rank 0, in ")


@pytest.mark.parametrize("layout", PAIRS)
def test_a_step_with_other_values(said, layout):
    for step in (2, 3):
        message = said[layout][f"learning_rate_of_one_rank {step}"]
        assert message.startswith("3: ")
        assert "took step 3 with different values" in message or "has other weights" in message
