"""``launch/plan.py``: its table and its JSON, and the mistakes that it refuses."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import MixtralConfig, OPTConfig, RwkvConfig

from addax_ds.cli.plan import main, plan
from addax_ds.utils.errors import UserError
from tests.planner.test_memory import SMALL
from tests.support.ranks import ROOT
from tests.support.tiny import write_byte_model, write_rows

WORDS = ["--gpus", "2", "--gpu_memory", "1", "--reserve", "0.1", "--length", "256"]


@pytest.fixture
def folder(tmp_path) -> str:
    OPTConfig(**SMALL).save_pretrained(tmp_path)
    return str(tmp_path)


def planned(*words: str) -> dict[str, Any]:
    """Return what ``--json`` says."""
    return json.loads(plan([*words, "--json"]))


def ds_json(path: Path, **zero: Any) -> str:
    """Write a DeepSpeed JSON and return its path."""
    config = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, **zero}}
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("sharding", ["zero3", "fsdp2", "none"])
def test_the_table_has_a_line_for_each_method_that_runs(folder, capsys, sharding):
    main(["--model", folder, *WORDS, "--sharding", sharding, "--length_threshold", "64"])
    lines = capsys.readouterr().out.splitlines()
    methods = [line.split()[0] for line in lines if " yes " in line]
    stock = ["sgd", "adamw"] if sharding == "zero3" else []
    assert methods == ["addax", "addax-wa", "mezo", "ip-sgd", *stock]
    left_out = [line.split()[2] for line in lines if line.startswith("Not planned: ")]
    assert left_out == ([] if stock else ["sgd,", "adamw,"])


@pytest.mark.slow
def test_standard_output_holds_the_json_alone(folder):
    """Also where DeepSpeed has to find an accelerator, and warns that there is none."""
    alone = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    command = [sys.executable, "launch/plan.py", "--model", folder, *WORDS, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == folder


def test_json_names_the_methods_that_are_left_out(folder):
    words = ["--model", folder, *WORDS, "--sharding", "fsdp2", "--methods", "adamw", "ip-sgd"]
    result = planned(*words)
    assert [method["method"] for method in result["methods"]] == ["ip-sgd"]
    assert result["not_planned"].keys() == {"adamw"}
    assert "--sharding zero3" in result["not_planned"]["adamw"]


def test_a_method_is_planned_once(folder):
    result = planned("--model", folder, *WORDS, "--methods", "mezo", "ip-sgd", "mezo")
    assert [method["method"] for method in result["methods"]] == ["mezo", "ip-sgd"]


def test_a_small_model_is_told_in_megabytes(folder):
    words = ["--model", folder, *WORDS, "--methods", "ip-sgd"]
    (method,) = planned(*words)["methods"]
    head, batches, _, titles, cells, _, notes, *_ = plan(words).splitlines()
    assert "0.215 million parameters" in head
    assert batches == "first-order 8 x 256 tokens"
    row = dict(zip(titles.split(), cells.split(), strict=False))
    assert float(row["total"]) == pytest.approx(method["total"] / 1e6, abs=0.005)
    assert float(row["weights"]) == pytest.approx(method["bytes"]["weights"] / 1e6, abs=0.005)
    assert notes.startswith("MB (1e6 bytes) of live tensors")


@pytest.mark.parametrize(
    ("methods", "batches"),
    [
        ("mezo", "zeroth-order 3 x 256 tokens"),
        ("addax", "zeroth-order 3 x 256 tokens, first-order of addax 3 x 64 tokens (L_T)"),
        (
            "addax addax-wa",
            "zeroth-order 3 x 256 tokens, first-order 3 x 256 tokens, "
            "first-order of addax 3 x 64 tokens (L_T)",
        ),
    ],
)
def test_the_heading_names_the_batches_there_are(folder, methods, batches):
    words = ["--model", folder, *WORDS, "--methods", *methods.split()]
    words += ["--per_device_train_batch_size", "3"]
    words += ["--length_threshold", "64"] if "addax" in methods else []
    assert plan(words).splitlines()[1] == batches


def test_the_largest_gradient_need_not_be_the_embeddings(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8}
    MixtralConfig(vocab_size=301, **sizes, **heads).save_pretrained(tmp_path)
    text = plan(["--model", str(tmp_path), *WORDS, "--methods", "ip-sgd"])
    assert f"gradient of the output projection has {301 * 64 * 2 / 1e6:.2f} MB." in text
    experts = 8 * 2 * 128 * 64 * 2  # gate and up projection of all experts, fused
    assert f"largest whole gradient of a parameter has {experts / 1e6:.2f} MB." in text


def test_json_says_the_same_in_bytes(folder):
    result = planned("--model", folder, *WORDS)
    for method in result["methods"]:
        assert sum(method["bytes"].values()) == method["total"]
        checkpointed = method["bytes_with_checkpointing"]
        assert sum(checkpointed.values()) == method["total_with_checkpointing"]
        assert method["fits"] == (method["total"] <= 9 * 10**8)
    (addax,) = (m for m in result["methods"] if m["method"] == "addax")
    assert addax["first_order_length"] == 240  # all of it fits, but some has to be longer


def test_bytes_with_checkpointing_are_those_of_a_plan_with_it(folder):
    words = ["--model", folder, *WORDS, "--methods", "ip-sgd"]
    (plain,) = planned(*words)["methods"]
    (checkpointed,) = planned(*words, "--activation_checkpointing")["methods"]
    assert plain["bytes_with_checkpointing"] == checkpointed["bytes"] != plain["bytes"]


def test_json_says_where_and_with_what(folder):
    result = planned("--model", folder, *WORDS, "--nodes", "3", "--methods", "mezo")
    assert (result["nodes"], result["gpus_per_node"], result["gpus"]) == (3, 2, 6)
    assert result["versions"]["torch"] == metadata.version("torch")  # its own may name the build
    assert result["versions"]["transformers"] == transformers.__version__


def test_a_node_has_a_copy(folder):
    words = ["--model", folder, *WORDS, "--nodes", "3", "--methods", "mezo", "--sharding", "fsdp2"]
    of_node = planned(*words, "--replicas", "node")
    assert of_node["replicas"] == 3
    assert of_node == planned(*words, "--replicas", "3")


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


@pytest.mark.slow
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


def test_the_number_of_gpus_that_was_asked_for_is_tried(folder):
    """Others are tried in steps of 8."""
    words = ["--model", folder, *WORDS, "--methods", "adamw", "--reserve", "0", "--json"]
    one = json.loads(plan([*words, "--gpus", "12"]))["methods"][0]["total"]
    fitting = [*words, "--gpu_memory", str(one / 1e9)]
    (result,) = json.loads(plan([*fitting, "--gpus", "12"]))["methods"]
    assert (result["fits"], result["gpus_needed"]) == (True, 12)
    (other,) = json.loads(plan([*fitting, "--gpus", "16"]))["methods"]
    assert other["gpus_needed"] == 16


@pytest.mark.slow
def test_a_threshold_is_looked_up_for_the_gpus_needed(tmp_path):
    """Where no L_T fits, the output says how many GPUs are needed and what L_T they allow."""
    OPTConfig(**{**SMALL, "num_hidden_layers": 16}).save_pretrained(tmp_path)
    words = "--sharding fsdp2 --methods addax --length 80 --per_device_train_batch_size 1"
    usual = ["--model", str(tmp_path), *words.split(), "--reserve", "0"]

    def addax(gpus: int, *more: str) -> dict[str, Any]:
        return planned(*usual, "--gpus", str(gpus), *more)["methods"][0]

    budget = addax(2, "--length_threshold", "32")["total"]
    assert addax(1, "--length_threshold", "16")["total"] > budget
    tight = ["--gpu_memory", str(budget / 1e9)]
    one, two = addax(1, *tight), addax(2, *tight)
    assert (one["fits"], one["first_order_length"]) == (False, 16)
    assert (one["gpus_needed"], one["gpus_needed_for_first_order_length"]) == (2, 32)
    assert (two["fits"], two["first_order_length"]) == (True, 32)
    text = plan([*usual, "--gpus", "1", *tight])
    assert "16 tokens (L_T; a step does not fit)" in text
    assert "the largest that fits on 2 is 32 tokens" in text


@pytest.mark.slow
def test_opt_66b_on_one_gpu_needs_host_memory_that_is_not_pinned(tmp_path):
    words = (
        "--model opt-66b --gpus 1 --gpu_memory 80 --host_memory 160 --methods addax --length 64 "
        "--length_threshold 32 --per_device_train_batch_size 1"
    )

    def on_host(pin: bool) -> dict[str, Any]:
        offload = {"device": "cpu", "pin_memory": pin}
        path = ds_json(tmp_path / "offload.json", offload_param=offload)
        return planned(*words.split(), "--deepspeed", path)["methods"][0]

    pinned, pageable = on_host(True), on_host(False)
    assert (pageable["fits"], pageable["gpus_needed"]) == (True, 1)
    assert (pinned["fits"], pinned["gpus_needed"]) == (False, 2)  # each on a node of its own
    assert pinned["total"] == pageable["total"] < 76e9
    weights = 2 * 65_717_000_000
    assert weights < pageable["host_per_node"] < 160e9 < pinned["host_per_node"]


@pytest.mark.parametrize(
    ("dtype", "blocks", "message"),
    [
        ("bf16", {"bf16": {"enabled": False}}, "bf16.enabled false"),
        ("bf16", {}, "bf16.enabled not at all"),
        ("fp32", {"bf16": {"enabled": True}}, "bf16.enabled true"),
        ("bf16", {"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, "fp16.enabled true"),
        ("fp32", {}, None),
        ("fp16", {"bf16": {"enabled": False}, "fp16": {"enabled": True}}, None),
    ],
)
def test_weights_are_of_the_type_that_the_json_trains(folder, tmp_path, dtype, blocks, message):
    path = tmp_path / "dtype.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **blocks}))
    words = ["--model", folder, *WORDS, "--methods", "mezo", "--dtype", dtype]
    if message is None:
        assert planned(*words, "--deepspeed", str(path))["dtype"] == dtype
    else:
        with pytest.raises(UserError, match=f"--dtype is {dtype}, but .* has {message}: write"):
            plan([*words, "--deepspeed", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--length", "0"], "--length 0: it must be at least 2"),
        (["--length_threshold", "1"], "--length_threshold 1: it must be at least 2"),
        (["--gpu_memory", "inf"], "--gpu_memory inf: it must be a number of GB"),
        (["--gpu_memory", "nan"], "--gpu_memory nan: it must be a number of GB"),
        (["--host_memory", "0"], "--host_memory 0: it must be a number of GB"),
        (["--host_memory", "160"], "--host_memory has no effect without"),
        (["--cpu_offload"], "--cpu_offload has no effect with --sharding zero3: use fsdp2"),
        (["--replicas", "2"], "--replicas 2 cannot be planned with --sharding zero3: use fsdp2"),
        (["--sharding", "fsdp2", "--replicas", "two"], "--replicas two: it must be a number"),
        (["--sharding", "fsdp2", "--replicas", "3"], "2 ranks cannot be divided into 3 equal"),
        (["--sharding", "fsdp2", "--replicas", "2"], "would hold the whole model"),
        (["--methods", "mezo", "--activation_checkpointing"], "_checkpointing has no effect"),
        (
            ["--methods", "mezo", "adamw", "--gradient_accumulation_steps", "2"],
            "--gradient_accumulation_steps has no effect with --methods mezo adamw",
        ),
        (
            ["--dtype", "fp32", "--attn_implementation", "flash_attention_3"],
            "flash_attention_3 has kernels for bf16 and fp16, not fp32",
        ),
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
        (["--train_file", "x.jsonl"], "x.jsonl: there is no such file"),
        (["--train_file", "x.jsonl", "--deepspeed", "missing.json"], "missing.json"),
        (
            ["--train_file", "rows.jsonl", "--target_tokens", "3"],
            "--target_tokens has no effect with --train_file",
        ),
    ],
)
def test_mistakes_are_sentences(folder, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["--model", folder, *WORDS, *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--recommend"]])
def test_a_model_that_loops_over_tokens_is_refused_with_a_sentence(
    more, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("addax_ds.planner.trace.MOST_OPERATIONS", 2000)
    RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=301).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), *WORDS, *more])
    said = capsys.readouterr()
    assert "a model of type rwkv cannot be planned with 8 row(s) of " in said.err
    assert not said.out


def test_lengths_and_targets_are_those_of_a_training_file(tmp_path):
    model = str(write_byte_model(tmp_path / "model"))
    sizes = [(20, 10), (200, 30), (40, 50), (300, 5)]  # bytes, each a token; EOS is one more
    rows = [{"prompt": "p" * p, "completion": "c" * c} for p, c in sizes]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    words = ["--model", model, *WORDS[:-2], "--length_threshold", "64"]
    known = plan([*words, "--train_file", file])
    assert "\n4 training rows of 31 to 306 tokens, median 161\n" in known
    stated = plan([*words, "--length", "306", "--target_tokens", "51"])
    rows_of = json.loads(plan([*words, "--train_file", file, "--json"]))["training_rows"]
    assert rows_of == {"count": 4, "shortest": 31, "median": 161, "longest": 306}
    without_rows = [line for line in known.splitlines() if "training rows of" not in line]
    assert without_rows == stated.splitlines()
    said = plan([*words, "--train_file", file, "--recommend", "--gpu_memory", "0.103"])
    assert "Rows of more than 64 tokens, 75.0% of the training rows, are zeroth-order" in said


def test_a_training_file_needs_a_folder_with_a_tokenizer():
    with pytest.raises(UserError, match="--model facebook/opt-125m is no folder"):
        plan(["--model", "facebook/opt-125m", "--train_file", "rows.jsonl"])


def test_length_cuts_the_rows_of_a_training_file(tmp_path):
    model = str(write_byte_model(tmp_path / "model"))
    rows = [{"prompt": "p" * 300, "completion": "c" * 9}, {"prompt": "p", "completion": "c"}]
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    said = plan(["--model", model, *WORDS[:-2], "--length", "100", "--train_file", file])
    assert "2 training rows of 3 to 100 tokens" in said
    with pytest.raises(UserError, match=r"more than --length 9; shorten it, or raise --length$"):
        plan(["--model", model, *WORDS[:-2], "--length", "9", "--train_file", file])


def test_columns_of_a_training_file_may_have_other_names(tmp_path):
    model = str(write_byte_model(tmp_path / "model"))
    file = str(write_rows(tmp_path / "rows.jsonl", [{"ask": "p" * 20, "tell": "c" * 10}]))
    words = ["--model", model, *WORDS[:-2], "--train_file", file]
    with pytest.raises(UserError, match="--columns prompt="):
        plan(words)
    assert "1 training rows of 31 to 31 tokens" in plan(
        [*words, "--columns", "prompt=ask", "completion=tell"]
    )
    with pytest.raises(UserError, match="--columns has no effect without --train_file"):
        plan(["--model", model, *WORDS, "--columns", "prompt=ask"])


def test_nvme_is_refused(folder, tmp_path):
    path = tmp_path / "nvme.json"
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match="NVMe"):
        plan(["--model", folder, *WORDS, "--deepspeed", str(path)])


def test_the_deepspeed_json_is_heeded(folder, tmp_path):
    path = ds_json(
        tmp_path / "zero3.json",
        reduce_bucket_size=12345,
        stage3_prefetch_bucket_size="auto",
        stage3_max_live_parameters=12345,  # so that layers are not units, and buckets what is said
        memory_efficient_linear=False,
        offload_param={"device": "cpu"},
    )
    flags = "--deepspeed", path, "--methods", "mezo", "ip-sgd"
    result = planned("--model", folder, *WORDS, *flags)
    assert result["zero_optimization"]["reduce_bucket_size"] == 12345
    assert result["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * 64**2)
    assert result["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000
    assert result["zero_optimization"]["memory_efficient_linear"] is False
    mezo, ip_sgd = result["methods"]
    assert ip_sgd["bytes"]["buckets"] >= 2 * 12345
    assert mezo["bytes"].get("buckets", 0) == 0
    assert mezo["host_per_node"] > 0


def test_the_planner_finds_a_home_folder_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    OPTConfig(**SMALL).save_pretrained(tmp_path / "model")
    words = ["--model=~/model", "--gpus", "1", "--methods", "mezo", "--length", "32"]
    assert "million parameters" in plan(words)
