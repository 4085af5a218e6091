"""On GPUs streams run beside each other: whatever reads or writes a shard is ordered by waits."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from addax_ds.sharding.modules import blocks
from tests.support.models import tiny_opt
from tests.support.rank_group import ranks_by_size
from tests.workers.stream_order import CASES

pytestmark = pytest.mark.slow

CONTROLS = [name for name, case in CASES.items() if case.drop]
ORDERED = [name for name in CASES if name not in CONTROLS]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[Mapping[str, list[dict[str, Any]]]]:
    with ranks_by_size("stream_order", [2], CASES, tmp_path_factory.mktemp) as results:
        yield results[2]


@pytest.mark.parametrize("name", ORDERED)
def test_every_access_of_a_shard_is_ordered(found, name):
    for of_rank in found[name]:
        assert not of_rank["races"]
        kinds = {what.split(" on ")[0] for what in of_rank["accesses"]}
        assert {"perturbation", "update"} <= kinds


@pytest.mark.parametrize("name", ORDERED)
def test_the_host_waits_for_the_losses_of_all_passes_at_once(found, name):
    """And once for what no rank has read, which this model has; once more for the report."""
    expected = {"_agree": 1, "_agree_on_unread": 1}
    if CASES[name].max_grad_norm:
        expected["clip"] = 1
    for of_rank in found[name]:
        own = {part: {**waits} for part, waits in of_rank["waits"].items()}
        for waits in own.values():
            waits.pop("engine", None)
            if CASES[name].offloaded:  # for each unit's gradient, which comes to its shards
                waits.pop("apply_update", None)
        at_the_end = {} if "clip" not in expected else {"clip": 1}
        assert own["measure"] | at_the_end == expected
        assert own["step"] == {**expected, "finish": 1}


def test_gathers_of_perturbed_passes_begin_a_block_ahead_of_compute(found):
    """What they gather would else be in memory at once: a block's is free once it has computed."""
    modules = sum(1 for _ in next(blocks(tiny_opt())).modules())
    bounded, free = found["ZeRO-3, MeZO, small buckets"], found["ZeRO-3 without a wait"]
    for of_rank, control in zip(bounded, free, strict=True):
        assert modules <= of_rank["lead"] < 2 * modules
        assert control["lead"] > 50


@pytest.mark.parametrize("name", CONTROLS)
def test_a_wait_that_is_missing_is_found(found, name):
    for of_rank in found[name]:
        assert sum(of_rank["races"].values()) > 20, of_rank["races"]
