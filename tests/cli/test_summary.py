"""Messages about a run before it starts."""

import logging
import re
import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from addax_ds.checkpoint.identity import Run
from addax_ds.cli import summary, train
from addax_ds.config.arguments import _check_launcher
from addax_ds.distributed import collectives
from addax_ds.planner.trace import trace
from addax_ds.training.costs import Costs
from tests.support.tiny import rows, write_model, write_rows


@pytest.mark.parametrize(("directions", "said"), [(1, ""), (4, ", directions 4")])
def test_the_method_is_announced_with_its_directions(directions, said):
    run = Run(
        sharding="none",
        ranks=2,
        dtype="bf16",
        method="addax-wa",
        data_seed=0,
        drop_last=False,
        zeroth_order_batch=6,
        first_order_batch=4,
        hyperparameters={"alpha": 0.5, "zo_eps": 1e-3, "zo_directions": directions},
    )
    args: Any = SimpleNamespace(learning_rate=0.1, max_steps=7, find_learning_rate=False)
    schedule: Any = None  # for trainings without max_steps
    assert summary._method(args, run, schedule) == (
        f"addax-wa, alpha 0.5, zo_eps 0.001{said}, learning rate 0.1, K0 6, K1 4, ranks 2, steps 7"
    )


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("addax_ds"), "propagate", True)
    caplog.set_level(logging.INFO, logger="addax_ds")
    return caplog


DEEPSPEED, TORCHRUN = {"CROSS_SIZE": "1"}, {"TORCHELASTIC_RUN_ID": "none"}
PATIENT = {**TORCHRUN, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


@pytest.mark.parametrize(
    ("environment", "step", "checkpoint", "warned"),
    [
        ({}, 100.0, 100.0, None),
        (DEEPSPEED, 2.0, 20.0, None),
        (DEEPSPEED, 12.0, None, "takes 12.0 s, and deepspeed kills the ranks 30 s after"),
        (DEEPSPEED, 2.0, 29.0, "takes 2.0 s and a checkpoint 29.0 s, and deepspeed kills the"),
        (TORCHRUN, 12.0, None, "takes 12.0 s, and torchrun kills the ranks 30 s after"),
        (PATIENT, 100.0, 100.0, None),
    ],
)
def test_a_launcher_s_patience_is_told_where_it_may_end(
    environment, step, checkpoint, warned, said, monkeypatch
):
    for name in (*PATIENT, *DEEPSPEED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    clock = [0.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: clock[0])
    meter: Any = SimpleNamespace(costs=Costs())
    callback = summary.Duration(meter)
    for number in range(1, 8):
        meter.costs = Costs(train_seconds=number * step)
        callback.on_step_end(None, SimpleNamespace(global_step=number, max_steps=9), None)
    if checkpoint is not None:
        for _ in range(2):
            clock[0] += 50.0
            callback.on_evaluate(None, None, None)
            clock[0] += checkpoint
            callback.on_save(None, None, None)
    assert said.text.count("kills the ranks") == (warned is not None)
    assert (warned or "A step takes") in said.text


def test_whole_models_on_several_ranks_are_warned_of_unless_asked_for(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for sharding, deepspeed in (("none", False), ("fsdp2", False), (None, True)):
        _check_launcher(sharding, deepspeed)
    assert not said.records
    _check_launcher(None, False)
    assert "Each of the 2 ranks holds the whole model" in said.text
    assert "--deepspeed zero3 or --sharding fsdp2; or --sharding none" in said.text
    said.clear()
    monkeypatch.setenv("WORLD_SIZE", "1")
    _check_launcher(None, False)
    assert not said.records


@pytest.mark.usefixtures("program_alone")
def test_a_run_names_its_back_end_widened_weights_and_rows_left_out(tmp_path, capsys):
    model = write_model(tmp_path / "model", dtype=torch.bfloat16)
    data = write_rows(tmp_path / "train.jsonl", rows(4, 4))
    flags = ["--method=ip-sgd", "--learning_rate=0.1", "--max_steps=1", "--save_strategy=no"]
    flags += [f"--model_name_or_path={model}", f"--train_file={data}", "--use_cpu"]
    flags += [f"--output_dir={tmp_path}", "--report_to=none", "--per_device_train_batch_size=2"]
    widened = "The model's files have weights of bfloat16, and they are trained in fp32"
    short = "--length_threshold=12"
    for more, warned in (([], True), (["--bf16=False", short], False), (["--bf16"], False)):
        train.main([*flags, *more])
        output = capsys.readouterr().err
        assert output.count("Left out, longer than L_T = 12: 4 sequences") == (short in more)
        summary = "Left out: 4 of the 8 training examples, longer than L_T = 12"
        assert output.count(summary) == (short in more)
        assert (widened in output) == warned
        assert "Ranks: 1, sharding none: the whole model on each" in output


@pytest.mark.usefixtures("program_alone")
def test_a_model_that_cannot_be_planned_trains_and_ranks_wait_for_the_planner(
    tmp_path, capsys, monkeypatch
):
    trace.cache_clear()
    monkeypatch.setattr("addax_ds.planner.trace.MOST_OPERATIONS", 10)
    waits: list[float] = []
    monkeypatch.setattr(collectives, "limit_waiting", waits.append)
    waited = []

    def announce(*arguments: Any) -> None:
        waited.append(waits[-1])
        summary.announce(*arguments)

    monkeypatch.setattr(train, "announce", announce)
    flags = ["--method=addax-wa", "--learning_rate=0.1", "--max_steps=1", "--save_strategy=no"]
    flags += [f"--model_name_or_path={write_model(tmp_path / 'model')}", "--report_to=none"]
    flags += [f"--train_file={write_rows(tmp_path / 'rows.jsonl', rows(4, 4))}", "--use_cpu"]
    flags += ["--per_device_train_batch_size=2", f"--output_dir={tmp_path / 'output'}"]
    train.main([*flags, "--ddp_timeout=77"])
    said = capsys.readouterr().err
    assert re.search(r"^Memory: not planned, .* cannot be planned with 2 row\(s\)", said, re.M)
    assert "Trained 1 steps" in said
    assert waited[0] > 24 * 3600
    assert waits[-1] == 77


@pytest.mark.usefixtures("program_alone")
def test_a_search_for_the_learning_rate_says_what_it_saw_and_writes_nothing(
    tmp_path, capsys, monkeypatch
):
    """As a module, as ``deepspeed --module`` and ``torchrun -m`` run the command."""
    output = tmp_path / "output"
    flags = ["--method=ip-sgd", "--find_learning_rate", "--per_device_train_batch_size=2"]
    flags += [f"--model_name_or_path={write_model(tmp_path / 'model')}", f"--output_dir={output}"]
    flags += [f"--train_file={write_rows(tmp_path / 'rows.jsonl', rows(4, 8))}", "--use_cpu"]
    monkeypatch.setattr("sys.argv", ["train", *flags])
    of_another_run = output / "_unfinished" / "checkpoint-5"
    of_another_run.mkdir(parents=True)
    runpy.run_module("addax_ds.cli.train", run_name="__main__")
    said = capsys.readouterr().err
    assert "learning rate to be found" in said
    (proposed,) = re.findall(r"^The lowest loss: --learning_rate (\S+?)[.,]? ", said, re.M)
    table = dict(re.findall(r"^ +(before|[\d.e-]+): ([\d.]+)$", said, re.M))
    assert min(table, key=lambda rate: float(table[rate])) == proposed
    assert list(output.rglob("*")) == [of_another_run.parent, of_another_run]
