"""Under ZeRO-3 the stored weights never drift, and the passes do see the perturbed ones."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.rank_group import ranks_by_size
from tests.workers.zero3_passes import CASES, EPS

pytestmark = pytest.mark.slow

WORLD_SIZES = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    """Outcome of a case on each rank, by world size."""
    with ranks_by_size("zero3_passes", WORLD_SIZES, CASES, tmp_path_factory.mktemp) as found:
        yield found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_passes(results, name, world_size):
    ranks = results[world_size][name]
    for found in ranks:
        assert found["unchanged"] == [True] * 3  # also after the closure raised
        assert found["raised"]
        assert found["training"]
        assert found["seen"] == found["explicit"]
        assert found["clean"][0] == found["clean"][1]
        assert found["moved"]
    assert len({tuple(found["g0"]) for found in ranks}) == 1
    for step, g0 in enumerate(ranks[0]["g0"]):
        plus, minus = (sum(f["seen"][step][k] for f in ranks) / world_size for k in (0, 1))
        assert plus != minus
        assert g0 == pytest.approx((plus - minus) / (2 * EPS), rel=1e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CASES)
def test_perturbed_copies_live_as_long_as_their_gather(results, name, world_size):
    """While modules run, there may be a prefetched one in flight, and one that gloo lets go of."""
    for found in results[world_size][name]:
        made, in_modules, left = found["copies"]
        assert made > 0
        assert in_modules <= 3 * found["largest"] < found["stored"]
        assert left == 0
