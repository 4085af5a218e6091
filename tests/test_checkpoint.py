"""The state beside the weights, and who writes them; runs that resume are in `test_trainer`."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

import addax_ds
from addax_ds import UserError, checkpoint
from addax_ds.checkpoint import Run, load_state, save_state

# The schedule is stepped without an optimizer's step, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")

RUN = Run("zero3", ranks=2, dtype="fp32", zeroth_order_batch=2, first_order_batch=4)


def optimizer(groups: int = 2) -> addax_ds.Addax:
    params = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1} for _ in range(groups)]
    return addax_ds.Addax(params, lr=0.3, weight_decay=0.01, seed=7)


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
    save_state(folder, addax, scheduler, RUN)
    return folder


def test_optimizer_and_schedule_go_on(tmp_path):
    addax = optimizer()
    scheduler = schedule(addax)
    load_state(write(tmp_path), addax, scheduler, RUN)
    assert addax.index == 3
    assert [group["lr"] for group in addax.param_groups] == [0.1 / 4] * 2
    assert all(len(group["params"]) == 1 for group in addax.param_groups)
    scheduler.step()
    assert [group["lr"] for group in addax.param_groups] == pytest.approx([0.1 / 5] * 2)


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
    assert content["optimizer"]["addax"] == {"index": 3, "seed": 7}
    assert [group["lr"] for group in content["optimizer"]["param_groups"]] == [0.1 / 4] * 2


@pytest.mark.parametrize(
    ("rank", "each_node", "writers"),
    [(0, False, [0, 1, 2]), (4, False, [0, 1, 2]), (1, True, [0, 1, 2]), (4, True, [3, 4])],
)
def test_ranks_of_one_node_write_unless_every_node_saves(rank, each_node, writers, monkeypatch):
    """Nodes may have no file system in common, and the first has to have every file."""

    def all_gather(found: list[torch.Tensor], own: torch.Tensor) -> None:
        for tensor, local in zip(found, (0, 1, 2, 0, 1), strict=True):
            tensor.fill_(local)

    monkeypatch.setattr(checkpoint.dist, "all_gather", all_gather)
    args = SimpleNamespace(
        world_size=5,
        process_index=rank,
        local_process_index=0,
        save_on_each_node=each_node,
        device=torch.device("cpu"),
    )
    assert checkpoint._writers(args) == writers
