"""What a step communicates under ZeRO-3: four gathers, one reduce-scatter, 24 bytes of losses.

Beside them 8 bytes that count unread parameters, and 24 at its end: whether something was not
finite, whether to stop, and a norm.
"""

import json

import pytest

from tests.support.ranks import run_ranks
from tests.workers.zero3_collectives import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("collectives")
    run_ranks("zero3_collectives", 2, folder)
    ranks = [json.loads((folder / f"collectives-{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    return ranks[0]


def calls(case: dict, part: str, kind: str) -> list[int]:
    """Bytes of each collective of a kind in a part of the step."""
    return [size for name, size in case["parts"][part] if kind in name]


@pytest.mark.parametrize("name", CASES)
def test_bytes(measured, name):
    case = measured[name]
    model = case["model_bytes"]
    assert sum(calls(case, "zeroth_order", "allgather")) == 2 * model
    forward, backward = (sum(calls(case, part, "allgather")) for part in ("forward", "backward"))
    early = forward - model  # for the backward, at the end of a forward, where there is room
    assert early >= 0 if name == "by block" else early == 0
    assert 0 < early + backward <= model
    assert sum(calls(case, "backward", "reduce_scatter")) == model
    names = {name for part in case["parts"].values() for name, _ in part}
    assert names == {"_allgather_base_", "_reduce_scatter_base_", "allreduce_"}
    assert case["parts"]["agree"] == [["allreduce_", 32]]
    assert case["parts"]["step"] == [["allreduce_", 24]]
    others = case["parts"].keys() - {"agree", "step"}
    assert not any(calls(case, part, "allreduce") for part in others)


def test_a_block_travels_as_a_whole(measured):
    """If it may be live as a whole: then as often as there are blocks, and modules outside."""
    case, limited = measured["by block"], measured["persistence-0"]
    units = case["blocks"] + case["outside"] + 1  # and the persistent ones
    for part, passes in (("zeroth_order", 2), ("forward", 1), ("backward", 1)):
        assert len(calls(case, part, "allgather")) <= passes * units
        assert len(calls(limited, part, "allgather")) > passes * units


def test_buckets_hold_a_block(measured):
    """However small they are, unless a block may not be live."""
    case, limited = measured["by block"], measured["persistence-0"]
    reduced = len(calls(case, "backward", "reduce_scatter"))
    assert case["blocks"] < reduced <= case["blocks"] + case["outside"] + 1
    assert len(calls(limited, "backward", "reduce_scatter")) > 2 * reduced


def test_persistent_parameters_travel_together(measured):
    """One collective a pass for all of them; none in the step itself."""
    default, none = measured["default"], measured["persistence-0"]
    assert default["persistent"] > 20
    assert none["persistent"] == 0
    for part, passes in (("zeroth_order", 2), ("forward", 1), ("backward", 0)):
        gathers = len(calls(default, part, "allgather"))
        assert gathers <= len(calls(none, part, "allgather")) + passes
    assert not calls(default, "step", "allgather")
    assert not calls(none, "step", "allgather")
