"""The recommended way, and what the planner says of the others, against counts by hand."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import OPTConfig

from addax_ds.cli.plan import plan
from addax_ds.config.deepspeed import automatic_sizes
from addax_ds.planner import recommend
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import ModelShape, find_shape
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings
from addax_ds.utils.errors import UserError
from tests.planner.test_memory import SMALL

# Wide enough that weights are not everything beside the activations of 256 tokens.
WIDE = {**SMALL, "hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128}
LENGTH, L_T = 256, 240
ALONE = ["--gpus", "1", "--sharding", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("wide")
    OPTConfig(**WIDE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def shape(folder) -> ModelShape:
    return find_shape(folder)


def needed(
    shape: ModelShape, method: str, *, gpus: int = 1, rows: int = 1, threshold: int = L_T, **more
) -> int:
    """Bytes of a step, as the plan without a recommendation has them."""
    zeroth = Batch(1, LENGTH, LENGTH - 1) if method in ("addax", "mezo") else None
    length = {"addax": threshold, "mezo": None}.get(method, LENGTH)
    first = None if length is None else Batch(rows, length, length - 1)
    sizes = Zero3Settings.from_json(automatic_sizes(shape.hidden), shape.hidden)
    zero3 = replace(sizes, offload=more.pop("offload", False))
    sharding = "none" if gpus == 1 else "zero3"
    return step_memory(
        StepSpec(shape, method, sharding, gpus, zeroth, first, zero3=zero3, **more)
    ).total


def recommendation(folder: str, budget: int | None = None, *more: str) -> dict[str, Any]:
    words = ["--model", folder, "--length", str(LENGTH), "--length_threshold", str(L_T)]
    words += ["--per_device_train_batch_size", "1", "--reserve", "0", "--recommend", "--json"]
    if budget is not None:
        words += ["--gpu_memory", repr((budget + 0.5) / 1e9)]
    return json.loads(plan([*words, *more]))


def test_the_plainest_way_that_fits_is_recommended(shape, folder):
    """On one GPU without DeepSpeed, from plenty of memory down to too little."""
    plain = needed(shape, "ip-sgd")
    recomputed = needed(shape, "ip-sgd", checkpointing=True)
    addax = needed(shape, "addax", checkpointing=True)
    mezo = needed(shape, "mezo")
    assert plain > recomputed > addax > mezo
    for budget, expected in (
        (80 * 10**9, "ip-sgd"),
        (plain, "ip-sgd"),
        (plain - 1, "ip-sgd, checkpointing"),
        (recomputed, "ip-sgd, checkpointing"),
        (recomputed - 1, f"addax, L_T {L_T}, checkpointing"),
        (addax, f"addax, L_T {L_T}, checkpointing"),
        (addax - 1, "mezo"),
        (mezo, "mezo"),
        (mezo - 1, None),
    ):
        found = recommendation(folder, budget, *ALONE)
        assert found["recommended"] == expected
        for option in found["options"]:
            assert option["fits"] == (option["total"] <= budget)
    totals = {option["name"]: option["total"] for option in found["options"]}
    assert totals["ip-sgd"] == plain
    assert totals["ip-sgd, checkpointing"] == recomputed
    assert totals[f"addax, L_T {L_T}"] == needed(shape, "addax")
    assert totals[f"addax, L_T {L_T}, checkpointing"] == addax
    assert totals["mezo"] == mezo


def test_addax_recomputes_where_that_makes_l_t_larger(shape, folder):
    """A given L_T takes the cheaper way; one that is looked for is the largest that fits."""
    budget = needed(shape, "ip-sgd", checkpointing=True) - 1
    found = recommendation(folder, budget, *ALONE, "--length_threshold", "64")
    assert found["recommended"] == "addax, L_T 64"
    budget = needed(shape, "addax", checkpointing=True, threshold=224)
    assert budget < needed(shape, "addax", checkpointing=True, threshold=240)
    words = ["--model", folder, "--length", str(LENGTH), "--per_device_train_batch_size", "1"]
    words += ["--gpu_memory", repr((budget + 0.5) / 1e9), "--reserve", "0", "--recommend"]
    text = plan([*words, *ALONE])
    assert "Recommended: addax, L_T 224, checkpointing (--method addax --length_threshold" in text
    assert "Rows of more than 224 tokens are zeroth-order" in text


def test_fewer_rows_first_order_come_before_a_zeroth_order_part(shape, folder):
    two = needed(shape, "ip-sgd", checkpointing=True, rows=2)
    words = [*ALONE, "--per_device_train_batch_size", "3", "--per_device_zo_batch_size", "1"]
    found = recommendation(folder, two, *words)
    assert found["recommended"] == "ip-sgd, checkpointing, 2 row(s)"
    (way,) = (o for o in found["options"] if o["name"] == found["recommended"])
    assert "--per_device_train_batch_size 2" in way["flags"]


def test_of_many_rows_few_numbers_are_planned(shape, folder, monkeypatch):
    budget = needed(shape, "ip-sgd", checkpointing=True, rows=37)
    asked = []

    def noted(spec: StepSpec) -> Any:
        asked.append(spec)
        return step_memory(spec)

    monkeypatch.setattr(recommend, "step_memory", noted)
    words = [*ALONE, "--per_device_train_batch_size", "500", "--per_device_zo_batch_size", "1"]
    found = recommendation(folder, budget, *words)
    assert found["recommended"] == "ip-sgd, checkpointing, 37 row(s)"
    assert len(asked) < 30


@pytest.mark.slow
def test_a_small_model_on_a_large_gpu_needs_nothing_but_the_plain_method():
    assert recommendation("facebook/opt-125m", None, "--gpus", "1")["recommended"] == "adamw"


def test_weights_in_host_memory_are_recommended_where_it_is_known_to_suffice(shape, folder):
    """They let every row be first-order; without the node's memory they are only named."""
    offloaded = needed(shape, "ip-sgd", gpus=2, checkpointing=True, offload=True)
    assert offloaded < needed(shape, "ip-sgd", gpus=2, checkpointing=True)
    words, name = ["--gpus", "2"], "ip-sgd, checkpointing, offload"
    found = recommendation(folder, offloaded, *words, "--host_memory", "1")
    assert found["recommended"] == name
    (way,) = (o for o in found["options"] if o["name"] == name)
    too_little = repr((way["host"] - 1) / 1e9)
    for more in ([], ["--host_memory", too_little]):
        assert recommendation(folder, offloaded, *words, *more)["recommended"] != name
    words += ["--model", folder, "--length", str(LENGTH), "--reserve", "0", "--recommend"]
    words += ["--gpu_memory", repr((offloaded + 0.5) / 1e9), "--per_device_train_batch_size", "1"]
    text = plan([*words, "--length_threshold", str(L_T)])
    assert f"of host memory a node {name} fits, too" in text


def test_the_flag_of_the_back_end_puts_weights_into_host_memory(folder):
    for sharding, flag in (("zero3", "--deepspeed zero3_offload"), ("fsdp2", "--cpu_offload")):
        words = ["--gpus", "2", "--sharding", sharding, "--host_memory", "1"]
        options = {o["name"]: o for o in recommendation(folder, None, *words)["options"]}
        assert options["mezo, offload"]["flags"] == f"--method mezo {flag}"
        assert options["mezo, offload"]["host"] > options["mezo"]["host"] == 0


def test_time_and_traffic_are_those_of_the_passes(shape, folder):
    words = ["--gpus", "4", "--sharding", "fsdp2", "--per_device_zo_batch_size", "2"]
    words += ["--per_device_train_batch_size", "4"]
    options = {o["name"]: o for o in recommendation(folder, None, *words)["options"]}
    long, short = 2 * LENGTH, 4 * L_T
    weights = 2 * shape.parameters * 3 / 4
    for name, units, rounds in (
        ("ip-sgd", 3, 3),
        ("ip-sgd, checkpointing", 4, 3),
        (f"addax, L_T {L_T}", (2 * long + 3 * short) / (long + short), 5),
        (f"addax, L_T {L_T}, checkpointing", (2 * long + 4 * short) / (long + short), 5),
        ("mezo", 2, 2),
        ("LoRA (r 8) with AdamW, checkpointing", 4, 2),
    ):
        assert options[name]["units"] == pytest.approx(units)
        assert options[name]["moved"] == pytest.approx(rounds * weights, rel=1e-6)


def test_what_other_packages_need_is_their_states_beside_checkpointed_steps(shape, folder):
    options = {o["name"]: o for o in recommendation(folder, None, *ALONE)["options"]}
    base = options["ip-sgd, checkpointing"]["total"]
    # Four projections of 128 x 128 in each of three layers, and 128 x 512 twice.
    adapters = 3 * 8 * (4 * (128 + 128) + 2 * (128 + 512))
    for name, more in (("LoRA (r 8) with", 16 * adapters), ("8-bit", 4 * shape.parameters)):
        (way,) = (o for n, o in options.items() if n.startswith(name))
        assert way["total"] == base + more
        assert way["flags"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "mezo"], "--methods has no effect with --recommend"),
        (["--activation_checkpointing"], "_checkpointing has no effect with --recommend"),
        (["--sharding", "none", "--host_memory", "9"], "--host_memory has no effect without"),
    ],
)
def test_flags_without_effect_are_refused(folder, words, message):
    with pytest.raises(UserError, match=message):
        recommendation(folder, None, *words)


def test_rows_too_short_for_a_threshold_are_recommended_for_as_well(folder):
    words = ["--model", str(folder), "--gpus", "2", "--length", "16", "--recommend"]
    result = json.loads(plan([*words, "--json"]))
    names = [option["name"] for option in result["options"]]
    assert result["recommended"] in names
    assert not any(name.startswith("addax") for name in names)
    assert result["gpus"] == 2
    assert result["versions"]["torch"] == torch.__version__
    assert "0.00 " not in plan(words).split("time:")[0]
