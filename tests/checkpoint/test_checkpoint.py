"""The state beside the weights, and who writes them; runs that resume are in `test_trainer`."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

import addax_ds
from addax_ds import UserError
from addax_ds.checkpoint import folders, state
from addax_ds.checkpoint.folders import rotate
from addax_ds.checkpoint.identity import Progress, Run, changes
from addax_ds.checkpoint.resume import Checkpoint
from addax_ds.checkpoint.state import load_state, read_run, save_state
from addax_ds.config.settings import AddaxSettings
from addax_ds.data.examples import Example, data_digest
from addax_ds.distributed import nodes
from addax_ds.optim.hyperparameters import HYPERPARAMETERS, Hyperparameters

# The schedule is stepped without an optimizer's step, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

PROGRESS = Progress(loss_sum=2.5, loss_total=9.0, last_logged_step=2)
RUN = Run(
    sharding="zero3",
    ranks=2,
    dtype="bf16",
    method="addax",
    data_seed=7,
    drop_last=False,
    zeroth_order_batch=2,
    first_order_batch=4,
    hyperparameters={
        "alpha": 0.01,
        "zo_eps": 1e-3,
        "weight_decay": 0.01,
        "seed": 7,
        "rounding": "stochastic",
        "max_grad_norm": 0.0,
        "zo_directions": 1,
    },
    length_threshold=12,
    data="0123456789abcdef",
)


def run_with(name: str, value: Any) -> Run:
    """The run with another field, or another hyperparameter."""
    if name in RUN.hyperparameters:
        name, value = "hyperparameters", RUN.hyperparameters | {name: value}
    return dataclasses.replace(RUN, **{name: value})


def optimizer(groups: int = 2, lr: float = 0.1, weight_decay: float = 0.01) -> addax_ds.Addax:
    params = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for _ in range(groups)]
    return addax_ds.Addax(params, lr=0.3, weight_decay=weight_decay, seed=7)


def schedule(addax: addax_ds.Addax) -> LambdaLR:
    return LambdaLR(addax, lambda step: 1 / (1 + step))


def write(folder: Path) -> Path:
    """State after three steps."""
    addax = optimizer()
    scheduler = schedule(addax)
    addax.index = 3
    for _ in range(3):
        scheduler.step()
    (folder / "trainer_state.json").write_text("{}")
    save_state(folder, addax, scheduler, RUN, PROGRESS)
    return folder


def test_optimizer_and_schedule_go_on(tmp_path):
    addax = optimizer()
    scheduler = schedule(addax)
    assert load_state(write(tmp_path), addax, scheduler, RUN) == PROGRESS
    assert addax.index == 3
    assert [group["lr"] for group in addax.param_groups] == [0.1 / 4] * 2
    assert all(len(group["params"]) == 1 for group in addax.param_groups)
    scheduler.step()
    assert [group["lr"] for group in addax.param_groups] == pytest.approx([0.1 / 5] * 2)


def test_another_learning_rate_and_weight_decay_are_used(tmp_path, caplog):
    addax = optimizer(lr=0.2, weight_decay=0.5)
    scheduler = schedule(addax)
    with caplog.at_level("WARNING", logger="addax_ds"):
        load_state(write(tmp_path), addax, scheduler, run_with("weight_decay", 0.5))
    assert [group["lr"] for group in addax.param_groups] == pytest.approx([0.2 / 4] * 2)
    assert [group["weight_decay"] for group in addax.param_groups] == [0.5, 0.5]
    scheduler.step()
    assert [group["lr"] for group in addax.param_groups] == pytest.approx([0.2 / 5] * 2)
    assert "The learning rate was 0.1 and is 0.2 from here on." in caplog.messages
    assert "Resuming: --weight_decay was 0.01 and is 0.5 from here on." in caplog.messages


def test_a_schedule_that_goes_from_step_to_step_is_scaled(tmp_path):
    """StepLR multiplies what is there, so it has no other way to know the learning rate."""
    addax = optimizer()
    scheduler = StepLR(addax, 2, gamma=0.5)
    for _ in range(3):
        scheduler.step()
    (tmp_path / "trainer_state.json").write_text("{}")
    save_state(tmp_path, addax, scheduler, RUN, PROGRESS)
    addax = optimizer(lr=0.2)
    scheduler = StepLR(addax, 2, gamma=0.5)
    load_state(tmp_path, addax, scheduler, RUN)
    assert scheduler.get_last_lr() == pytest.approx([0.1] * 2)
    scheduler.step()
    assert [group["lr"] for group in addax.param_groups] == pytest.approx([0.05] * 2)


def test_another_topology_is_named(tmp_path, caplog):
    addax = optimizer()
    with caplog.at_level("INFO", logger="addax_ds"):
        load_state(write(tmp_path), addax, schedule(addax), RUN)
    assert not caplog.messages
    other = dataclasses.replace(RUN, sharding="fsdp2", ranks=4)
    with caplog.at_level("INFO", logger="addax_ds"):
        load_state(tmp_path, addax, schedule(addax), other)
    (message,) = caplog.messages
    assert message.startswith(
        "Resuming on 4 rank(s), sharding fsdp2, what 2 rank(s), sharding zero3"
    )


def test_other_groups_are_refused(tmp_path):
    addax = optimizer(groups=1)
    with pytest.raises(UserError, match="written with 2 parameter groups, and this run has 1"):
        load_state(write(tmp_path), addax, schedule(addax), RUN)


def test_another_schedule_is_refused(tmp_path):
    addax = optimizer()
    with pytest.raises(UserError, match=r"scheduler\.pt: this is the state of another kind"):
        load_state(write(tmp_path), addax, StepLR(addax, 2), RUN)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_damaged_schedule_is_named(content, tmp_path):
    (write(tmp_path) / "scheduler.pt").write_bytes(content)
    addax = optimizer()
    with pytest.raises(UserError, match=r"scheduler\.pt: the file is damaged"):
        load_state(tmp_path, addax, schedule(addax), RUN)


def test_nothing_in_a_schedule_is_run(tmp_path):
    folder = write(tmp_path)
    torch.save({"last_epoch": Harmful(tmp_path / "harm")}, folder / "scheduler.pt")
    addax = optimizer()
    with pytest.raises(UserError, match=r"scheduler\.pt: the file is damaged"):
        load_state(folder, addax, schedule(addax), RUN)
    assert not (tmp_path / "harm").exists()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_the_state_is_json_of_a_few_numbers(tmp_path):
    content = json.loads((write(tmp_path) / "addax_state.json").read_text())
    assert content["run"] == dataclasses.asdict(RUN)
    assert content["optimizer"]["addax"].items() >= {"index": 3, "seed": 7}.items()
    assert [group["lr"] for group in content["optimizer"]["param_groups"]] == [0.1 / 4] * 2


@pytest.mark.parametrize(
    ("rank", "each_node", "writers"),
    [(0, False, [0, 1, 2]), (4, False, [0, 1, 2]), (1, True, [0, 1, 2]), (4, True, [3, 4])],
)
def test_ranks_of_one_node_write_unless_every_node_saves(rank, each_node, writers, monkeypatch):
    """Nodes may have no file system in common, and the first has to have every file."""

    monkeypatch.setattr(nodes, "all_gather_object", lambda own: [0, 1, 2, 0, 1])
    args = SimpleNamespace(process_index=rank, local_process_index=0, save_on_each_node=each_node)
    assert folders.writers(args) == writers


# ---- rotation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "step", "limit", "best", "kept"),
    [
        ((2, 4, 6, 8), 8, 2, None, {6, 8}),
        ((2, 4, 6, 8), 8, 1, None, {8}),
        ((2, 4, 6, 8), 8, 2, 2, {2, 8}),
        ((2, 4, 6, 8), 8, 1, 2, {2, 8}),
        ((2, 4, 6, 8), 8, None, None, {2, 4, 6, 8}),
        ((2, 4, 6, 8), 8, 0, None, {2, 4, 6, 8}),
        ((9, 10), 10, 1, None, {10}),
        # The run went on from 4: what lies after it is another future.
        ((2, 4, 6, 8, 10), 6, 3, None, {2, 4, 6}),
        ((2, 4, 6, 8, 10), 6, 1, None, {6}),
    ],
)
def test_the_oldest_checkpoints_go(there, step, limit, best, kept, tmp_path):
    for name in (*(f"checkpoint-{s}" for s in there), "checkpoint-best", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    rotate(tmp_path, step, limit, best and str(tmp_path / f"checkpoint-{best}"))
    others = {"checkpoint-best", "model"}
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{s}" for s in kept} | others


# ---- the same run ------------------------------------------------------------------------------

REFUSED = {
    "dtype": ("fp32", "its weights are bf16, and this run's are fp32: resume with --bf16"),
    "method": ("addax-wa", "the method was addax, and is addax-wa .* --method addax$"),
    "seed": (8, "the seed was 7, and is 8 .* --seed 7$"),
    "data_seed": (8, "the data seed was 7, and is 8 .* --data_seed 7$"),
    "drop_last": (True, "drop last was False, and is True .* --dataloader_drop_last False$"),
    "zeroth_order_batch": (0, "the zeroth order batch was 2 .* 0 .* --per_device_zo_batch_size"),
    "first_order_batch": (
        8,
        "first order batch was 4 over all ranks, and is 8 .* --per_device_train_batch_size and "
        r"--gradient_accumulation_steps so that it is 4 over 2 rank\(s\)",
    ),
    "data": (
        "fedcba9876543210",
        "data had the digest 0123456789abcdef, and has fedc.*--train_file",
    ),
    "length_threshold": (14, "L_T was 12 tokens, and is 14 .* --length_threshold 12$"),
}
WARNED = {
    "alpha": (0.02, "--alpha was 0.01 and is 0.02"),
    "zo_eps": (1e-4, "--zo_eps was 0.001 and is 0.0001"),
    "weight_decay": (0.0, "--weight_decay was 0.01 and is 0.0"),
    "max_grad_norm": (1.0, "--max_grad_norm was 0.0 and is 1.0"),
    "rounding": ("nearest", "--rounding was stochastic and is nearest"),
    "zo_directions": (2, "--zo_directions was 1 and is 2"),
}


def test_every_field_is_refused_warned_of_or_free():
    fields = {field.name for field in dataclasses.fields(Run)} - {"hyperparameters"}
    assert RUN.hyperparameters.keys() == {f.name for f in HYPERPARAMETERS if f.on_resume != "free"}
    assert fields | RUN.hyperparameters.keys() == REFUSED.keys() | WARNED.keys() | {
        "sharding",
        "ranks",
        "template_time",  # a resumed run takes that of its checkpoint
    }


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused(name, tmp_path):
    value, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        Checkpoint(tmp_path, read_run(write(tmp_path))).check(run_with(name, value))
    assert str(error.value).startswith(f"--resume_from_checkpoint {tmp_path}: ")


@pytest.mark.parametrize("name", ["data", "length_threshold"])
def test_data_that_is_not_read_yet_is_not_compared(name, tmp_path):
    early = dataclasses.replace(RUN, data=None, length_threshold=None)
    written = read_run(write(tmp_path))
    assert written == RUN
    Checkpoint(tmp_path, written).check(early)


@pytest.mark.parametrize("name", WARNED)
def test_other_hyperparameters_are_named(name, tmp_path, caplog):
    value, message = WARNED[name]
    addax = optimizer()
    run = run_with(name, value)
    with caplog.at_level("WARNING", logger="addax_ds"):
        load_state(write(tmp_path), addax, schedule(addax), run)
    assert caplog.messages == [f"Resuming: {message} from here on."]


def example(*ids: int) -> Example:
    return Example(np.array(ids, np.int32), np.array(ids, np.int32), "here")


def test_the_digest_is_of_tokens_labels_borders_and_order():
    whole = [example(1, 2, 3), example(4, 5)]
    masked = Example(whole[0].input_ids, np.array([-100, 2, 3], np.int32), "here")
    others = [
        whole[::-1],
        whole[:1],
        [example(1, 2, 4), whole[1]],
        [masked, whole[1]],
        [example(1, 2), example(3, 4, 5)],
        [],
    ]
    assert data_digest(whole) == data_digest([example(1, 2, 3), example(4, 5)])
    assert len({data_digest(data) for data in (whole, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("method", "batches"), [("addax", (12, 24)), ("mezo", (12, 0)), ("ip-sgd", (0, 24))]
)
def test_batches_count_ranks_and_micro_batches(method, batches):
    values = Hyperparameters(lr=0.1, rounding="nearest", seed=5)
    args: Any = SimpleNamespace(
        world_size=2,
        settings=AddaxSettings(method, values, None, 0 if method == "ip-sgd" else 2, 3),
        per_device_train_batch_size=4,
        bf16=False,
        fp16=True,
        seed=3,
        data_seed=None,
        dataloader_drop_last=True,
    )
    run = Run.of(args, "fsdp2")
    assert (run.zeroth_order_batch, run.first_order_batch) == batches
    assert (run.dtype, run.data_seed) == ("fp16", 3)
    assert run.hyperparameters["rounding"] == "nearest"
    assert run.hyperparameters["seed"] == 5
    zeroth_order = {run.hyperparameters[name] for name in ("zo_eps", "zo_directions")}
    assert zeroth_order == ({None} if method == "ip-sgd" else {1e-3, 1})


def test_a_change_without_effect_is_not_announced():
    """Without a zeroth-order part zo_eps changes nothing, whatever an older checkpoint noted."""
    run = dataclasses.replace(run_with("zo_eps", None), method="ip-sgd")
    assert list(changes(dataclasses.replace(RUN, method="ip-sgd"), run)) == []
    assert list(changes(run, run)) == []


def test_one_rank_announces(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(state, "is_rank_zero", lambda: False)
    addax = optimizer(lr=0.2)
    with caplog.at_level("INFO", logger="addax_ds"):
        other = dataclasses.replace(run_with("alpha", 0.02), ranks=4)
        load_state(write(tmp_path), addax, schedule(addax), other)
    assert not caplog.messages
