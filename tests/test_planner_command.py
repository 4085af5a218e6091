"""``launch/plan.py``: its table and its JSON, and the mistakes that it refuses."""

import json

import pytest
from transformers import OPTConfig

from addax_ds.errors import UserError
from addax_ds.planner.cli import main, plan
from tests.test_planner import SMALL

WORDS = ["--gpus", "2", "--gpu_memory", "1", "--reserve", "0.1", "--length", "256"]


@pytest.fixture
def folder(tmp_path) -> str:
    OPTConfig(**SMALL).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2", "none"])
def test_the_table_has_a_line_for_each_method_that_runs(folder, capsys, sharding):
    main(["--model", folder, *WORDS, "--sharding", sharding, "--length_threshold", "64"])
    lines = capsys.readouterr().out.splitlines()
    methods = [line.split()[0] for line in lines if " yes " in line]
    stock = ["sgd", "adamw"] if sharding == "zero3" else []
    assert methods == ["addax", "addax-wa", "mezo", "ip-sgd", *stock]


def test_json_says_the_same_in_bytes(folder):
    result = json.loads(plan(["--model", folder, *WORDS, "--json"]))
    for method in result["methods"]:
        assert sum(method["bytes"].values()) == method["total"]
        assert method["fits"] == (method["total"] <= 9 * 10**8)
    (addax,) = (m for m in result["methods"] if m["method"] == "addax")
    assert addax["first_order_length"] == 240  # all of it fits, but some has to be longer


def test_json_repeats_what_was_asked(folder):
    asked = {"target_tokens": 3, "gradient_accumulation_steps": 2, "length_threshold": 64}
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    result = json.loads(plan(["--model", folder, *WORDS, *words, "--json"]))
    assert {name: result[name] for name in asked} == asked
    assert json.loads(plan(["--model", folder, *WORDS, "--json"]))["length_threshold"] is None


def test_a_short_length_can_be_planned_with_a_threshold(folder):
    words = ["--length", "16", "--length_threshold", "8", "--methods", "addax", "--json"]
    (addax,) = json.loads(plan(["--model", folder, *WORDS, *words]))["methods"]
    assert addax["first_order_length"] == 8


def test_the_tied_gradient_of_opt_66b_has_less_than_a_gigabyte():
    words = "--model opt-66b --sharding none --methods ip-sgd --length 64 --json"
    result = json.loads(plan([*words.split(), "--per_device_train_batch_size", "1"]))
    assert result["embedding_gradient"] == 50272 * 9216 * 2
    (method,) = result["methods"]
    # Of the output projection, of the input, and their sum.
    assert method["bytes"]["gradients"] == 3 * 50272 * 9216 * 2


def test_gpus_needed_is_where_it_starts_to_fit(folder):
    words = ["--model", folder, *WORDS, "--methods", "adamw", "--json"]
    memory = json.loads(plan(words))["methods"][0]["total"]
    tight = [*words, "--gpu_memory", str((memory - 1) / 1e9), "--reserve", "0"]
    (result,) = json.loads(plan(tight))["methods"]
    assert not result["fits"]
    assert result["gpus_needed"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--length", "1000"], "takes 2 to 512 tokens"),
        (["--length_threshold", "256"], "not below --length"),
        (["--length", "16"], "L_T is looked for in multiples of 16"),
        (["--methods", "mezo", "--length_threshold", "64"], "--length_threshold has no effect"),
        (["--methods", "sgd", "--per_device_zo_batch_size", "2"], "zo_batch_size has no effect"),
        (
            [
                *("--methods", "mezo"),
                *("--per_device_zo_batch_size", "2", "--per_device_train_batch_size", "2"),
            ],
            "--per_device_train_batch_size has no effect",
        ),
        (["--sharding", "fsdp2", "--methods", "adamw"], "zero3 alone"),
        (["--sharding", "fsdp2", "--deepspeed", "x.json"], "no effect"),
        (["--reserve", "2"], "--reserve"),
        (["--method", "adamw"], "Unrecognized arguments"),
        (["--deepspeed", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_are_sentences(folder, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["--model", folder, *WORDS, *words])
    assert message in capsys.readouterr().err


def test_nvme_is_refused(folder, tmp_path):
    path = tmp_path / "nvme.json"
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match="NVMe"):
        plan(["--model", folder, *WORDS, "--deepspeed", str(path)])


def test_the_deepspeed_json_is_heeded(folder, tmp_path):
    path = tmp_path / "zero3.json"
    zero = {
        "stage": 3,
        "reduce_bucket_size": 12345,
        "stage3_prefetch_bucket_size": "auto",
        "memory_efficient_linear": False,
        "offload_param": {"device": "cpu"},
    }
    path.write_text(json.dumps({"zero_optimization": zero}))
    words = ["--model", folder, *WORDS, "--json", "--deepspeed", str(path), "--methods", "mezo"]
    result = json.loads(plan(words))
    assert result["zero_optimization"]["reduce_bucket_size"] == 12345
    assert result["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * 64**2)
    assert result["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000
    assert result["zero_optimization"]["memory_efficient_linear"] is False
    (mezo,) = result["methods"]
    assert mezo["bytes"]["buckets"] == 2 * 12345
    assert mezo["host_per_node"] > 0
