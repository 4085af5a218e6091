"""FSDP2 sharded over a part of the ranks and replicated over the rest: ``--replicas``."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from addax_ds.config.arguments import parse_arguments
from addax_ds.distributed.nodes import replicas_of
from addax_ds.utils.errors import UserError
from tests.support.launcher import launch
from tests.support.ranks import run_ranks
from tests.support.reference import distance
from tests.support.tiny import rows, write_model, write_rows

STEPS, SAVED_AT = 4, 2


# ---- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "per_node", "replicas"),
    [("1", [4], 1), ("2", [4], 2), ("node", [2, 2], 2), ("node", [4], 1), ("4", [4, 4], 4)],
)
def test_copies_of_the_weights(asked, per_node, replicas):
    assert replicas_of(asked, per_node) == replicas


@pytest.mark.parametrize(
    ("asked", "per_node", "says"),
    [
        ("3", [4], "4 ranks cannot be divided into 3 equal parts"),
        ("4", [4], "each of the 4 ranks would hold the whole model; that is --sharding none"),
        ("node", [1, 1], "each of the 2 ranks would hold the whole model"),
        ("node", [2, 1], r"needs as many ranks on each node; there are \[1, 2\]"),
    ],
)
def test_what_cannot_be_is_refused(asked, per_node, says):
    with pytest.raises(UserError, match=says):
        replicas_of(asked, per_node)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--replicas", "two"], "--replicas two: it must be a number from 1 on, or node"),
        (["--replicas", "0"], "--replicas 0: it must be a number"),
        (["--replicas", "2"], "--replicas 2 cannot be used with --sharding none: each rank holds"),
        (
            ["--replicas", "node", "--deepspeed", "zero3"],
            "--replicas node cannot be used with --sharding zero3: zero_hpz_partition_size",
        ),
    ],
)
def test_arguments_are_refused_before_anything_is_loaded(monkeypatch, tmp_path, flags, says):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=says):
        parse_arguments([*flags, f"--output_dir={tmp_path}"])


# ---- bytes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bytes")
    run_ranks("replica_bytes", 4, folder)
    return json.loads((folder / "bytes.json").read_text())


def by_ranks(step: dict[str, Any]) -> dict[tuple[int, ...], dict[str, int]]:
    found: dict[tuple[int, ...], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for ranks, name, size in step["calls"]:
        found[tuple(ranks)][name] += size
    return found


@pytest.mark.slow
def test_between_replicas_goes_the_gradient_once_and_nothing_of_the_weights(counted):
    for method, times in {"addax": 1, "ip-sgd": 1, "mezo": 0}.items():
        between = by_ranks(counted[method]).get((0, 2), {})
        assert sum(between.values()) == times * counted[method]["shard_bytes"], method
        assert set(between) <= {"allreduce_"}


@pytest.mark.slow
def test_of_the_zeroth_order_part_all_ranks_exchange_scalars(counted):
    """Both losses, whether they are finite, and what was not read; at the end of the step three."""
    for method in ("addax", "mezo", "ip-sgd"):
        by_all = by_ranks(counted[method])[0, 1, 2, 3]
        assert set(by_all) == {"allreduce_"}
        assert by_all["allreduce_"] < 200, method
    inside = by_ranks(counted["mezo"])[0, 1]
    assert set(inside) == {"_allgather_base_"}


@pytest.mark.slow
def test_whole_models_exchange_the_gradient_once_and_many_parameters_at_a_time(counted):
    calls = counted["whole"]["calls"]
    sizes = [size for _, name, size in calls if name == "allreduce_coalesced_"]
    assert sum(sizes) == counted["whole"]["shard_bytes"]
    assert len(sizes) <= counted["whole"]["shards"] / 4
    assert sum(size for _, name, size in calls if name == "allreduce_") < 200  # losses, and flags


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One group of four ranks, two nodes with a copy each, and each going on from the other.

    The two nodes have their copies in host memory.
    """
    folder = tmp_path_factory.mktemp("replicas")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", rows(9, 10))

    def train(name: str, replicas: str, source: str | None = None, offload: bool = False) -> None:
        values = {
            "model_name_or_path": folder / "model",
            "train_file": folder / "train.jsonl",
            "output_dir": folder / name,
            "sharding": "fsdp2",
            "use_cpu": True,
            "replicas": replicas,
            "cpu_offload": offload,
            "alpha": 0.01,
            "learning_rate": 0.05,
            "length_threshold": 12,
            "per_device_train_batch_size": 1,
            "max_steps": STEPS,
            "save_steps": SAVED_AT,
            "report_to": "none",
        }
        if source is not None:
            values["resume_from_checkpoint"] = folder / source / f"checkpoint-{SAVED_AT}"
        words = [f"--{flag}={value}" for flag, value in values.items()]
        outcome = launch("launch/train.py", *words, ranks=4, nodes=2, launcher="fork")
        assert outcome.status == 0, outcome.output

    train("one", "1")
    train("two", "node", offload=True)
    train("one-from-two", "1", "two")
    train("two-from-one", "2", "one")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "one-from-two", "two-from-one"])
def test_copies_train_to_the_weights_of_one(trained, name):
    start, whole, found = (
        load_file(trained / place / "model.safetensors")
        for place in ("model", "one/model", f"{name}/model")
    )
    moved = distance({n: start[n] for n in whole}, whole)
    assert moved > 0
    assert distance(found, whole) <= 2e-3 * moved
    assert all(torch.isfinite(weight).all() for weight in found.values())
