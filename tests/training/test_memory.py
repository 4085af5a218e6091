"""What a run says of the memory it takes, before it trains."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from addax_ds import UserError
from addax_ds.config.settings import AddaxSettings
from addax_ds.optim.hyperparameters import Hyperparameters
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch
from addax_ds.sharding.layout import Layout
from addax_ds.training import memory as run_memory
from addax_ds.training.memory import describe, free_memory, simpler_way, spec_of_run
from tests.support.tiny import examples, rows, tiny_model

DATA = sorted(examples(rows(7, 9)), key=lambda example: example.length)
SHORT, LONG = DATA[:5], DATA[5:]
ARGS = SimpleNamespace(
    world_size=2,
    device=torch.device("cpu"),
    bf16=True,
    fp16=False,
    per_device_train_batch_size=4,
    activation_checkpointing=False,
)


def with_settings(settings: AddaxSettings) -> Any:
    return SimpleNamespace(**vars(ARGS), settings=settings)


def largest(rows: int, stream: list) -> Batch:
    return Batch(rows, max(e.length for e in stream), max(e.target_count for e in stream))


@pytest.mark.parametrize(
    ("method", "zeroth", "first"),
    [
        ("addax", largest(3, LONG), largest(4, SHORT)),
        ("mezo", largest(3, DATA), None),
        ("ip-sgd", None, largest(4, DATA)),
    ],
)
def test_the_largest_batch_of_each_stream_is_planned(method, zeroth, first):
    config = tiny_model("opt").config
    streams = {"addax": (LONG, SHORT), "mezo": (DATA, []), "ip-sgd": ([], DATA)}[method]
    settings = AddaxSettings(method, Hyperparameters(lr=0.1), None, 3)
    spec = spec_of_run(config, None, Layout("fsdp2"), streams, with_settings(settings))
    assert spec == StepSpec(
        shape=shape_of(config, config.name_or_path or "the model", "bf16"),
        method=method,
        sharding="fsdp2",
        ranks=2,
        zeroth_order=zeroth,
        first_order=first,
        cuda=False,
    )


def test_the_peak_is_told_with_its_parts_and_what_is_free(monkeypatch):
    config = tiny_model("opt", hidden_size=256, ffn_dim=1024, vocab_size=50000).config
    settings = AddaxSettings("ip-sgd", Hyperparameters(lr=0.1), None, 0)
    spec = spec_of_run(config, None, Layout(), ([], DATA), with_settings(settings))
    memory = step_memory(spec)
    # Two ranks share it, and each keeps 2 GB for what is not a tensor.
    there = 2 * (2_000_000_000 + memory.total) + 2
    monkeypatch.setattr(run_memory, "available", lambda: there)
    said = describe(spec, free_memory(torch.device("cpu"), 2)[0])
    assert said.startswith(f"{memory.total / 1e9:.2f} GB of tensors on a rank when they are most")
    assert f"weights {memory.categories['weights'] / 1e9:.2f}" in said
    assert "host" not in said
    assert said.endswith(f"; {memory.total / 1e9:.2f} GB are free for them")
    assert describe(spec, 50_000_000).endswith("; only 0.05 GB are free for them")
    assert describe(spec, None).endswith(")")


def test_in_place_sgd_is_named_where_every_row_fits_through_backward():
    config = tiny_model("opt", hidden_size=256, ffn_dim=1024, num_hidden_layers=4).config
    settings = AddaxSettings("addax", Hyperparameters(lr=0.1), None, 3)
    spec = spec_of_run(config, None, Layout(), (LONG, SHORT), with_settings(settings))
    every = largest(3 + 4, DATA)
    plain = replace(spec, method="ip-sgd", zeroth_order=None, first_order=every)
    whole, recomputed = (
        step_memory(replace(plain, checkpointing=each)).total for each in (False, True)
    )
    assert recomputed < whole
    said = simpler_way(spec, whole)
    assert said is not None
    assert said.startswith("--method ip-sgd --per_device_train_batch_size 7 would fit, ")
    needs = f"{whole / 1e9:.2f} GB of tensors on a rank at up to {every.length} tokens"
    assert said.endswith(needs)
    said = simpler_way(spec, (whole + recomputed) // 2)
    assert said is not None
    assert "_batch_size 7 --activation_checkpointing would fit" in said
    assert simpler_way(spec, recomputed - 1) is None
    assert simpler_way(plain, whole) is None


def test_a_model_that_cannot_be_planned():
    config = tiny_model("opt").config
    config.num_attention_heads = 5
    settings = AddaxSettings("ip-sgd", Hyperparameters(lr=0.1), None, 0)
    with pytest.raises(UserError, match="cannot build this model without its weights"):
        spec_of_run(config, None, Layout(), ([], DATA), with_settings(settings))
