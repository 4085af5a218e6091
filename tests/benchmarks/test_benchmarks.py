"""Benchmarks run, and what they compare does what it stands for; no time is asserted."""

import importlib
import json
import pkgutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import benchmarks
from addax_ds.data.examples import NO_LOSS
from benchmarks import host, largest, loading, perturbation
from benchmarks.common import SHAPES
from benchmarks.contenders import USUAL
from tests.support.models import tiny_opt, token_batches
from tests.support.ranks import run_module

RANKS = 2
BYTES = 2  # bf16
MODULES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(f"benchmarks.{name}")


def test_the_perturbation_benchmark_takes_the_loss_of_the_model():
    model = tiny_opt().eval()
    ((tokens, _),) = token_batches(1)
    labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < 20, NO_LOSS)
    batch = {"input_ids": tokens, "labels": labels}
    mean = perturbation.mean_loss(model, batch, int((labels != NO_LOSS).sum()))
    assert mean.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


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


_HIDDEN, _INNER = SHAPES["tiny"]["hidden_size"], SHAPES["tiny"]["ffn_dim"]
EMBEDDING = SHAPES["tiny"]["vocab_size"] * _HIDDEN
LAYER = 4 * _HIDDEN**2 + 2 * _HIDDEN * _INNER + 9 * _HIDDEN + _INNER


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    # Four passes, and the tied embedding at most twice in each.
    gathered = sent(contenders["addax"], "allgather")
    assert 3 * model < gathered < 4 * 1.01 * (model + BYTES * EMBEDDING)


@pytest.mark.slow
def test_state(document, contenders):
    """All ranks together hold the weights once, or whole on each rank under MeZO."""
    state = {
        name: contender["memory"]["state_bytes_per_parameter"]
        for name, contender in contenders.items()
        if name != "parts"
    }
    assert BYTES * RANKS <= state["mezo"] < 1.01 * BYTES * RANKS
    assert BYTES <= state["lomo"] < 1.01 * BYTES
    bucket = RANKS * BYTES * LAYER / document["configuration"]["parameters"]
    assert BYTES <= state["addax"] < 1.1 * BYTES + bucket
    assert state["sgd"] >= BYTES + 4  # fp32 master weights
    assert state["adamw"] >= state["sgd"] + 4 + 4


# ---- the largest model -------------------------------------------------------------------------


def attempts(monkeypatch, planned: dict[str, float], held: dict[str, float], memory: float) -> list:
    """Models that a search tries, with what it finds; they hold what is given, in GB."""

    def attempt(name: str, method: str, limit: float) -> dict:
        return {"model": name, "trained": held[name] * 1e9 <= limit}

    monkeypatch.setattr(largest, "attempt", attempt)
    monkeypatch.setattr(largest, "planned", lambda name, method: planned.get(name, 1e3) * 1e9)
    return [(a["model"], a["trained"]) for a in largest.search("addax", memory * 1e9)]


def test_the_search_goes_up_from_what_is_planned_to_fit(monkeypatch):
    held = {"opt-1.3b": 4.0, "opt-2.7b": 9.0, "opt-6.7b": 21.0}
    planned = {"opt-125m": 0.5, "opt-350m": 1.0, "opt-1.3b": 3.0}
    found = attempts(monkeypatch, planned, held, 20)
    assert found == [("opt-1.3b", True), ("opt-2.7b", True), ("opt-6.7b", False)]


def test_the_search_goes_down_where_the_plan_was_too_bold(monkeypatch):
    held = {"opt-125m": 2.0, "opt-350m": 5.0, "opt-1.3b": 30.0}
    planned = {"opt-125m": 1.0, "opt-350m": 3.0, "opt-1.3b": 19.0}
    found = attempts(monkeypatch, planned, held, 20)
    assert found == [("opt-1.3b", False), ("opt-350m", True)]


def test_the_search_stops_at_weights_that_do_not_fit(monkeypatch):
    planned = {"opt-6.7b": 16.0, "opt-2.7b": 7.0}
    assert attempts(monkeypatch, planned, {"opt-6.7b": 17.0}, 20) == [("opt-6.7b", True)]


def test_ranks_that_hold_too_much_are_killed():
    hog = "import time; held = bytearray(300_000_000); held[::4096] = held[::4096]; time.sleep(60)"
    child = [sys.executable, "-c", hog, "--local_rank=0"]
    parent = f"import subprocess; subprocess.run({child!r})"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    assert largest._watch(process, 200e6) > 200e6
    assert process.returncode == -signal.SIGKILL


# ---- host time --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_and_its_parts_are_timed_in_a_process_of_their_own():
    (row,) = host.measure({"this": host.ROOT}, ["none"], layers=2, rounds=2)
    assert row["step"]["median"] > 0
    assert row["parts"]["median"] > 0
    assert 2 * (2 + 1) < row["launches"] < 3 * (2 * 16 + 4)


# ---- loading -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("way", "form"), [("addax_ds", "safetensors"), ("transformers", "bin")])
def test_the_model_that_was_written_is_loaded_and_saved(way, form, tmp_path):
    source, result, size = tmp_path / "model", tmp_path / "result.json", "8MB"
    assert loading.write_model("opt-11m", form, source, size)["files"] > 1
    words = ["--way", way, "--source", str(source), "--max_file_size", size]
    run_module("benchmarks.loading", RANKS, tmp_path, *words, "--output", str(result))

    written = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    del written["lm_head.weight"]  # the embedding
    files = (tmp_path / "saved").glob("*.safetensors")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert written.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in written.items())
    share = sum(tensor.nbytes for tensor in written.values()) / RANKS
    found = json.loads(result.read_text())
    assert found["way"] == way
    assert len(found["by_rank"]) == RANKS
    for rank in found["by_rank"]:
        assert rank["share"] == pytest.approx(share, rel=1e-3)
        assert rank["loading"]["anonymous"] >= share
        assert rank["saving"]["anonymous"] > 0


def test_the_peak_is_what_was_held_in_between():
    with loading.Growth() as growth:
        held = torch.ones(2**26, dtype=torch.uint8)
        time.sleep(0.3)
        del held
    for kind in ("anonymous", "resident"):
        assert 2**26 <= growth.peak[kind] < 1.25 * 2**26
