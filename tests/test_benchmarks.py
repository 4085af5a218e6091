"""The step benchmark runs, and its contenders do what they stand for; no time is asserted."""

import json

import pytest

from benchmarks.contenders import USUAL
from tests.ranks import run_module

RANKS = 2
BYTES = 2  # bf16


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("step")
    run_module("benchmarks.step", RANKS, folder, "--rounds", "2", "--output", str(folder))
    return json.loads((folder / "step.json").read_text())


@pytest.fixture(scope="module")
def contenders(document) -> dict[str, dict]:
    return document["contenders"]


def sent(contender: dict, kind: str) -> int:
    """Bytes of the collectives of a kind in one step."""
    collectives = contender["communication"]["collectives"]
    return sum(c["bytes"] for name, c in collectives.items() if kind in name)


def test_the_record_is_complete(document, contenders):
    assert document["configuration"]["ranks"] == RANKS
    assert set(document["circumstances"]["versions"]) >= {"addax_ds", "torch", "deepspeed"}
    assert list(contenders) == list(USUAL)
    for contender in [*contenders.values(), document["addax_over_parts"]]:
        for measured in ("seconds", "cpu_seconds"):
            low, high = contender[measured]["quartiles"]
            assert 0 < low <= contender[measured]["median"] <= high
        assert all(phase["median"] > 0 for phase in contender["phase_seconds"].values())
    for name, contender in contenders.items():
        assert contender["communication"]["sent_bytes_per_rank"] > 0
        if name != "parts":
            memory = contender["memory"]["by_rank"]
            assert len(memory) == RANKS
            assert all(m["peak_rss_bytes"] > m["rss_before_model_bytes"] for m in memory)


def test_all_but_the_parts_train(contenders):
    for first, last in contenders["parts"]["first_and_last_loss"].values():
        assert first == last
    for name in ("sgd", "adamw", "lomo"):
        for first, last in contenders[name]["first_and_last_loss"].values():
            assert last < first, name
    first, last = contenders["addax"]["first_and_last_loss"]["first_order"]
    assert last < first
    first, last = contenders["mezo"]["first_and_last_loss"]["long"]
    assert first != last


def test_bytes(document, contenders):
    """Gradients travel once, or twice where both batches have one, and in full under LOMO."""
    model = BYTES * document["configuration"]["parameters"]
    times = {"addax": 1, "parts": 1, "sgd": 2, "adamw": 2}
    for name, number in times.items():
        scattered = sent(contenders[name], "reduce_scatter")
        assert number * model <= scattered < 1.01 * number * model, name  # padding
    assert sent(contenders["lomo"], "allreduce") == 2 * model
    assert sent(contenders["addax"], "allreduce") <= 64
    assert list(contenders["mezo"]["communication"]["collectives"]) == ["allreduce_"]
    more = sent(contenders["addax"], "allgather") - sent(contenders["parts"], "allgather")
    assert 0 <= more < 0.02 * sent(contenders["parts"], "allgather")  # persistent parameters


def test_state(contenders):
    """All ranks together hold the weights once, or whole on each rank under MeZO."""
    state = {
        name: contender["memory"]["state_bytes_per_parameter"]
        for name, contender in contenders.items()
        if name != "parts"
    }
    assert BYTES * RANKS <= state["mezo"] < 1.01 * BYTES * RANKS
    assert BYTES <= state["lomo"] < 1.01 * BYTES
    assert BYTES <= state["addax"] < 1.1 * BYTES  # and a bucket a rank
    assert state["sgd"] >= BYTES + 4  # fp32 master weights
    assert state["adamw"] >= state["sgd"] + 4 + 4
