"""A hyperparameter is declared in one file: the test adds one to a copy of the package."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from transformers import TrainingArguments

from addax_ds import Addax, UserError
from addax_ds.optim.hyperparameters import (
    BY_NAME,
    HYPERPARAMETERS,
    HyperparameterFlags,
    HyperparameterKwargs,
    Hyperparameters,
)
from tests.support.ranks import ROOT

# What adding `zo_dummy` takes: (file, before what, text).
ADDITIONS = [
    (
        "optim/hyperparameters.py",
        "    max_grad_norm: float = _known(",
        """    zo_dummy: int = _known(
        1,
        accepts=lambda value: isinstance(value, int) and value >= 1,
        expected="an integer of at least 1",
    )
""",
    ),
    (
        "optim/hyperparameters.py",
        "    rounding: Rounding | None = flag(",
        """    zo_dummy: int | None = flag(None, "Of no use.")
""",
    ),
    ("optim/hyperparameters.py", "    max_grad_norm: float\n", "    zo_dummy: int\n"),
    # Where it is used.
    ("optim/addax.py", "    max_grad_norm: float\n", "    zo_dummy: int\n"),
]

KNOWN_EVERYWHERE = """
import dataclasses, sys
import torch
import addax_ds
from addax_ds.checkpoint.identity import Run, changes
from addax_ds.config.arguments import parse_arguments
from addax_ds.training import desync

assert addax_ds.__file__.startswith(sys.argv[1]), addax_ds.__file__
json = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}

# the command line, and what it refuses
args = parse_arguments(["--use_cpu", "--zo_dummy", "3"])[-1]
assert args.settings.hyperparameters.zo_dummy == 3
try:
    parse_arguments(["--use_cpu", "--zo_dummy", "0"])
except addax_ds.UserError as error:
    assert "--zo_dummy = 0: it must be an integer of at least 1" in str(error)
else:
    raise AssertionError("0 was taken")

# Python, and the JSON with and without Trainer
block = {"type": "Addax", "params": {"zo_dummy": 4}}
args = addax_ds.AddaxConfig(
    "output", use_cpu=True, per_device_train_batch_size=1, learning_rate=0.1,
    deepspeed={**json, "optimizer": block},
)
assert args.settings.hyperparameters.zo_dummy == 4
assert args.hf_deepspeed_config.config["optimizer"]["params"]["zo_dummy"] == 4
params = addax_ds.ds_config(json, lr=0.1, zo_dummy=5)["optimizer"]["params"]
assert params["zo_dummy"] == 5

# the optimizer
parameter = torch.nn.Parameter(torch.ones(2))
optimizer = addax_ds.Addax([parameter], **params)
assert optimizer.zo_dummy == optimizer.hyperparameters["zo_dummy"] == 5

# a checkpoint, also one from before there was any
run = Run.of(args, "none")
written = dataclasses.replace(run, hyperparameters=run.hyperparameters | {"zo_dummy": 7})
assert list(changes(written, run)) == ["--zo_dummy was 7 and is 4 from here on"]
del written.hyperparameters["zo_dummy"]
assert list(changes(written, run)) == ["--zo_dummy was 1 and is 4 from here on"]

# the comparison of ranks
compared = []
desync.all_gather_object = lambda value: compared.append(value) or [value]
desync.check_values(optimizer)
assert "'zo_dummy': 5" in compared[0]
"""


@pytest.mark.slow
def test_a_new_one_touches_its_declaration_and_its_use(tmp_path: Path) -> None:
    package = tmp_path / "addax_ds"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "addax_ds", package, ignore=ignored)
    for name, place, text in ADDITIONS:
        content = (package / name).read_text()
        assert content.count(place) == 1, place
        (package / name).write_text(content.replace(place, text + place))
    assert len({name for name, _, _ in ADDITIONS}) == 2
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", KNOWN_EVERYWHERE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


def test_the_three_declarations_agree() -> None:
    types = get_type_hints(Hyperparameters)
    arguments = get_type_hints(HyperparameterKwargs)
    assert arguments == {name: kind for name, kind in types.items() if name != "lr"}
    for name, kind in get_type_hints(HyperparameterFlags).items():
        assert set(get_args(kind)) - {type(None)} in ({types[name]}, set(get_args(types[name])))
    trainers = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(HyperparameterFlags)}
    assert {known.flag for known in HYPERPARAMETERS} - trainers == own


def test_the_optimizer_has_them_as_attributes(plain: Callable[..., Addax]) -> None:
    values = {"alpha": 0.5, "zo_eps": 0.1, "seed": 3, "rounding": "nearest"}
    values |= {"max_grad_norm": 2.0, "zo_directions": 2}
    optimizer = plain(lr=0.1, weight_decay=0.2, **values)
    assert optimizer.hyperparameters == values
    assert {name: getattr(optimizer, name) for name in values} == values
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
    assert plain(lr=0.1).hyperparameters == {
        known.name: known.default for known in HYPERPARAMETERS if not known.by_group
    }
    with pytest.raises(TypeError, match="alhpa"):
        plain(lr=0.1, alhpa=0.5)


@pytest.fixture
def plain() -> Callable[..., Addax]:
    return lambda **options: Addax([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", float("inf")),
        ("alpha", "0.5"),
        ("alpha", True),
        ("zo_eps", float("nan")),
        ("weight_decay", 10**400),
        ("seed", 0.0),
        ("seed", 2**64),
        ("rounding", None),
        ("max_grad_norm", "auto"),
    ],
)
def test_values_out_of_range(name: str, value: object) -> None:
    said = rf"{name} = .*: it must be {re.escape(BY_NAME[name].expected)}\."
    with pytest.raises(UserError, match=said):
        Hyperparameters(**{"lr": 0.1, name: value})  # type: ignore[arg-type]
