"""`AddaxTrainer` on every back end, on 1 and 2 ranks, against a float64 loop.

A case is trained on a topology when a test reads what it left.
"""

import csv
import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from addax_ds.data.examples import Example
from tests.support.rank_group import Lazy, RankGroup
from tests.support.reference import distance, norm
from tests.support.tiny import MARKER
from tests.support.trainer_reference import Run, Settings, linear_schedule, reference_run
from tests.workers.trainer_cases import (
    ATTACHED,
    CASES,
    GLOBAL_BATCH,
    MOVED,
    OTHER_RUNS,
    SEED,
    THRESHOLD,
    Case,
    arguments,
    gathered,
    make_trainer,
    run_case,
    with_adapters,
    write_models,
)

pytestmark = pytest.mark.slow

TOPOLOGIES = ("none-1", "zero3-1", "zero3-2")
SEQUENCE = ("zero3-2", "fsdp2-2", "none-1", "zero3-1", "none-2")
"""All topologies; each also goes on from a checkpoint of the one before it."""
EXACT = ("addax", "addax-wa", "mezo", "ip-sgd", "lora", "not-a-number")
STEPS = {
    "addax": 6,
    "addax-wa": 4,
    "mezo": 6,
    "ip-sgd": 4,
    "dropout": 1,
    "lora": 6,
    "not-a-number": 5,
    "resume": 7,
    "accumulated": 4,
    "everything": 6,
}
LOGGED = ("g0", "zo_loss", "fo_loss", "zo_update_norm", "fo_update_norm", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> Iterator[Any]:
    """What each rank found: by topology, by case, by rank."""
    with ExitStack() as stack:

        def of_topology(topology: str) -> Lazy[str, list[dict[str, Any]]]:
            sharding, world_size = topology.split("-")
            previous = dict(zip(SEQUENCE[1:], SEQUENCE, strict=False)).get(topology)
            (folder / "logs" / topology).mkdir(parents=True)
            group = RankGroup("trainer_cases", int(world_size), folder / "logs" / topology)
            stack.callback(group.close)

            def of_case(name: str) -> list[dict[str, Any]]:
                given = name, folder, sharding, int(world_size), previous
                if name == "moved":
                    _ = found[previous][MOVED]  # leaves the checkpoint
                return (
                    [run_case(*given)] if topology == "none-1" else group.call("run_case", *given)
                )

            return Lazy((*CASES, *OTHER_RUNS), of_case)

        found: Lazy[str, Any] = Lazy(SEQUENCE, of_topology)
        yield found


def combinations(*names: str) -> Any:
    """Parametrise by the topologies, and by those of the cases that they run."""
    pairs = [(n, t) for t in SEQUENCE for n in names if t in TOPOLOGIES or n in ATTACHED]
    return pytest.mark.parametrize(("name", "topology"), pairs)


# ---- which examples a step saw ------------------------------------------------------------------


@functools.cache
def by_tokens(name: str) -> dict[tuple[int, ...], Example]:
    found = {tuple(e.input_ids.tolist()): e for e in CASES[name].examples()}
    assert len(found) == CASES[name].long + CASES[name].short
    return found


def streams(name: str, ranks: list[dict[str, Any]]) -> dict[str, list[list[Example] | None]]:
    """The global batches that the model was given, by stream and step; dummy rows left out."""
    forwards = {"zeroth": 2, "first": 1}
    if CASES[name].addax.get("method") == "mezo":
        forwards = {"zeroth": 2}
    if CASES[name].addax.get("method") == "ip-sgd":
        forwards = {"first": 1}
    micro_batches = max(CASES[name].shares // len(ranks), 1)
    if "max_grad_norm" in CASES[name].training and micro_batches == 1:
        forwards["first"] *= 2  # once for the norm
    found: dict[str, list[list[Example] | None]] = {"zeroth": [], "first": []}
    passes = [iter(rank["passes"]) for rank in ranks]
    for _ in range(STEPS[name]):
        for stream in ("zeroth", "first"):
            batches = [
                merge([next(p) for _ in range(micro_batches) for p in passes], name)
                for _ in range(forwards.get(stream, 0))
            ]
            assert all(batch == batches[0] for batch in batches)
            found[stream].append(batches[0] if batches else None)
    assert all(next(p, None) is None for p in passes)
    return found


def merge(passes: list[dict[str, Any]], name: str) -> list[Example]:
    """Undo the dealing of rows to micro-batches and ranks."""
    longest = max(len(p["rows"]) for p in passes)
    rows = [p["rows"][i] for i in range(longest) for p in passes if i < len(p["rows"])]
    return [by_tokens(name)[tuple(row)] for row in rows if len(row) > 1]


def reference(name: str, folder: Path, ranks: list[dict[str, Any]]) -> tuple[Run, Any, Any]:
    """The float64 run over the examples that the ranks saw; weights before and after it."""
    case, seen = CASES[name], streams(name, ranks)
    usable = {
        stream: [
            None if batch is None or any(MARKER in e.input_ids for e in batch) else batch
            for batch in batches
        ]
        for stream, batches in seen.items()
    }
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / name, dtype=torch.float32)
    model = with_adapters(model) if case.lora else model
    before = gathered(model)
    alpha = {"mezo": 1.0, "ip-sgd": 0.0}.get(case.addax.get("method"), case.addax.get("alpha"))
    settings = Settings(alpha, SEED, weight_decay=case.training.get("weight_decay", 0.0))
    result = reference_run(model, usable["zeroth"], usable["first"], rates(name), settings)
    return result, before, gathered(model)


def rates(name: str) -> list[float]:
    training = CASES[name].training
    peak, warmup = training.get("learning_rate", 0.05), training.get("warmup_steps", 0)
    return linear_schedule(peak, STEPS[name], warmup)


def logged(result: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in result["log"]]


def close(values: list[float], wanted: list[float | None], **tolerance: float) -> bool:
    """Compare step by step; where nothing is wanted, the step was skipped and nothing is said."""
    pairs = [(v, w) for v, w in zip(values, wanted, strict=True) if w is not None]
    assert pairs
    return [v for v, _ in pairs] == pytest.approx([w for _, w in pairs], **tolerance)


# ---- the step ----------------------------------------------------------------------------------


@combinations(*EXACT)
def test_losses_norms_and_weights_equal_the_float64_loop(results, folder, name, topology):
    ranks = results[topology][name]
    wanted, before, after = reference(name, folder, ranks)
    moved = distance(before, after)
    assert moved >= 1e-3 * norm(before)
    for result in ranks:
        assert distance(result["weights"], after) <= 5e-4 * moved
        if CASES[name].addax.get("method") != "ip-sgd":
            assert close(logged(result, "zo_loss"), wanted.zo_loss, rel=2e-5)
            assert close(logged(result, "g0"), wanted.g0, rel=1e-3, abs=2e-3)
            dimensions = sum(w.numel() for n, w in after.items() if not torch.equal(w, before[n]))
            assert close(
                logged(result, "zo_update_norm"),
                wanted.zo_update_norm,
                rel=4 / math.sqrt(2 * dimensions) + 2e-3,
                abs=1e-4,
            )
        if CASES[name].addax.get("method") != "mezo":
            assert close(logged(result, "fo_loss"), wanted.fo_loss, rel=2e-5)
            assert close(logged(result, "grad_norm"), wanted.grad_norm, rel=1e-4)
            alpha = CASES[name].addax.get("alpha", 0.0)
            updates = [
                None if norm is None else lr * (1 - alpha) * norm
                for lr, norm in zip(rates(name), wanted.grad_norm, strict=True)
            ]
            assert close(logged(result, "fo_update_norm"), updates, rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_topologies_see_the_same_batches_in_the_same_order(results, name):
    one, *others = (streams(name, results[topology][name]) for topology in TOPOLOGIES)
    assert all(other == one for other in others)


def test_ranks_with_fewer_rows_run_the_same_passes(results):
    """The last first-order batch of an epoch is one row, so the second rank has a dummy alone."""
    first, second = results["zero3-2"]["addax"]
    assert len(first["passes"]) == len(second["passes"])
    lengths = [[len(row) for row in p["rows"]] for p in second["passes"]]
    assert lengths.count([1]) == 2


@pytest.mark.parametrize("name", ["addax", "mezo", "addax-wa", "accumulated"])
def test_world_sizes_agree(results, name):
    one, two = results["zero3-1"][name][0], results["zero3-2"][name][0]
    assert logged(one, "g0") == pytest.approx(logged(two, "g0"), abs=1.5e-3)
    assert distance(one["weights"], two["weights"]) <= 1e-4 * norm(one["weights"])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_without_a_first_order_loss_the_zeroth_order_one_is_reported(results, topology):
    (result, *_) = results[topology]["mezo"]
    assert logged(result, "loss") == pytest.approx(logged(result, "zo_loss"), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit(results, name):
    first, second = results["zero3-2"][name]
    assert str(first["log"]) == str(second["log"])  # NaN is not equal to itself
    assert all(torch.equal(w, second["weights"][n]) for n, w in first["weights"].items())


# ---- streams, methods, modes -------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_an_epoch_is_one_pass_over_the_short_sequences(results, topology):
    seen = streams("addax", results[topology]["addax"])
    examples = set(by_tokens("addax").values())
    short = {e for e in examples if e.length <= THRESHOLD}
    assert [len(batch) for batch in seen["first"]] == [4, 4, 1, 4, 4, 1]
    for epoch in (seen["first"][:3], seen["first"][3:]):
        assert {e for batch in epoch for e in batch} == short
    assert all(len(batch) == GLOBAL_BATCH["zo"] for batch in seen["zeroth"])
    drawn = [e for batch in seen["zeroth"] for e in batch]
    assert set(drawn[:7]) == examples - short
    without = streams("addax-wa", results[topology]["addax-wa"])
    everything = set(by_tokens("addax-wa").values())
    assert {e for batch in without["first"] for e in batch} == everything
    assert any(e.length > THRESHOLD for batch in without["first"] for e in batch)
    assert any(e.length <= THRESHOLD for batch in without["zeroth"] for e in batch)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_methods_run_no_superfluous_pass(results, topology):
    """With autograd and in training mode: first-order passes alone."""
    for name, per_step in (("addax", [0, 0, 1]), ("mezo", [0, 0]), ("ip-sgd", [1])):
        for result in results[topology][name]:
            flags = [p["grad"] for p in result["passes"]]
            assert flags == [bool(flag) for flag in per_step] * STEPS[name]
            assert [p["train"] for p in result["passes"]] == flags
            assert result["training"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_zeroth_order_passes_run_without_dropout(results, folder, topology):
    ranks = results[topology]["dropout"]
    seen = streams("dropout", ranks)
    model = AutoModelForCausalLM.from_pretrained(folder / "models/dropout", dtype=torch.float32)
    settings = Settings(CASES["dropout"].addax["alpha"], SEED)
    wanted = reference_run(model, seen["zeroth"], seen["first"], [0.05], settings)
    assert close(logged(ranks[0], "zo_loss"), wanted.zo_loss, rel=2e-5)
    assert close(logged(ranks[0], "g0"), wanted.g0, rel=1e-3, abs=2e-3)
    assert logged(ranks[0], "fo_loss") != pytest.approx(wanted.fo_loss, rel=1e-3)


# ---- not a number ------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_parts_of_a_step_without_a_finite_loss_are_skipped_by_all_ranks(results, topology):
    """With the float64 loop above, which leaves the same parts out, this is all there is to it."""
    for result in results[topology]["not-a-number"]:
        seen = streams("not-a-number", results[topology]["not-a-number"])
        spoilt = {
            stream: [i for i, b in enumerate(seen[stream]) if any(MARKER in e.input_ids for e in b)]
            for stream in ("zeroth", "first")
        }
        assert spoilt["zeroth"]
        assert spoilt["first"]
        assert [i for i, v in enumerate(logged(result, "zo_loss")) if v != v] == spoilt["zeroth"]
        assert [i for i, v in enumerate(logged(result, "fo_loss")) if v != v] == spoilt["first"]
        assert all(logged(result, "g0")[i] == 0.0 for i in spoilt["zeroth"])
        assert all(w.isfinite().all() for w in result["weights"].values())
        wanted = [f"step {i}: zeroth-order" for i in spoilt["zeroth"]]
        wanted += [f"step {i}: first-order" for i in spoilt["first"]]
        named = [line for line in result["warnings"] if "its examples: " in line]
        said = [" ".join(line.split()[:3]) for line in result["warnings"] if line not in named]
        assert sorted(said) == sorted(wanted)
        assert {int(line.split()[1][:-1]) for line in named} == {
            i for s in spoilt.values() for i in s
        }
        origins = {name for line in named for name in line.partition("examples: ")[2].split("; ")}
        marked = {e.origin for e in CASES["not-a-number"].examples() if MARKER in e.input_ids}
        assert marked <= origins
        if topology != "zero3-2":
            continue
        assert len(origins) < sum(len(seen[s][i]) for s in spoilt for i in spoilt[s])


# ---- logging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", ["addax", "mezo", "ip-sgd"])
def test_logged_learning_rate_is_the_one_of_the_step(results, name, topology):
    for result in results[topology][name]:
        assert logged(result, "learning_rate") == pytest.approx(rates(name), rel=1e-12)


class LogEachStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True


def test_a_norm_that_was_not_taken_is_not_logged(folder, tmp_path):
    """Trainer's own would be 0, as there is no gradient left."""
    options = {"logging_strategy": "no", "max_grad_norm": 0.0, "max_steps": 2}
    args = arguments(Case(), tmp_path, "none", 1, **options)
    trainer = make_trainer("addax", folder, "none", args)
    trainer.add_callback(LogEachStep())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in log] == [1, 2]
    assert not any("grad_norm" in entry for entry in log)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_values_reach_tensorboard(results, folder, topology):
    log = results[topology]["addax"][0]["log"]
    (event_file,) = (folder / topology / "addax").glob("runs/*/events*")
    events = EventAccumulator(str(event_file))
    events.Reload()
    assert len(log) == STEPS["addax"]
    for key in (*LOGGED, "loss", "learning_rate"):
        written = [(e.step, e.value) for e in events.Scalars(f"train/{key}")]
        assert written == [(e["step"], pytest.approx(e[key], rel=1e-6)) for e in log]


@pytest.mark.parametrize("world_size", [1, 2])
def test_csv_monitor_of_deepspeed(results, folder, world_size):
    """DeepSpeed writes the rate that its scheduler has moved on to, against samples seen."""
    assert results[f"zero3-{world_size}"]["mezo"]
    path = folder / f"zero3-{world_size}" / "mezo" / "csv" / "Train_Samples_lr.csv"
    with path.open() as file:
        header, *lines = csv.reader(file)
    assert header == ["step", "lr"]
    assert [float(lr) for _, lr in lines] == pytest.approx([*rates("mezo")[1:], 0.0])


# ---- saving and resuming -----------------------------------------------------------------------


@pytest.mark.parametrize("topology", SEQUENCE)
@pytest.mark.parametrize(("name", "dtype"), [("addax", "float32"), ("resume", "bfloat16")])
def test_saved_model_is_the_trained_one(results, folder, name, dtype, topology):
    trained = results[topology][name][0]["weights"]
    saved = folder / topology / name / "model"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert str(model.dtype) == f"torch.{dtype}"
    assert set(trained) == {n for n, _ in model.named_parameters()}
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters())
    assert AutoTokenizer.from_pretrained(saved)("w0 w1")["input_ids"] == [3, 4]


@combinations("mezo", "resume", "lora", "everything")
def test_resuming_changes_nothing(results, name, topology):
    """bf16 with stochastic rounding, MeZO, adapters, and fp16 with dropout and clipped gradients.

    Inside an epoch, with a moving rate.
    """
    for result in results[topology][name]:
        resumed = result["resumed"]
        assert resumed["log"] == result["log"]
        assert all(torch.equal(w, resumed["weights"][n]) for n, w in result["weights"].items())
        assert resumed["passes"] == result["passes"][-len(resumed["passes"]) :]
        assert len(resumed["passes"]) < 0.6 * len(result["passes"])
        assert f"resume with --seed {SEED}" in result["other seed"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_csv_monitor_goes_on_counting_samples_after_a_resume(results, folder, world_size):
    def samples(run: Path) -> list[int]:
        with (run / "csv" / "Train_Samples_lr.csv").open() as file:
            return [int(line[0]) for line in list(csv.reader(file))[1:]]

    assert results[f"zero3-{world_size}"]["mezo"]
    whole = folder / f"zero3-{world_size}" / "mezo"
    assert len(samples(whole)) == STEPS["mezo"]
    assert samples(whole / "again") == samples(whole)[4:]


@pytest.mark.parametrize("topology", SEQUENCE[1:])
def test_a_run_goes_on_where_another_topology_stopped(results, folder, topology):
    """ZeRO-3, then FSDP2, one process, ZeRO-3 again, replicas: the same last two steps."""
    whole, moved = (results[topology][name] for name in ("addax", "moved"))
    before = folder / SEQUENCE[SEQUENCE.index(topology) - 1] / "addax" / "checkpoint-4"
    start = dict(AutoModelForCausalLM.from_pretrained(before).named_parameters())
    for rank, result in zip(whole, moved, strict=True):
        assert close(logged(result, "g0"), logged(rank, "g0"), abs=1.5e-3)
        for key in ("zo_loss", "fo_loss", "learning_rate"):
            assert close(logged(result, key), logged(rank, key), rel=2e-5)
        way = distance(start, rank["weights"])
        assert distance(result["weights"], rank["weights"]) <= 2e-3 * way


@pytest.mark.parametrize("topology", SEQUENCE)
def test_the_best_model_is_loaded_at_the_end(results, folder, topology):
    ranks = results[topology]["best"]
    first, last = (folder / topology / "best" / f"checkpoint-{step}" for step in (2, 4))
    best = dict(AutoModelForCausalLM.from_pretrained(first).named_parameters())
    other = dict(AutoModelForCausalLM.from_pretrained(last).named_parameters())
    for result in ranks:
        assert all(torch.equal(w, best[n]) for n, w in result["weights"].items())
        assert not all(torch.equal(w, other[n]) for n, w in result["weights"].items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_of_deepspeed_are_refused(results, world_size):
    for result in results[f"zero3-{world_size}"]["best"]:
        assert "save_weights" in result["save_checkpoint"]


@pytest.mark.parametrize("topology", SEQUENCE)
def test_checkpoints_are_rotated_and_hold_the_weights_once(folder, results, topology):
    trained = results[topology]["resume"][0]["weights"]
    root = folder / topology / "resume"
    # Of steps 2, 4, 6 and the last, 7.
    kept = sorted(int(p.name.split("-")[1]) for p in root.glob("checkpoint-*"))
    assert kept == [4, 6, 7]
    size = sum(p.stat().st_size for p in (root / "checkpoint-7").rglob("*") if p.is_file())
    weights = sum(w.nbytes for w in trained.values())
    bookkeeping = 60_000  # generator states, tokenizer, arguments, log
    assert weights < size <= weights + bookkeeping


# ---- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", SEQUENCE)
def test_adapters_train_on_a_frozen_base(results, folder, topology):
    base = AutoModelForCausalLM.from_pretrained(folder / "models/lora", dtype=torch.float32)
    before = gathered(with_adapters(base))
    for result in results[topology]["lora"]:
        assert result["weights"].keys() == before.keys()
        for name, weight in result["weights"].items():
            assert torch.equal(weight, before[name]) != ("lora_" in name), name
    plain = AutoModelForCausalLM.from_pretrained(folder / "models/lora", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, folder / topology / "lora" / "model")
    trained = results[topology]["lora"][0]["weights"]
    assert all(torch.equal(p, trained[n]) for n, p in loaded.named_parameters())


# ---- evaluation --------------------------------------------------------------------------------


def test_evaluation_does_not_depend_on_the_topology(results):
    metrics = [results[t]["evaluation"][r]["metrics"] for t in SEQUENCE for r in (0, -1)]
    assert 0.0 < metrics[0]["eval_accuracy"] < 1.0
    for other in metrics:
        assert other["eval_accuracy"] == metrics[0]["eval_accuracy"]
        assert other["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_after_evaluating_under_deepspeed_is_refused(results, world_size):
    for found in results[f"zero3-{world_size}"]["evaluation"]:
        assert "eval_on_start" in found["train"]
    for topology in ("none-1", "none-2", "fsdp2-2"):
        assert "train" not in results[topology]["evaluation"][0]


@pytest.mark.parametrize("topology", ["zero3-2", "fsdp2-2", "none-2"])
def test_learning_rates_are_found_alike_on_every_back_end(results, topology):
    """tests/training/test_learning_rate.py compares those of one process with trainings."""
    (alone,), ranks = results["none-1"]["sweep"], results[topology]["sweep"]
    for rank in ranks:
        assert rank == ranks[0]
        for sweeps in rank.values():  # with dropout, too, whose masks are not those of one process
            assert all(sweep == sweeps[0] for sweep in sweeps)
    found, wanted = ranks[0]["addax"][0], alone["addax"][0]
    assert found.before == pytest.approx(wanted.before, rel=1e-5)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-3)
