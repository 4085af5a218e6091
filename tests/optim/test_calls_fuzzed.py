"""The public API called in random orders: the float64 loop, or a sentence, on any back end."""

from collections.abc import Iterator
from functools import cache
from itertools import cycle
from typing import Any

import pytest

from tests.support.cases import trainable
from tests.support.fuzz import examples
from tests.support.layouts import on_layouts
from tests.support.reference import distance, float64_loop
from tests.workers.call_sequences import METHODS, batches, build, calls, is_legal

pytestmark = pytest.mark.slow

LAYOUTS = ("unsharded x1", "ZeRO-3 x2", "FSDP2 x2")
WALKS = list(zip(cycle(METHODS), range(examples(24)), strict=False))
TORCHS_OWN = (
    "Trying to backward through the graph a second time",
    # FSDP2 keeps the buffers of its first forward, which inference mode made for itself alone.
    "Inplace update to inference tensor",
    "Setting requires_grad=True on inference tensor",  # gathered by ZeRO-3 in inference mode
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[Any]:
    with on_layouts("call_sequences", tmp_path_factory.mktemp, WALKS, LAYOUTS) as found:
        yield found


@cache
def float64_outcome(method: str, steps: int) -> tuple[dict, dict]:
    model = build().eval()
    start = trainable(model)
    float64_loop(model, batches()[:steps], METHODS[method])
    return start, trainable(model)


@pytest.mark.parametrize("walk", WALKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_walk_ends_like_the_float64_loop_or_with_a_sentence(results, layout, walk):
    for found in results[layout]:
        ending = found[walk]
        error = ending["error"]
        if error is not None:
            assert not is_legal(calls(walk[1])) or error["said"].startswith(TORCHS_OWN), ending
            assert error["said"] == results[layout][0][walk]["error"]["said"]
            assert len(error["said"]) > 20
            if not error["said"].startswith(TORCHS_OWN):
                assert "/addax_ds/" in error["where"], ending
                assert error["type"] in ("RuntimeError", "UserError"), ending
            continue
        start, end = float64_outcome(walk[0], ending["finished"])
        moved = distance(start, end)
        assert distance(ending["weights"], end) <= 5e-4 * moved, ending["calls"]


def test_walks_end_in_both_ways(results):
    endings = [results["unsharded x1"][0][walk]["error"] for walk in WALKS]
    assert 0.2 < sum(ending is None for ending in endings) / len(endings) < 0.9
