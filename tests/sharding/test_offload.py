"""Offload: weights live in host memory, and are perturbed and updated there; NVMe is refused."""

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from addax_ds import kernels
from addax_ds.cli import train
from addax_ds.config.arguments import ModelArguments, parse_arguments
from addax_ds.distributed import nodes
from addax_ds.optim import update
from addax_ds.optim.gradients import GradientSums
from addax_ds.optim.update import Step
from addax_ds.sharding.base import Shard, Sharding
from addax_ds.utils.errors import UserError
from tests.support.launcher import launch
from tests.support.ranks import ROOT, run_ranks
from tests.support.slices import apply_update, perturb
from tests.support.tiny import rows, write_model, write_rows

CONFIG = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())


def test_the_two_files_differ_in_offload_alone():
    plain = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    offload = CONFIG["zero_optimization"].copy()
    assert offload.pop("offload_param") == {"device": "cpu", "pin_memory": True}
    assert offload == plain.pop("zero_optimization")
    assert {k: v for k, v in CONFIG.items() if k != "zero_optimization"} == plain


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("offload")
    run_ranks("offload", 2, folder)
    return [json.loads((folder / f"offload-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_kernels_read_and_write_the_shards_that_deepspeed_keeps(looked_at, rank, config):
    """And no copies of them, which on a machine with a GPU might be elsewhere."""
    found = looked_at[rank][config]
    assert found["device"].endswith("cpu") == (config == "zero3_offload")
    assert len(found["all"]) > 30
    assert found["read"] == found["written"] == found["all"]


@pytest.fixture
def devices(monkeypatch) -> list[tuple[str, ...]]:
    """The devices of what each call of a kernel got, instead of the call."""
    calls = []

    def fused(slices: Any, _: Any, out: Any, gradients: Any, *more: Any) -> None:
        given = [*(each.data for each in slices), *([] if out is None else [out])]
        calls.append(tuple(t.device.type for t in (*given, *(gradients or ()))))

    def implementation(device_type: str) -> SimpleNamespace:
        calls.append((device_type,))
        return SimpleNamespace(fused=fused)

    monkeypatch.setattr(kernels, "implementation", implementation)
    return calls


@pytest.mark.parametrize(("home", "calls"), [("cpu", "cpu"), ("cuda", "cuda")])
def test_a_shard_is_perturbed_and_updated_where_it_lives(devices, home, calls):
    """With tensors that have a device and no memory: the gradient comes to the shard."""
    step = Step(seed=1, index=2, lr=0.1, alpha=0.5, zo_eps=1e-3, coefficients=(1.0,))
    with FakeTensorMode():
        weight = torch.empty(64, dtype=torch.bfloat16, device=home)
        gradient = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        assert perturb(weight, 3, 0, step, 1).device.type == home
        apply_update(weight, gradient, 3, 0, step, decayed=False)
    assert devices == [(calls,), (calls,) * 2, (calls,), (calls,) * 2]


def test_an_offloaded_shard_travels_before_it_is_perturbed(devices):
    """The copy that has arrived is perturbed; one that lives there is taken as it is."""
    step = Step(seed=1, index=2, lr=0.1, alpha=0.5, zo_eps=1e-3)
    with FakeTensorMode():
        back_end = SimpleNamespace(device=torch.device("cuda", 0))
        shards = [
            Shard(torch.empty(64, dtype=torch.bfloat16, device=home), parameter_id=3, start=5)
            for home in ("cpu", "cuda:0")
        ]
        arrived = Sharding._at_device(cast(Any, back_end), shards)
        assert [shard.data.device.type for shard in arrived] == ["cuda"] * 2
        assert arrived[1] is shards[1]
        assert (arrived[0].parameter_id, arrived[0].start) == (3, 5)
        update.perturb(arrived, step, 1)
    assert devices == [("cuda",), ("cuda",) * 3]


def test_accumulated_gradients_lie_beside_their_shard():
    """In host memory: for a model that a GPU does not hold, their sum is twice as large."""
    with FakeTensorMode():
        shard = Shard(torch.empty(64, dtype=torch.bfloat16), parameter_id=3, start=0)
        gradient = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        sums = GradientSums()
        for _ in range(2):
            sums.add(shard, gradient)
            assert sums.held(shard).device.type == "cpu"
        total = sums.take(shard, gradient)
    assert total.device.type == "cpu"
    assert total.dtype == torch.float32


@pytest.mark.slow
def test_weights_go_to_host_memory_and_back_when_deepspeed_is_told_to(looked_at):
    """`engine.offload_states`, the one thing that needs DeepSpeed's flat buffer of all shards."""
    assert all(rank["zero3"]["returned"] for rank in looked_at)


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--cpu_offload cannot be used with --sharding none: each rank holds the whole model"),
        (
            ["--deepspeed", "zero3"],
            "--cpu_offload cannot be used with --sharding zero3: its JSON says so, with "
            "offload_param, as --deepspeed zero3_offload does",
        ),
    ],
)
def test_the_flag_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, flags, says):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=says):
        parse_arguments(["--cpu_offload", *flags, f"--output_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("own", "of_node", "share"),
    [
        (range(16), [range(16)], 16),
        (range(16), [range(16)] * 8, 2),
        (range(16), [range(16)] * 3, 5),  # 16 thirds of a core
        (range(2), [range(2)] * 8, 1),
        (range(4, 8), [range(4 * rank, 4 * rank + 4) for rank in range(4)], 4),
        (range(4), [range(4), range(2)], 3),
    ],
)
def test_ranks_of_a_node_share_its_cores(own, of_node, share):
    assert nodes.share_of_cores(own, of_node) == share


@pytest.mark.parametrize(
    ("device", "home", "asked", "expected"),
    [
        ("cuda", "cpu", None, 4),
        ("cuda", "cpu", 3, 3),
        ("cuda", "cuda", None, 1),
        ("cpu", "cpu", None, 1),
    ],
)
def test_threads_are_for_weights_that_lie_beside_a_gpu(monkeypatch, device, home, asked, expected):
    """Two nodes of two ranks, and eight cores for those of this node."""
    cores = [range(8), range(8), range(2), range(2)]
    gathered = iter([cores, [0, 1, 0, 1]])
    monkeypatch.setattr(nodes, "all_gather_object", lambda own: next(gathered))
    found = [1]
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    args: Any = SimpleNamespace(device=torch.device(device), process_index=1, local_process_index=1)
    with FakeTensorMode():
        model = nn.ParameterList([torch.empty(4, device=home)])
        train._thread_the_host(model, ModelArguments(cpu_threads=asked), args)
    assert found[-1] == expected


REFUSED = {
    'offload_param.device = "nvme"': "NVMe offload is not supported: a shard on disk cannot be "
    "updated.",
    "zero_hpz_partition_size = 8": "Hierarchical partitioning gathers a secondary copy of the "
    "shards, which the perturbation of the zeroth-order passes would miss; remove the key.",
}


@pytest.mark.slow
def test_nvme_and_hierarchical_partitioning_end_all_ranks_in_words(tmp_path):
    config = json.loads(json.dumps(CONFIG))
    zero = config["zero_optimization"]
    zero["offload_param"] = {"device": "nvme", "nvme_path": "/scratch"}
    zero["zero_hpz_partition_size"] = 8
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    given = {
        "model_name_or_path": write_model(tmp_path / "model"),
        "train_file": write_rows(tmp_path / "train.jsonl", rows(7, 9)),
        "output_dir": tmp_path / "output",
        "deepspeed": path,
        "learning_rate": 1e-3,
    }
    flags = [f"--{name}={value}" for name, value in given.items()]
    outcome = launch("launch/train.py", *flags, launcher="fork")
    assert outcome.status not in (0, None), outcome.output
    assert f"addax_ds: error: {path} cannot be used with Addax:" in outcome.output
    for key, sentence in REFUSED.items():
        assert f"  - zero_optimization.{key}: {sentence}\n" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.left_behind == 0
    assert not (tmp_path / "output").exists()
