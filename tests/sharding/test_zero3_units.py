"""ZeRO-3 gathers decoder layers as one, however a model calls them, and lets go of them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.rank_group import ranks_by_size
from tests.workers.zero3_units import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    with ranks_by_size("zero3_units", (2,), CASES, tmp_path_factory.mktemp) as found:
        yield found[2]


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_whole_model(results, name):
    for found in results[name]:
        assert max(found["errors"].values()) < 1e-6
        assert found["moved"] == found["trained"]


@pytest.mark.parametrize("name", CASES)
def test_few_layers_are_whole_at_a_time(results, name):
    """One that has computed backward, one that does, one that comes next."""
    for found in results[name]:
        assert 0 < found["layers"] <= 3
        assert found["left"] == 0
