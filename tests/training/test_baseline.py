"""SGD and AdamW under ZeRO-3 against torch's own in float64, on the batches of IP-SGD."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.arguments import parse_arguments
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.steps import plan_steps
from addax_ds.training.trainer import AddaxTrainer
from addax_ds.utils.errors import UserError
from tests.support.rank_group import ranks_by_size
from tests.support.tiny import write_model
from tests.support.trainer_reference import global_loss, linear_schedule
from tests.workers.baseline_cases import CASES, STEPS
from tests.workers.trainer_cases import arguments, gathered

TRAINED = [name for name in CASES if name != "best"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[tuple[Path, Any]]:
    """The folder of the model; outcome of a case on each rank, by number of ranks."""
    folder, new_folder = tmp_path_factory.mktemp("baseline"), tmp_path_factory.mktemp
    write_model(folder / "model", "opt")
    with ranks_by_size("baseline_cases", (1, 2), CASES, new_folder, folder) as found:
        yield folder, found


def reference(name: str, folder: Path) -> tuple[nn.Module, list[float], list[float]]:
    """The model after the same steps in float64; losses, and norms of the gradients."""
    case = CASES[name]
    same_batches = replace(case, addax={"method": "ip-sgd"})
    args = arguments(same_batches, folder, "none", 1, per_device_train_batch_size=4)
    examples = case.examples()
    args.settings = replace(args.settings, gradient_accumulation_steps=1)
    _, schedule = plan_steps([e.length for e in examples], args)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double().eval()
    peak, decay = args.learning_rate, args.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=peak)
    if case.addax["method"] == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=decay)
    losses, norms = [], []
    for step, rate in enumerate(linear_schedule(peak, STEPS)):
        indices = schedule.first_order_indices(step)
        assert indices is not None
        loss = global_loss(model, [examples[i] for i in indices])
        optimizer.zero_grad()
        loss.backward()
        limit = args.max_grad_norm or float("inf")
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", TRAINED)
def test_against_torch_in_float64(runs, name, world_size):
    folder, found = runs
    model, losses, norms = reference(name, folder)
    start = gathered(AutoModelForCausalLM.from_pretrained(folder / "model"))
    wanted = gathered(model)
    for result in found[world_size][name]:
        assert [entry["loss"] for entry in result["log"]] == pytest.approx(losses, rel=1e-4)
        assert [entry["grad_norm"] for entry in result["log"]] == pytest.approx(norms, rel=1e-3)
        assert distance(result["weights"], wanted) <= 1e-3 * distance(start, wanted)


def distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Euclidean; without the biases of keys, whose gradient is 0, which AdamW divides by itself."""
    squares = [
        (tensor.double() - others[name].double()).square().sum().item()
        for name, tensor in weights.items()
        if not name.endswith("k_proj.bias")
    ]
    return sum(squares) ** 0.5


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded(runs):
    for by_name in runs[1].values():
        for result in by_name["best"]:
            best = min(result["evaluations"])
            assert best < result["evaluations"][-1]
            assert result["evaluated again"] == best


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume_from_checkpoint", "True"], "adamw cannot resume"),
        (["--fp16"], "remove --fp16"),
        (["--zo_eps", "1e-3"], "--zo_eps has no effect with --method adamw"),
        (["--rounding", "nearest"], "--rounding has no effect with --method adamw"),
        (["--alpha", "0.5"], "--alpha 0.5 contradicts --method adamw"),
    ],
)
def test_flags_without_effect(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--method", "adamw", *flags])


@pytest.mark.parametrize(
    ("trainer", "method", "other"),
    [(AddaxTrainer, "adamw", "BaselineTrainer"), (BaselineTrainer, "ip-sgd", "AddaxTrainer")],
)
def test_a_method_of_the_other_trainer_is_refused(trainer, method, other, tmp_path):
    deepspeed = {"zero_optimization": {"stage": 3}} if method == "adamw" else None
    rate = {"learning_rate": 0.1} if method == "ip-sgd" else {}
    given = {"output_dir": str(tmp_path), "use_cpu": True, **rate}
    args = AddaxConfig(method=method, deepspeed=deepspeed, **given)
    with pytest.raises(UserError, match=rf"not by --method {method}: .*{other}"):
        trainer(nn.Linear(1, 1), args)


def test_arguments_without_addax_s_own_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=r"takes an addax_ds\.AddaxConfig, .* not TrainingArgum"):
        AddaxTrainer(nn.Linear(1, 1), args)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fp16": True}, "bf16 or fp32"), ({}, "--method sgd is DeepSpeed's: give --deepspeed")],
)
def test_what_does_not_run_is_refused_from_python_too(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        AddaxConfig(output_dir=str(tmp_path), use_cpu=True, method="sgd", **options)
