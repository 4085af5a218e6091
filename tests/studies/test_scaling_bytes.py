"""What the scaling study measures on two ranks: bytes against closed forms, and whole records."""

import json
from collections import Counter

import pytest

from studies.scaling.phases import PHASES
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_model
from tests.workers.scaling_cases import CASES, LENGTH, ROWS

pytestmark = pytest.mark.slow

RANKS = 2
BYTES = 2  # bf16
VOCABULARY, HIDDEN = 210, 32  # even, so that no partition is padded
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 4000,
        "stage3_param_persistence_threshold": 0,
    },
}


def untied() -> dict:
    return {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model(**untied())


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("scaling")
    model.config.save_pretrained(folder / "model")
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    run_ranks("scaling_cases", RANKS, folder)
    first, second = (json.loads((folder / f"scaling-{rank}.json").read_text()) for rank in (0, 1))
    assert [first[name]["seconds"] for name in names()] == [
        second[name]["seconds"] for name in names()
    ]
    return first


def names() -> list[str]:
    return [f"{method} {sharding}" for method, sharding in CASES]


def sent(case: dict, kind: str) -> float:
    return sum(c["sent"] for c in case["collectives"] if c["kind"] == kind)


def weights(model) -> int:
    return BYTES * sum(parameter.numel() for parameter in model.parameters())


def outside_blocks(model) -> int:
    own = [p for name, p in model.named_parameters() if ".layers." not in name]
    return BYTES * sum(parameter.numel() for parameter in own)


def once(size: int) -> float:
    """What a rank sends for a tensor that goes round once."""
    return size / 2


def test_gradients_travel_once(measured, model):
    for name in names():
        expected = 0 if name.startswith("mezo") else once(weights(model))
        assert sent(measured[name], "reduce_scatter") == expected, name


def test_zeroth_order_passes_gather_the_weights_once_each(measured, model):
    case = measured["mezo zero3"]
    assert sent(case, "all_gather") == 2 * once(weights(model))
    both, first_order = measured["addax zero3"], measured["ip-sgd zero3"]
    assert sent(both, "all_gather") - sent(first_order, "all_gather") == 2 * once(weights(model))
    both, first_order = measured["addax fsdp2"], measured["ip-sgd fsdp2"]
    assert sent(both, "all_gather") - sent(first_order, "all_gather") == 2 * once(weights(model))


def test_fsdp2_gathers_again_what_lies_in_blocks(measured, model):
    """The root stays gathered from forward to backward."""
    expected = 2 * weights(model) - outside_blocks(model)
    assert sent(measured["ip-sgd fsdp2"], "all_gather") == once(expected)


def test_losses_and_reports_are_a_few_numbers(measured):
    """8 bytes a loss and 8 for what no pass has read, 24 for the report; two ranks send it all."""
    for name in ("addax zero3", "addax-wa zero3", "addax fsdp2"):
        assert sent(measured[name], "all_reduce") == 32 + 24, name
    assert sent(measured["mezo zero3"], "all_reduce") == 24 + 24
    assert sent(measured["ip-sgd zero3"], "all_reduce") == 8 + 24


@pytest.mark.parametrize("name", [f"{method} {sharding}" for method, sharding in CASES])
def test_the_dispatcher_sees_the_same(measured, name):
    case = measured[name]
    kinds = {"all_gather": "allgather", "reduce_scatter": "reduce_scatter", "all_reduce": "allred"}
    for calls in case["dispatched"]:
        number, size = Counter(), Counter()
        for operation, bytes_ in calls:
            for kind, part in kinds.items():
                if part in operation or kind in operation:
                    number[kind] += 1
                    size[kind] += bytes_
        found = {c["kind"]: (c["calls"], c["payload"]) for c in case["collectives"]}
        assert found == {kind: (number[kind], size[kind]) for kind in number}
        assert all(c["ranks"] == RANKS for c in case["collectives"])


@pytest.mark.parametrize("name", [f"{method} {sharding}" for method, sharding in CASES])
def test_phases(measured, model, name):
    case = measured[name]
    phases = case["phase_seconds"]
    assert list(phases) == list(PHASES)
    assert sum(phases.values()) == pytest.approx(case["watched_seconds"])
    method, _ = name.split()
    zeroth_order = method in ("addax", "addax-wa", "mezo")
    assert (phases["perturb"] > 0) == zeroth_order
    assert (phases["backward"] > 0) == (method != "mezo")
    always = ("gather", "forward", "reduce", "update", "wait", "other")
    assert all(phases[phase] > 0 for phase in always)
    assert case["parameters"] == weights(model) // BYTES


def test_tokens_of_a_step(measured):
    """addax keeps its first-order sequences to a quarter of the length."""
    zeroth, first = RANKS * ROWS["zo_rows"] * LENGTH, RANKS * ROWS["fo_rows"] * LENGTH
    expected = {
        "addax": zeroth + first // 4,
        "addax-wa": zeroth + first,
        "mezo": zeroth,
        **dict.fromkeys(("ip-sgd", "sgd", "adamw"), first),
    }
    for name in names():
        assert measured[name]["tokens"] == expected[name.split()[0]], name


def test_nothing_is_left_in_place(measured):
    assert measured["left in place"] == []
