"""The command line: what it refuses, how ranks end, and one real run with everything in it."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OpenAIGPTConfig

from addax_ds.checkpoint.atomic import SEAL, UNFINISHED, verify
from addax_ds.cli import train
from addax_ds.cli.summary import _duration
from addax_ds.models.source import ModelSource
from tests.support.launcher import launch
from tests.support.ranks import run_module
from tests.support.reference import distance
from tests.support.tiny import (
    POSITIONS,
    VOCABULARY,
    row,
    rows,
    tiny_model,
    tiny_tokenizer,
    write_model,
    write_rows,
)

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.launcher, pytest.mark.usefixtures("program_alone")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(7, 9))


def flags(values: dict[str, Any]) -> list[str]:
    given = {"learning_rate": 0.05, **values}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


# ---- refused before the model is loaded, in this process ----------------------------------------

LINES = {
    "empty": ("", "there are no rows"),
    "malformed": (
        '{"prompt": "w0", "completion": " w1"}\n{"prompt": "w0",\n',
        ":2: not valid JSON",
    ),
    "no-completion": (
        '{"prompt": "w0", "completion": " w1"}\n{"prompt": "w0"}\n',
        ":2: no completion (or null)",
    ),
    "columns": ('{"question": "w0", "answer": "w1"}\n', ":1: found columns [answer, question]"),
    "too-long": (
        json.dumps(row(3, 2)) + "\n" + json.dumps(row(POSITIONS, 2)) + "\n",
        f":2: {POSITIONS + 3} tokens, more than the model's {POSITIONS} positions",
    ),
}
"""Contents of a training file and what has to be said about it after its name."""

ARGUMENTS = {
    "no-train-file": ({"train_file": "nowhere.jsonl"}, ["--train_file nowhere.jsonl", "no such"]),
    "no-model": ({"model_name_or_path": "/no/model"}, ["--model_name_or_path /no/model"]),
    "clipping": ({"max_grad_norm": -1.0}, ["--max_grad_norm = -1.0", "at least 0"]),
    "accumulation": (
        {"gradient_accumulation_steps": 0},
        ["--gradient_accumulation_steps 0", "at least 1"],
    ),
    "d0-empty": ({"length_threshold": 40}, ["D0 is empty", "--length_threshold from"]),
    "d1-empty": ({"length_threshold": 2}, ["D1 is empty", "--length_threshold from"]),
    "few-long": ({"per_device_zo_batch_size": 8}, ["D0 holds 7 examples", "batch of 8"]),
    "few-short": (
        {"per_device_train_batch_size": 10, "per_device_zo_batch_size": 2},
        ["D1 holds 9 examples", "batch of 10"],
    ),
    "no-checkpoint": ({"resume_from_checkpoint": True}, ["there is no checkpoint in"]),
    "no-such-checkpoint": ({"resume_from_checkpoint": "/no/folder"}, ["/no/folder", "no such"]),
    "not-a-checkpoint": ({"resume_from_checkpoint": "/usr"}, ["/usr", "no checkpoint"]),
    "no-rate": (
        {"learning_rate": None},
        ["--learning_rate is missing", "5e-05, is a rate for Adam", "--find_learning_rate"],
    ),
    "rate-and-search": ({"find_learning_rate": True}, ["--learning_rate has no effect with"]),
    "alpha-1": ({"alpha": 1.0}, ["alpha", "--method mezo"]),
    "eval-on-start": ({"eval_on_start": True}, ["--eval_on_start need data"]),
    "schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, ["num_decay_steps"]),
    "unknown": ({"learning-rat": 1.0}, ["--learning_rat", "Did you mean 'learning_rate'"]),
}

JSONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "prescaling": ({"prescale_gradients": True}, ["prescale_gradients = true", "remove the key"]),
    "offload-optimizer": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        ["zero_optimization.offload_optimizer", "use offload_param"],
    ),
    "nvme": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        ["zero_optimization.offload_param.device", "NVMe offload is not supported"],
    ),
    "stage-2": ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage = 2", "write 3"]),
    "alpha": (
        {"optimizer": {"type": "Addax", "params": {"alpha": 0.2}}},
        ["--alpha is 0.1", "optimizer.params.alpha", "0.2"],
    ),
}


def refused(argv: list[str], output: Path, capsys, monkeypatch) -> str:
    """What the program says before it gives up, without a model and without a trace on disk."""

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the model is loaded before the mistake is found")

    monkeypatch.setattr(ModelSource, "load", load)
    with pytest.raises(SystemExit) as exit_:
        train.main([*argv, f"--output_dir={output}"])
    assert exit_.value.code == 1
    assert not output.exists()
    said = capsys.readouterr().err
    assert "addax_ds: error: " in said
    assert "Traceback" not in said
    return said.split("addax_ds: error: ")[1]


@pytest.mark.parametrize("name", LINES)
def test_bad_rows(name, model, tmp_path, capsys, monkeypatch):
    text, message = LINES[name]
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    argv = flags({"model_name_or_path": model, "train_file": path})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    assert str(path) in said
    assert message in said


FILES = {
    "ragged.csv": (b"prompt,completion\nw0,w1\nw0\n", ":3: 1 fields, and the first row names 2"),
    "cut.parquet": (b"PAR1", ": cannot be read: "),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "w0"}')[:-9], ":1: the file cannot be read: "),
    "cut.json": (b'[{"text": "w0"}', ":1: not valid JSON (column 16"),
    "picture": (b"\x89PNG", ": neither of a known ending nor JSON Lines"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name, model, tmp_path, capsys, monkeypatch):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    argv = flags({"model_name_or_path": model, "train_file": path})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    assert said.startswith(f"{path}{message}")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(name, model, data, tmp_path, capsys, monkeypatch):
    given, parts = ARGUMENTS[name]
    argv = flags({"model_name_or_path": model, "train_file": data, **given})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    for part in parts:
        assert part in said


@pytest.mark.parametrize("name", JSONS)
def test_bad_deepspeed_json(name, model, data, tmp_path, capsys, monkeypatch):
    given, parts = JSONS[name]
    monkeypatch.setenv("LOCAL_RANK", "0")  # a launcher has started this
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **given}))
    argv = flags({"model_name_or_path": model, "train_file": data, "alpha": 0.1, "deepspeed": path})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    for part in [*parts, str(path)]:
        assert part in said


def test_demo_on_three_ranks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = refused([], tmp_path / "output", capsys, monkeypatch)
    assert "8 does not divide over 3 ranks" in said
    assert "1, 2, 4 or 8 ranks" in said


@pytest.mark.parametrize("chosen", ["accuracy", "eval_rouge"])
def test_a_metric_that_no_evaluation_makes(chosen, model, data, tmp_path, capsys, monkeypatch):
    more = {"validation_file": data, "eval_strategy": "epoch", "metric_for_best_model": chosen}
    argv = flags({"model_name_or_path": model, "train_file": data, **more})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    assert f"--metric_for_best_model {chosen}: no evaluation here makes it" in said
    assert "it must be of loss" in said


def test_a_pad_token_without_an_embedding(model, data, tmp_path, capsys, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    argv = flags({"model_name_or_path": tmp_path / "model", "train_file": data})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    assert f"pads with token {VOCABULARY} ('[PAD]')" in said
    assert f"embeddings for {VOCABULARY}: name another as pad_token" in said


def test_a_model_that_cannot_recompute(data, tmp_path, capsys):
    sizes = {"n_positions": POSITIONS, "n_embd": 8, "n_layer": 1, "n_head": 1}
    config = OpenAIGPTConfig(vocab_size=VOCABULARY, **sizes)
    config.save_pretrained(tmp_path / "model")  # and no weights, which would be missed later
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    more = {"activation_checkpointing": True, "output_dir": tmp_path / "output", "use_cpu": True}
    more["per_device_train_batch_size"] = 4
    argv = flags({"model_name_or_path": tmp_path / "model", "train_file": data, **more})
    with pytest.raises(SystemExit):
        train.main(argv)
    assert "OpenAIGPTLMHeadModel does not support activation" in capsys.readouterr().err


def test_model_folder_without_a_tokenizer(model, data, tmp_path, capsys, monkeypatch):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    argv = flags({"model_name_or_path": bare, "train_file": data})
    said = refused(argv, tmp_path / "output", capsys, monkeypatch)
    assert f"no tokenizer in {bare}" in said


# ---- real launches -----------------------------------------------------------------------------

TRAIN = "launch/train.py"
STEPS = 6


def full_run(model: Path, folder: Path, output: Path, **more: Any) -> list[str]:
    """Flags of a bf16 run on own files that evaluates, saves and reports."""
    return flags(
        {
            "deepspeed": "ds_configs/zero3.json",
            "model_name_or_path": model,
            "train_file": write_rows(folder / "train.jsonl", rows(7, 9)),
            "validation_file": write_rows(folder / "validation.jsonl", rows(2, 3, seed=1)),
            "test_file": write_rows(folder / "test.jsonl", rows(2, 3, seed=2)),
            "output_dir": output,
            "bf16": True,
            "alpha": 0.01,
            "learning_rate": 0.05,
            "length_threshold": 12,
            "per_device_train_batch_size": 2,
            "per_device_zo_batch_size": 1,
            "max_steps": STEPS,
            "warmup_steps": 1,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 4,
            "seed": 3,
            "report_to": "tensorboard",
            **more,
        }
    )


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict[str, Any]:
    """A run of 6 steps, and one that goes on from its checkpoint of step 4 in a folder of its own.

    The second is what is left of a run that was killed while it saved step 6, on a disk that lost
    the end of step 5.
    """
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    first = launch(TRAIN, *full_run(model, folder, whole))
    assert first.status == 0, first.output
    for name in ("checkpoint-4", "checkpoint-5", f"{UNFINISHED}/checkpoint-6"):
        shutil.copytree(whole / "checkpoint-4", killed / name)
    cut(killed / "checkpoint-5" / "model.safetensors")
    resumes = full_run(model, folder, killed, resume_from_checkpoint=True)
    second = launch(TRAIN, *resumes, launcher="fork")
    assert second.status == 0, second.output
    return {"whole": whole, "killed": killed, "outcomes": [first, second]}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def log_of(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in history(folder) if key in entry]


@pytest.mark.slow
def test_a_run_leaves_its_results(runs):
    folder = runs["whole"]
    results = json.loads((folder / "all_results.json").read_text())
    assert {"train_runtime", "train_loss", "test_loss", "test_loss_before", "epoch"} <= set(results)
    assert results["test_loss"] < results["test_loss_before"]
    assert json.loads((folder / "test_results.json").read_text())["test_loss"]
    assert json.loads((folder / "train_results.json").read_text())["train_runtime"]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len(log_of(folder, "g0")) == STEPS
    assert len(log_of(folder, "eval_loss")) == STEPS // 3
    assert list(folder.glob("runs/*/events*"))
    for outcome in runs["outcomes"]:
        assert outcome.left_behind == 0
        assert "Traceback" not in outcome.output


@pytest.mark.slow
def test_a_run_says_what_it_did(runs):
    output, folder = runs["outcomes"][0].output, runs["whole"]
    assert output.count("D0 (zeroth-order, longer than L_T = 12): 7 sequences, the longest of") == 1
    assert output.count("D1 (first-order, at most 12): 9 sequences, the longest of 12 tokens") == 1
    assert len(re.findall(r"^Memory: \d+ parameters, \d+\.\d\d GB of tensors", output, re.M)) == 1
    assert output.count("ranks 2, steps 6\n") == 1
    for name in ("model", "all_results.json", "training.png"):
        assert str(folder / name) in output


@pytest.mark.slow
def test_a_run_says_where_it_goes_on_and_how_long_that_took(runs):
    whole, resumed = (outcome.output for outcome in runs["outcomes"])
    checkpoint = runs["killed"] / "checkpoint-4"
    (found,) = re.findall(
        rf"^Resuming from {checkpoint}: step 4 of 6, after (\d+) tokens in \d+ s$", resumed, re.M
    )
    assert int(found) == log_of(runs["whole"], "train_tokens")[3]
    assert "Resuming" not in whole
    trained = r"^Trained 6 steps on \d+ tokens in \d+ s"
    more = r", \d+ s with evaluations and checkpoints; the most memory"
    assert len(re.findall(trained + more, whole, re.M)) == 1
    since = r"; 2 of them since the resume in \d+ s"
    assert len(re.findall(trained + since + more, resumed, re.M)) == 1


@pytest.mark.parametrize("resumed_step", [0, 30])
def test_times_that_are_compared_begin_at_the_same_step(resumed_step):
    """Of 100 s, 60 were before the resume, with which Trainer's clock starts."""
    results = {"train_steps": 50, "train_tokens": 700, "train_seconds": 100.0}
    said = _duration({**results, "train_runtime": 45.0}, resumed_step, 60.0)
    since = "; 20 of them since the resume in 40 s" if resumed_step else ""
    longer = "45 s with evaluations and checkpoints"
    assert said == f"Trained 50 steps on 700 tokens in 100 s{since}, {longer}"


@pytest.mark.slow
def test_folders_are_complete_with_checksums(runs):
    for run, names in {
        "whole": {"checkpoint-4", "checkpoint-6", "model"},
        "killed": {"checkpoint-4", "checkpoint-6", "model"},
    }.items():
        for name in names:
            verify(runs[run] / name)
        sealed = {path.parent.name for path in runs[run].rglob(SEAL)}
        assert sealed - {"checkpoint-5"} == names
        assert not (runs[run] / UNFINISHED).exists()
        state = json.loads((runs[run] / "checkpoint-6/trainer_state.json").read_text())
        assert state["global_step"] == STEPS


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(runs):
    path = runs["killed"] / "checkpoint-5" / "model.safetensors"
    said = f"skipping a checkpoint that is damaged. {path}: the file is cut off"
    assert runs["outcomes"][1].output.count(said) == 1
    assert [entry["step"] for entry in history(runs["killed"]) if "g0" in entry][4:] == [5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "the seed was 3, and is 4 in this run"),
        ({"data_seed": 4}, "the data seed was 3, and is 4 in this run"),
        ({"length_threshold": 13}, "L_T was 12 tokens, and is 13 in this run"),
        ({"max_length": 24}, "the training data had the digest"),
        (
            {"per_device_train_batch_size": 2},
            "the first order batch was 4 over all ranks, and is 2",
        ),
    ],
)
def test_another_run_is_refused_before_its_model_is_loaded(
    change, message, runs, model, tmp_path, capsys, monkeypatch
):
    """On one rank, which is no other run."""
    checkpoint = runs["whole"] / "checkpoint-4"
    sizes = {"per_device_train_batch_size": 4, "per_device_zo_batch_size": 2}
    more = {**sizes, "resume_from_checkpoint": checkpoint, "report_to": "none", **change}
    given = full_run(model, runs["whole"].parent, tmp_path / "output", **more)
    given = [flag for flag in given if not flag.startswith(("--deepspeed", "--output_dir"))]
    said = refused(given, tmp_path / "output", capsys, monkeypatch)
    assert said.startswith(f"--resume_from_checkpoint {checkpoint}: ")
    assert message in said


@pytest.mark.slow
def test_all_ranks_leave_another_runs_folder_alone(runs, model):
    folder = runs["whole"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    given = full_run(model, folder.parent, folder, report_to="none", save_total_limit=1)
    outcome = launch(TRAIN, *given, launcher="fork")
    assert outcome.status not in (0, None), outcome.output
    said = f"--output_dir {folder}: it holds checkpoint-6, checkpoint-4 of another run"
    assert outcome.output.count(f"addax_ds: error: {said}") == 1
    assert outcome.output.count("error: stopped, as 1 other rank(s) had an error") == 1
    assert "Traceback" not in outcome.output
    assert outcome.left_behind == 0
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_spares_older_checkpoints(runs, model, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(runs["whole"] / "checkpoint-4", output / "checkpoint-4")
    more = {"resume_from_checkpoint": True, "report_to": "none", "save_total_limit": 1}
    given = full_run(model, runs["whole"].parent, output, **more)
    outcome = launch("tests/workers/ckpt_small_disk.py", *given, launcher="fork")
    assert outcome.status not in (0, None), outcome.output
    assert "model.safetensors: cannot be written: " in outcome.output
    assert outcome.output.count("addax_ds: error: ") == 2
    assert "Traceback" not in outcome.output
    assert outcome.left_behind == 0
    verify(output / "checkpoint-4")
    left = {path.name for path in output.iterdir()}
    assert "checkpoint-4" in left
    assert not left & {"checkpoint-6", UNFINISHED, "model"}


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(runs):
    for key in ("g0", "zo_loss", "fo_loss", "learning_rate", "eval_loss"):
        assert log_of(runs["killed"], key) == log_of(runs["whole"], key)
    models = [
        AutoModelForCausalLM.from_pretrained(runs[name] / "model") for name in ("whole", "killed")
    ]
    assert models[0].dtype == torch.bfloat16
    other = dict(models[1].named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in models[0].named_parameters())
    results = [
        json.loads((runs[name] / "all_results.json").read_text()) for name in ("whole", "killed")
    ]
    assert results[0]["test_loss_before"] == results[1]["test_loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sharding"), [("fork", "none"), ("torchrun", "fsdp2"), ("accelerate", "fsdp2")]
)
def test_other_launchers_and_back_ends_train_alike(launcher, sharding, runs, model, tmp_path):
    output = tmp_path / "output"
    given = full_run(model, runs["whole"].parent, output, sharding=sharding, use_cpu=True)
    given = [flag for flag in given if not flag.startswith("--deepspeed")]
    outcome = launch(TRAIN, *given, launcher=launcher)
    assert outcome.status == 0, outcome.output
    assert outcome.left_behind == 0
    for key in ("zo_loss", "fo_loss", "learning_rate", "test_before_loss"):
        assert log_of(output, key) == pytest.approx(log_of(runs["whole"], key), rel=2e-3)
    assert AutoModelForCausalLM.from_pretrained(output / "model").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_run_goes_on_under_fsdp2(runs, model, tmp_path):
    """What ZeRO-3 has saved after step 4; stochastic rounding is that of the same steps."""
    folder, output = runs["whole"].parent, tmp_path / "moved"
    checkpoint = runs["whole"] / "checkpoint-4"
    given = full_run(model, folder, output, sharding="fsdp2", resume_from_checkpoint=checkpoint)
    given = [flag for flag in given if not flag.startswith("--deepspeed")]
    said = run_module("launch.train", 2, tmp_path, *given)
    assert "Resuming on 2 rank(s), sharding fsdp2, what 2 rank(s), sharding zero3" in said
    for key in ("zo_loss", "fo_loss", "learning_rate", "test_before_loss"):
        assert log_of(output, key) == pytest.approx(log_of(runs["whole"], key), rel=2e-3)
    models = [AutoModelForCausalLM.from_pretrained(f / "model") for f in (runs["whole"], output)]
    start = AutoModelForCausalLM.from_pretrained(checkpoint)
    whole, moved, before = (dict(m.float().named_parameters()) for m in (*models, start))
    assert distance(whole, moved) <= 0.1 * distance(whole, before)


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, '{"prompt": "w0"'], ids=["missing", "malformed"])
def test_one_bad_rank_ends_all_of_them(text, model, tmp_path):
    """A missing file is found before the ranks have met, a malformed one after."""
    bad = tmp_path / "other.jsonl"
    if text is not None:
        bad.write_text(text)
    given = full_run(model, tmp_path, tmp_path / "output")
    outcome = launch(
        "tests/workers/one_bad_rank.py", *given, f"--train_file={bad}", launcher="fork"
    )
    assert outcome.status not in (0, None), outcome.output
    assert f"{bad}: there is no such file" in outcome.output or f"{bad}:1: not" in outcome.output
    if text is not None:
        assert "addax_ds: error: stopped, as 1 other rank(s) had an error" in outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.left_behind == 0
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_file", "length_threshold", "version_of_deepspeed"])
def test_ranks_of_different_trainings_do_not_start(name, model, tmp_path):
    """A rank with --length_threshold auto would plan, and the others not take part."""
    data = write_rows(tmp_path / "other.jsonl", rows(8, 8, seed=9))
    other = {"train_file": data, "length_threshold": "auto"}.get(name, "0.1")
    given = full_run(model, tmp_path, tmp_path / "output")
    outcome = launch("tests/workers/one_bad_rank.py", *given, f"--{name}={other}", launcher="fork")
    assert outcome.status not in (0, None), outcome.output
    what = {"train_file": "training data", "length_threshold": "--length_threshold"}
    differs = rf"What differs:\n- {what.get(name, 'version of deepspeed')}: "
    said = re.findall(rf"{differs}rank 0: (\S+), rank 1: (\S+)", outcome.output)
    assert len(said) == 2, outcome.output  # both ranks say it, and nothing else differs
    assert all(first != second for first, second in said)
    assert outcome.output.count("\n- ") == 2
    assert outcome.left_behind == 0
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_losses_that_are_not_finite_end_all_ranks(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "output"
    more = {"max_steps": 20, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
    given = full_run(tmp_path / "model", tmp_path, output, **more)
    outcome = launch(TRAIN, *given, launcher="fork")
    assert outcome.status not in (0, None), outcome.output
    assert outcome.output.count("the 10th step in a row") == 2
    assert outcome.output.count("addax_ds: error:") == 2
    assert "Traceback" not in outcome.output
    assert outcome.left_behind == 0
    assert not (output / "model").exists()
