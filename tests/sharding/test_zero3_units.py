"""ZeRO-3 gathers decoder layers as one, however a model calls them, and lets go of them."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from addax_ds.sharding.modules import is_uniform
from tests.support.rank_group import ranks_by_size
from tests.workers.zero3_units import CASES, PREFETCHED, REFUSED

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    with ranks_by_size(
        "zero3_units", (2,), (*CASES, *PREFETCHED, REFUSED), tmp_path_factory.mktemp
    ) as found:
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


@pytest.mark.parametrize("name", PREFETCHED)
def test_what_a_module_needs_is_on_its_way(results, name):
    """By then DeepSpeed knows the order; what stays gathered leaves room for the next layer."""
    for found in results[name]:
        assert found["asked"] < 0.1 * found["elements"]


@pytest.mark.parametrize("name", CASES)
def test_a_detached_engine_runs_as_deepspeeds_own(results, name):
    for found in results[name]:
        detached, expected = found["losses"]
        assert detached == pytest.approx(expected, rel=1e-5)


def test_results_that_deepspeed_cannot_follow_are_refused(results):
    for found in results[REFUSED]:
        assert "return a tensor" in found["message"]
        assert "not a Record" in found["message"]


def test_a_layer_with_a_list_inside_is_no_unit():
    """Ranks may run other experts: their gradients would meet in one place of a bucket."""
    plain = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    assert is_uniform(plain)
    assert not is_uniform(nn.ModuleDict({"experts": nn.ModuleList([plain, plain])}))
