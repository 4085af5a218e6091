"""``--length_threshold auto``: what is planned, rehearsals that change nothing, and running out."""

import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from addax_ds import UserError
from addax_ds.cli import train
from addax_ds.config.settings import AddaxSettings
from addax_ds.data.batches import StepSchedule
from addax_ds.data.examples import NO_LOSS, Example
from addax_ds.data.partition import partition
from addax_ds.optim.hyperparameters import Hyperparameters
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch, trace
from addax_ds.sharding.layout import Layout
from addax_ds.training import memory, rehearsal
from addax_ds.training.length_threshold import AutoThreshold, dividing_lengths, plan_threshold
from addax_ds.training.rehearsal import is_out_of_memory, longest_batch, rehearse_threshold
from addax_ds.utils import host_memory
from tests.support.launcher import launch
from tests.support.layouts import LAYOUTS, on_layouts
from tests.support.rank_group import Lazy, RankGroup
from tests.support.ranks import run_ranks
from tests.support.tiny import examples, rows, tiny_model, write_model, write_rows
from tests.workers.auto_threshold_cases import CASES, FITS, PLANNED, run_case
from tests.workers.rehearsal_cases import LEFT_OUT, POINTS, STEPS, VARIANTS

DATA = examples(rows(7, 9))
LENGTHS = sorted(example.length for example in DATA)
TARGETS = max(example.target_count for example in DATA)
K0, K1 = 2, 8
SETTINGS = AddaxSettings("addax", Hyperparameters(lr=0.1), "auto", K0)


# ---- planned -----------------------------------------------------------------------------------


def training_args(**options: Any) -> Any:
    """What `plan_threshold` reads of `TrainingArguments`."""
    values = {
        "process_index": 0,
        "local_process_index": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "bf16": False,
        "fp16": False,
        "per_device_train_batch_size": K1,
        "activation_checkpointing": False,
        "device_memory": None,
        "settings": SETTINGS,
    }
    return SimpleNamespace(**values | options)


def planned(device_memory: float | None, fixed: int | None = None, **options: Any) -> AutoThreshold:
    config = tiny_model("opt").config
    args = training_args(device_memory=device_memory, **options)
    return plan_threshold(config, None, Layout(), DATA, args, fixed)


def needed(length: int, parts: int = 1) -> int:
    """Bytes of a step, with the longest sequences zeroth-order."""
    spec = StepSpec(
        shape=shape_of(tiny_model("opt").config, "opt", "fp32"),
        method="addax",
        sharding="none",
        ranks=1,
        zeroth_order=Batch.of(K0 // parts, LENGTHS[-1], TARGETS),
        first_order=Batch.of(K1 // parts, length, TARGETS),
        accumulation=parts,
        cuda=False,
    )
    return step_memory(spec).total


def test_the_lengths_that_leave_both_streams_a_batch():
    generator = random.Random(1)
    for _ in range(200):
        lengths = sorted(generator.randint(2, 9) for _ in range(generator.randint(2, 12)))
        k0, k1 = generator.randint(1, 4), generator.randint(1, 4)
        found = dividing_lengths(lengths, k0, k1)
        for length in range(1, 11):
            try:
                streams = partition(lengths, "addax", length)
                StepSchedule(streams.zeroth_order, streams.first_order, k0, k1, 0)
            except UserError:
                assert length not in found
            else:  # a length between two that occur divides as the smaller one does
                assert max(other for other in lengths if other <= length) in found


def test_the_largest_length_that_fits_is_taken():
    lengths = dividing_lengths(LENGTHS, K0, K1)
    for place, length in enumerate(lengths):
        plan = planned(needed(length) / 1e9)
        assert (plan.length, plan.parts, plan.predicted) == (length, 1, needed(length))
        assert plan.lengths == tuple(lengths)
        assert plan.limit == needed(length)
        if place:
            less = planned((needed(length) - 1) / 1e9)
            assert less.length == lengths[place - 1]
            assert less.reason.startswith(f"{length} would need ")
    # All the memory that first-order steps on the longest sequences need, and one byte less.
    reason = f"a larger one leaves fewer than K0 = {K0} longer sequences"
    assert planned((needed(LENGTHS[-1]) - 1) / 1e9).reason == reason
    left = sum(length > lengths[-1] for length in LENGTHS)
    assert planned(needed(LENGTHS[-1]) / 1e9).reason == (
        f"{reason}. These, {left} of {len(LENGTHS)}, should fit first-order, too: --method ip-sgd "
        "takes them so"
    )


def test_rows_are_divided_where_the_shortest_do_not_fit():
    shortest = dividing_lengths(LENGTHS, K0, K1)[0]
    plan = planned((needed(shortest) - 1) / 1e9)
    assert plan.parts == 2
    assert plan.predicted == needed(plan.length, parts=2)


def test_a_checkpoint_says_the_length():
    plan = planned(1.0, fixed=12)
    assert (plan.length, plan.reason) == (12, "the checkpoint was written with it")
    assert planned((needed(20) - 1) / 1e9, fixed=20).parts == 2


def test_memory_is_detected(monkeypatch, tmp_path):
    there = needed(17) + 2_000_000_000  # of which so much is for what is not a tensor
    monkeypatch.setattr(memory, "available", lambda: there)
    plan = planned(None)
    assert (plan.length, plan.limit) == (17, None)
    monkeypatch.undo()
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(UserError, match=r"cannot be read from .*meminfo: give --device_memory"):
        planned(None)


OFFLOAD = {
    "offload_param": {"device": "cpu", "pin_memory": False},
    "reduce_bucket_size": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
}


def planned_with_offload(sharding: str, device: str, device_memory: float) -> AutoThreshold:
    args = training_args(
        device=torch.device(device),
        device_memory=device_memory,
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": OFFLOAD}),
    )
    config, of_flag = tiny_model("opt").config, sharding == "fsdp2"
    return plan_threshold(config, None, Layout(sharding, cpu_offload=of_flag), DATA, args)


BOTH = pytest.mark.parametrize("sharding", ["zero3", "fsdp2"])


@BOTH
def test_on_a_cpu_offloaded_shards_are_in_the_memory_that_is_divided(sharding):
    free = planned_with_offload(sharding, "cpu", 1.0)
    weights = 4 * sum(p.numel() for p in tiny_model("opt").parameters())
    least = (free.predicted + weights) / 1e9
    assert planned_with_offload(sharding, "cpu", least + weights / 1e9).length == free.length
    assert planned_with_offload(sharding, "cpu", least * (1 - 1e-9)).length < free.length


@BOTH
def test_beside_a_gpu_offloaded_shards_have_to_fit_into_host_memory(monkeypatch, sharding):
    weights = 4 * sum(p.numel() for p in tiny_model("opt").parameters())
    monkeypatch.setattr(memory, "available", lambda: 2 * weights)
    lengths = [planned_with_offload(sharding, on, 1.0).length for on in ("cuda", "cpu")]
    assert lengths[0] == lengths[1]
    monkeypatch.setattr(memory, "available", lambda: weights - 1)
    with pytest.raises(UserError, match=r"offloaded weights take .* of host memory a rank, and"):
        planned_with_offload(sharding, "cuda", 1.0)


def test_too_little_memory_says_how_much_is_missing():
    with pytest.raises(UserError, match=r"does not fit into the 1e-06 GB of a rank.* GB are miss"):
        planned(1e-6)
    with pytest.raises(UserError, match=r"7 row\(s\).*greatest common divisor of --per_device_tra"):
        planned(1e-6, per_device_train_batch_size=7)
    with pytest.raises(UserError, match=r"no L_T leaves K0 = 2 longer sequences and K1 = 15"):
        planned(1.0, per_device_train_batch_size=15)


def test_a_model_that_cannot_be_planned_is_refused():
    config = SimpleNamespace(to_dict=dict, model_type="unheard-of", name_or_path="model")
    with pytest.raises(UserError, match=r"cannot build this model .*: give a number of tokens"):
        plan_threshold(config, None, Layout(), DATA, training_args())  # type: ignore[arg-type]


def test_a_pass_that_cannot_be_planned_asks_for_a_number(monkeypatch):
    trace.cache_clear()
    monkeypatch.setattr("addax_ds.planner.trace.MOST_OPERATIONS", 10)
    said = r"^--length_threshold auto: .* cannot be planned .*, and give that number of tokens$"
    with pytest.raises(UserError, match=said):
        planned(1.0)


# ---- rehearsed, on every layout ----------------------------------------------------------------


REHEARSED = [name for name in LAYOUTS if name not in LEFT_OUT]


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory) -> Iterator[Any]:
    """Outcome of a variant, by layout and rank."""
    new_folder = tmp_path_factory.mktemp
    with on_layouts("rehearsal_cases", new_folder, VARIANTS, REHEARSED) as found:
        yield found


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(v, second[k]) for k, v in first.items())
    return first == second


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", REHEARSED)
def test_a_rehearsal_changes_nothing_wherever_it_fails(rehearsals, layout, variant):
    for rank in rehearsals[layout]:
        plain, rehearsed = rank[variant]
        first, second, *failing, last = rehearsed["rehearsed"]
        assert min(first, second, last) > 500  # operations
        assert failing == [0] * POINTS
        for step in range(STEPS):
            assert equal(rehearsed["steps"][step]["before"], rehearsed["steps"][step]["after"])
            assert equal(rehearsed["steps"][step], plain["steps"][step])
        assert equal(rehearsed["weights"], plain["weights"])


# ---- lowered until it fits ---------------------------------------------------------------------

TOPOLOGIES = ("none-1", "fsdp2-2", "zero3-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    write_model(folder / "model", "opt", dropout=0.2)
    return folder


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory) -> Iterator[Any]:
    """What a case found, by topology and rank."""
    with ExitStack() as stack:

        def of_topology(topology: str) -> list[Lazy[str, dict[str, Any]]]:
            sharding, world_size = topology.split("-")[0], int(topology.split("-")[1])
            logs = tmp_path_factory.mktemp(topology)
            group = RankGroup("auto_threshold_cases", world_size, logs)
            stack.callback(group.close)

            def of_case(name: str) -> list[dict[str, Any]]:
                if name == "resumed":
                    _ = by_case["backward"]  # leaves the checkpoint
                if topology == "none-1":
                    return [run_case(name, folder, sharding)]
                return group.call("run_case", name, folder, sharding)

            by_case = Lazy(CASES, of_case)
            return [Lazy(CASES, lambda n, r=rank: by_case[n][r]) for rank in range(world_size)]

        yield Lazy(TOPOLOGIES, of_topology)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_out_of_memory_lowers_the_threshold_and_nothing_else(runs, topology, where):
    for rank in runs[topology]:
        number, found = rank["number"], rank[where]
        assert (found["partition"], found["noted"]) == (FITS, FITS)
        assert found["rehearsals"] == 3 + rehearsal.ROUNDS  # 28, 25, 20 fail, 18 fits
        for name in ("weights", "log", "generator"):
            assert equal(found[name], number[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_what_fits_as_planned_is_kept(runs, topology):
    for rank in runs[topology]:
        assert rank["planned"]["noted"] == PLANNED
        assert rank["planned"]["rehearsals"] == rehearsal.ROUNDS
        for name in ("weights", "log", "generator"):
            assert equal(rank["planned"][name], rank["planned number"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_resumed_run_does_not_rehearse(runs, topology):
    for rank in runs[topology]:
        assert rank["resumed"]["rehearsals"] == 0
        assert equal(rank["resumed"]["weights"], rank["number"]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_memory_that_runs_out_on_one_rank_ends_all_with_a_sentence(folder, sharding, where):
    run_ranks("auto_threshold_cases", 2, folder, sharding, where, timeout=90)
    for rank in range(2):
        said = (folder / f"{sharding}-alone-{rank}.txt").read_text()
        assert "at L_T = 28 memory ran out on rank(s) 1 (no memory (injected))" in said
        assert "start again with --length_threshold 25, or a smaller --device_memory" in said


# ---- the search, without a model ---------------------------------------------------------------


def search(fits: Callable[[int], bool], lengths: tuple[int, ...], **options: Any) -> list[int]:
    """L_T that are tried, when those that do not fit raise."""
    tried: list[int] = []

    def rehearse(length: int) -> None:
        if length not in tried:
            tried.append(length)
        if not fits(length):
            raise MemoryError

    plan = AutoThreshold(lengths[-1], lengths, 1, 10**9, options.get("limit"), "it is the longest")
    found = rehearse_threshold(plan, rehearse, torch.device("cpu"), 60.0)
    assert found == tried[-1]
    return tried


def test_each_length_is_at_most_nine_tenths_of_the_one_before():
    assert search(lambda length: length <= 80, tuple(range(50, 101))) == [100, 90, 81, 72]
    assert search(lambda length: True, (7, 8)) == [8]


def test_nothing_fits():
    with pytest.raises(UserError, match=r"did not fit into memory \(MemoryError\), with L_T = 50"):
        search(lambda length: False, (50, 60))


def test_another_error_is_not_taken_for_want_of_memory():
    def rehearse(length: int) -> None:
        raise RuntimeError("a bug")

    plan = AutoThreshold(8, (7, 8), 1, 0, None, "")
    with pytest.raises(RuntimeError, match="a bug"):
        rehearse_threshold(plan, rehearse, torch.device("cpu"), 60.0)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"short": "no memory", "collectives": [5]}, "memory ran out on rank.s. 0, 1"),
        ({"collectives": [5]}, "memory ran out on rank.s. 0 "),
        ({"failed": "timed out", "collectives": [4]}, "memory ran out on rank.s. 0 "),
        ({"short": "no memory", "collectives": [4]}, None),
        ({"collectives": [4]}, None),
    ],
)
@pytest.mark.slow
def test_ranks_go_on_only_from_the_same_point(monkeypatch, other, said):
    """This rank's memory runs out once, after 4 collectives; the other's end is given."""
    tried: list[int] = []

    @contextmanager
    def side_group(wait: float, usually: float) -> Iterator[Any]:
        yield lambda own: [own, own if own.short == "" else type(own)(**other)]

    def rehearse(length: int) -> None:
        tried.append(length)
        if length == 8:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(rehearsal, "side_group", side_group)
    monkeypatch.setattr(rehearsal, "collectives_begun", lambda: [4])
    plan = AutoThreshold(8, (7, 8), 1, 0, None, "")
    if said is None:
        assert rehearse_threshold(plan, rehearse, torch.device("cpu"), 60.0) == 7
        return
    with pytest.raises(UserError, match=said):
        rehearse_threshold(plan, rehearse, torch.device("cpu"), 60.0)
    assert tried == [8]


def test_the_error_of_torch_on_a_cpu_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_the_longest_batch_bounds_every_other():
    generator = np.random.default_rng(3)
    indices = np.arange(0, len(DATA), 2)
    for rows_ in (1, 2, 3):
        worst = longest_batch(DATA, indices, rows_, 0)
        predicted = (worst["labels"][:, 1:] != NO_LOSS).any(0).sum()
        for _ in range(50):
            chosen: list[Example] = [DATA[i] for i in generator.choice(indices, rows_, False)]
            assert worst["input_ids"].shape[1] >= max(example.length for example in chosen)
            positions = set()
            for example in chosen:
                positions |= set(np.flatnonzero(example.labels[1:] != NO_LOSS).tolist())
            assert predicted >= len(positions)


# ---- the program -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("program")
    write_model(folder / "model", "opt")
    write_rows(folder / "train.jsonl", rows(7, 9))
    return [
        f"--model_name_or_path={folder / 'model'}",
        f"--train_file={folder / 'train.jsonl'}",
        "--length_threshold=auto",
        "--learning_rate=1e-3",
        "--report_to=none",
        "--disable_tqdm=true",
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "--length_threshold auto needs --max_steps: L_T decides"),
        (("--max_steps=2", "--device_memory=0"), "--device_memory 0: it must be above 0"),
        (("--max_steps=2", "--device_memory=nan"), "--device_memory nan: it must be"),
        (
            ("--max_steps=2", "--device_memory=1", "--length_threshold=9"),
            "--device_memory has no effect without --length_threshold auto",
        ),
        (("--max_steps=2", "--method=mezo"), "--length_threshold has no effect with --method mezo"),
        (
            ("--max_steps=2", "--device_memory=1e-6", "--per_device_train_batch_size=2"),
            "does not fit into the 1e-06 GB of a rank",
        ),
    ],
)
@pytest.mark.usefixtures("program_alone")
def test_refusals(flags, more, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "_load_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(SystemExit):
        train.main([*flags, *more, f"--output_dir={tmp_path / 'output'}"])
    assert said in capsys.readouterr().err


def test_a_trainer_wants_the_number():
    with pytest.raises(UserError, match="give AddaxTrainer its result as planned"):
        partition(LENGTHS, "addax", "auto")


@pytest.mark.usefixtures("program_alone")
@pytest.mark.slow
def test_the_program_trains_with_divided_rows_and_goes_on(flags, tmp_path, caplog):
    """Memory for four rows, not for eight; then the last steps again, from the checkpoint."""
    memory = (needed(dividing_lengths(LENGTHS, K0, K1)[0]) - 1) / 1e9
    longest = planned(memory).length
    batches = [f"--per_device_train_batch_size={K1}", f"--per_device_zo_batch_size={K0}"]
    run = [*flags, *batches, f"--device_memory={memory!r}", "--max_steps=4", "--save_steps=2"]
    run.append(f"--output_dir={tmp_path}")
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        logging.getLogger("addax_ds").propagate = True
        train.finetune(run)
        assert f"L_T = {longest} is the largest that fits" in caplog.text
        assert "a step has 2 micro-batches, of 4 rows first-order and 1 zeroth-order" in caplog.text
        weights = (tmp_path / "model" / "model.safetensors").read_bytes()
        noted = json.loads((tmp_path / "checkpoint-2" / "addax_state.json").read_text())["run"]
        assert (noted["length_threshold"], noted["first_order_batch"]) == (longest, K1)
        caplog.clear()
        resumed = f"--resume_from_checkpoint={tmp_path / 'checkpoint-2'}"
        train.finetune([*run, resumed])
        assert f"at most {longest}): " in caplog.text
        assert "is the largest that fits" not in caplog.text
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_two_ranks_by_the_launcher(flags, tmp_path):
    outcome = launch(
        "launch/train.py",
        *flags,
        *("--deepspeed=ds_configs/zero3.json", "--device_memory=1", "--max_steps=2"),
        *("--per_device_train_batch_size=2", "--per_device_zo_batch_size=1"),
        f"--output_dir={tmp_path}",
        launcher="fork",
    )
    assert outcome.status == 0, outcome.output
    assert "L_T = 28 is the largest that fits: a larger one leaves fewer than" in outcome.output
    assert (tmp_path / "model" / "model.safetensors").is_file()
