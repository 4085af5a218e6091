"""What a trainer writes: on two ranks of which one cannot write, and beside Trainer's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny import write_model
from tests.workers.trainer_cases import CASES, arguments, make_trainer

WRITERS = {"resume": ({0, 1}, 30), "lora": ({0}, 3)}
"""Cases, the ranks that write in them, and how many saves have to fail at least."""

NEVER_NONE = (["checkpoint-1"], ["checkpoint-2"], ["checkpoint-1", "checkpoint-2"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saves")
    run_ranks("ckpt_faults", 2, folder, *WRITERS)
    return folder


@pytest.fixture(params=WRITERS)
def saves(request, folder) -> list[dict[str, Any]]:
    """What came of each save: one without a fault, then one for each fault, then one without."""
    first, second = (
        json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in range(2)
    )
    assert [save["errors"] for save in first] == [save["errors"] for save in second]
    return first


@pytest.mark.slow
def test_without_a_fault_the_new_checkpoint_replaces_the_old(saves):
    for save in (saves[0], saves[-1]):
        assert save["errors"] == ["", ""]
        assert save["there"] == ["checkpoint-2"]


@pytest.mark.slow
def test_all_ranks_are_told_what_one_could_not_write(saves, request):
    failed = [save for save in saves if any(save["errors"])]
    for save in failed:
        own, other = save["errors"][save["bad"]], save["errors"][1 - save["bad"]]
        assert ": cannot be written: " in own
        assert other == f"stopped, as 1 other rank(s) had an error: {own}"
        if "at" in save:
            assert "No space left on device" in own
    writers, at_least = WRITERS[request.node.callspec.params["saves"]]
    assert {save["bad"] for save in failed} == writers
    assert len(failed) >= at_least


@pytest.mark.slow
def test_there_is_a_complete_checkpoint_after_any_fault_and_nothing_half_written(saves):
    for save in saves[1:-1]:
        assert save["damaged"] == []
        assert save["there"] in NEVER_NONE
        if not any(save["errors"]):
            assert save["there"] == ["checkpoint-2"]
    # A fault after the rename, as when the old one is removed, comes too late for the new one.
    later = [save for save in saves[1:-1] if any(save["errors"]) and len(save["there"]) > 1]
    assert len(later) <= 3


@pytest.mark.slow
def test_nodes_that_all_save_need_disks_of_their_own(folder):
    nodes, others = (json.loads((folder / f"nodes-{r}.json").read_text()) for r in range(2))
    assert nodes == others
    assert nodes["own"] == {"errors": ["", ""], "there": [True, True]}
    assert nodes["shared"]["there"] == [False, False]
    for error in nodes["shared"]["errors"]:
        assert "another process writes there too" in error
        assert "--save_on_each_node" in error
    assert not list((folder / "shared").iterdir())


def test_generator_states_are_the_file_that_trainer_writes(tmp_path):
    output = tmp_path / "output"
    args = arguments(CASES["resume"], output, "none", 1)
    write_model(tmp_path / "models/resume", "llama")
    trainer = make_trainer("resume", tmp_path, "none", args)
    (tmp_path / "own").mkdir()
    trainer._save_generators(tmp_path / "own")
    trainer._save_rng_state(str(tmp_path / "plain"))
    (own,), (plain,) = ((tmp_path / folder).iterdir() for folder in ("own", "plain"))
    assert own.name == plain.name
    states = [torch.load(path, weights_only=False) for path in (own, plain)]
    assert repr(states[0]) == repr(states[1])
    assert states[0].keys() == states[1].keys()
    torch.manual_seed(99)
    trainer._load_rng_state(str(tmp_path / "own"))
    assert torch.equal(torch.random.get_rng_state(), states[1]["cpu"])
