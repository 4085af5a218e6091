"""What a training reports of its costs, counted by hand."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import addax_ds
from addax_ds.data.batches import StepBatches, StepSchedule
from addax_ds.data.examples import Example
from addax_ds.data.train_rows import EncodedRows
from addax_ds.training.costs import CostMeter, Costs, peak_memory
from addax_ds.training.trainer import AddaxTrainer


def examples(lengths: list[int]) -> list[Example]:
    return [
        Example(np.full(n, 7, np.int32), np.full(n, 7, np.int32), f"row {i}")
        for i, n in enumerate(lengths)
    ]


def test_tokens_of_a_step_are_those_of_its_rows_on_all_ranks():
    """The last batch of an epoch is short; padding and filler rows do not count."""
    rows = examples([30, 41, 52, 5, 6, 7, 8, 9])
    schedule = StepSchedule(np.arange(3), np.arange(3, 8), 2, 2, seed=1)
    by_rank = [StepBatches(EncodedRows(rows, 0), schedule, rank, 2) for rank in range(2)]
    for step in range(2 * schedule.steps_per_epoch):
        seen = sum(
            rows[row].length
            for batches in by_rank
            for stream in ("zeroth_order", "first_order")
            for row in batches.indices(step, stream, 0)
        )
        assert [sum(batches.tokens(step).values()) for batches in by_rank] == [seen, seen]


def test_without_a_stream_there_are_no_tokens_of_it():
    schedule = StepSchedule(np.arange(2), np.arange(0), 2, 2, seed=1)
    batches = StepBatches(EncodedRows(examples([3, 4]), 0), schedule, 0, 1)
    assert batches.tokens(0) == {"zeroth_order": 7, "first_order": 0}


def test_only_what_lies_between_start_and_stop_counts(monkeypatch):
    clock = iter([10.0, 12.5, 100.0, 101.0])
    cpu_clock = iter([1.0, 2.0, 7.0, 7.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu_clock))
    meter = CostMeter(torch.device("cpu"))
    meter.resume(Costs(5.0, 3.0, 40))
    for tokens in (7, 9):
        meter.start()
        meter.stop(tokens)
    assert meter.costs == Costs(8.5, 4.5, 56)
    report = meter.report()
    assert report["train_tokens"] == 56
    assert report["train_seconds"] == 8.5
    assert meter.before == Costs(5.0, 3.0, 40)
    meter.reset()
    assert meter.costs == meter.before == Costs()


def test_the_peak_of_memory_on_a_cpu():
    lines = Path("/proc/self/status").read_text().splitlines()
    (high_water,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(1024 * high_water, rel=0.02)


@pytest.mark.parametrize(
    ("options", "streams", "operations"),
    [
        ({"alpha": 0.5}, ("zeroth_order", "first_order"), 4 * 30 + 6 * 10),
        ({"alpha": 0.5, "zo_directions": 3}, ("zeroth_order", "first_order"), 12 * 30 + 6 * 10),
        ({"alpha": 0.5, "max_grad_norm": 1.0}, ("zeroth_order", "first_order"), 4 * 30 + 12 * 10),
        ({"alpha": 0.5, "recomputes": True}, ("zeroth_order", "first_order"), 4 * 30 + 8 * 10),
        ({"alpha": 1.0}, ("zeroth_order",), 4 * 30),
        ({"alpha": 0.0}, ("first_order",), 6 * 10),
        ({"alpha": 0.0}, ("zeroth_order", "first_order"), 6 * 10),
    ],
)
def test_operations_are_those_of_forwards_and_backwards(options, streams, operations):
    """A parameter and token: 2 in each zeroth-order pass, 6 in a forward and its backward.

    To clip takes both twice, and to recompute takes 2 more.
    """
    recomputes = options.get("recomputes", False)
    options = {name: value for name, value in options.items() if name != "recomputes"}
    model = torch.nn.Linear(3, 2)  # 8 parameters
    optimizer = addax_ds.Addax(model.parameters(), lr=0.1, **options)
    addax_ds.attach(optimizer, model)
    tokens = {"zeroth_order": [(3, 6), (2, 6)], "first_order": [(5, 2)]}
    inputs = {
        name: [{"input_ids": torch.zeros(shape, dtype=torch.long)} for shape in tokens[name]]
        for name in streams
    }
    trainer: Any = SimpleNamespace(
        addax=optimizer,
        args=SimpleNamespace(activation_checkpointing=recomputes, gradient_checkpointing=False),
        settings=SimpleNamespace(gradient_accumulation_steps=1),
    )
    trainer._units = partial(AddaxTrainer._units, trainer)
    assert AddaxTrainer.floating_point_ops(trainer, inputs) == 8 * operations
