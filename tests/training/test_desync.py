"""Ranks that come apart are found, and named, on all of them."""

import json

import pytest

from tests.support.layouts import LAYOUTS
from tests.support.ranks import run_ranks
from tests.workers.desync import PARAMETER

PAIRS = [name for name, layout in LAYOUTS.items() if layout.world_size == 2]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("desync")
    run_ranks("desync", 2, folder)
    first, second = (json.loads((folder / f"desync-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


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
