"""Saved on 2 ranks, resumed on 1 and 4, and back; ZeRO-3 and FSDP2 in all four combinations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.rank_group import Lazy
from tests.support.ranks import run_ranks
from tests.support.reference import distance
from tests.support.tiny import write_model
from tests.workers.elastic import SAVED_AT, SHARDINGS, STEPS

pytestmark = pytest.mark.slow

RUNS = {
    "two": (2, ()),
    "one": (1, ()),
    "four": (4, ()),
    "one-from-two": (1, ("two",)),
    "four-from-two": (4, ("two",)),
    "two-again": (2, ("one", "four")),
}
"""Number of ranks, and the runs from whose checkpoints it goes on."""

MOVES = [("two", "one"), ("two", "four"), ("one", "two-again"), ("four", "two-again")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Lazy[str, dict[Any, Any]]:
    def of_run(name: str) -> dict[Any, Any]:
        world_size, sources = RUNS[name]
        for source in sources:
            _ = found[source]  # leaves its checkpoints
        run_ranks("elastic", world_size, folder, name, *sources)
        return torch.load(folder / f"{name}.pt")

    found = Lazy(RUNS, of_run)
    return found


@pytest.mark.parametrize("writer", SHARDINGS)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_run_goes_on_on_another_number_of_ranks(
    results, folder, source, target, sharding, writer
):
    name = target if target == "two-again" else f"{target}-from-two"
    resumed, whole = results[name][sharding, source, writer], results["two"]["zero3"]
    saved = folder / source / writer / f"checkpoint-{SAVED_AT}"
    start = dict(AutoModelForCausalLM.from_pretrained(saved).named_parameters())
    way = distance(start, whole["weights"])
    assert distance(resumed["weights"], whole["weights"]) <= 2e-3 * way
    assert len(resumed["log"]) == STEPS
    for found, wanted in zip(resumed["log"], whole["log"], strict=True):
        assert found["g0"] == pytest.approx(wanted["g0"], abs=1.5e-3)  # the same z and rows
        for key in ("zo_loss", "fo_loss", "learning_rate"):
            assert found[key] == pytest.approx(wanted[key], rel=2e-5)
