"""Optimizers of other packages in the recipe, and models with adapters in the comparison."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from addax_ds.cli import train
from addax_ds.config.arguments import parse_arguments
from studies.comparison import peers, runner
from studies.comparison.peers import PEERS, PeerTrainer
from studies.comparison.runner import Comparison
from studies.comparison.study import STUDIES, Trial
from tests.support.ranks import ROOT
from tests.support.tiny import rows, write_model

PEER_TRIALS = [
    trial
    for trial in STUDIES["multiemo-peers"].grid
    if trial.contender is not None and "peer" in trial.contender.flags
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def flags(model: Path, folder: Path) -> list[str]:
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows(4, 4))))
    values = {
        **{"model_name_or_path": model, "train_file": file, "max_steps": 3, "learning_rate": 0.05},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": "none"},
        **{"lr_scheduler_type": "constant", "disable_tqdm": True, "save_strategy": "no"},
    }
    return [f"--{name}={value}" for name, value in values.items()]


def test_a_peer_takes_the_steps_of_its_optimizer(model, tmp_path, monkeypatch, launched):
    """SGD of torch as a peer is in-place SGD, which has another trainer and another update."""
    make = lambda: lambda model, rate: torch.optim.SGD(model.parameters(), lr=rate)  # noqa: E731
    monkeypatch.setitem(PEERS, "sgd", make)
    common = flags(model, tmp_path)
    ignored = ["--method=adamw", "--deepspeed=ds_configs/zero3.json"]
    peers.main(["--peer", "sgd", *ignored, *common, f"--output_dir={tmp_path / 'peer'}"])
    own = ["--method=ip-sgd", "--sharding=none", f"--output_dir={tmp_path / 'own'}"]
    train.finetune([*common, *own])
    start, peer, expected = (
        load_file(folder / "model.safetensors")
        for folder in (model, tmp_path / "peer" / "model", tmp_path / "own" / "model")
    )
    assert expected.keys() == peer.keys()
    for name, value in expected.items():
        assert torch.allclose(peer[name], value, rtol=0, atol=1e-6), name
        assert not torch.equal(start[name], value), name


@pytest.mark.parametrize("trial", PEER_TRIALS, ids=lambda trial: trial.name)
def test_flags_of_a_peer_are_those_of_the_recipe(trial, tmp_path, monkeypatch, launched):
    given: list[Any] = []
    monkeypatch.setattr(train, "main", lambda *arguments: given.extend(arguments))
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(PEERS, lambda: None))
    common = {"deepspeed": str(ROOT / "ds_configs/zero3.json"), "bf16": "True", "use_cpu": "True"}
    job = Comparison([trial.study], tmp_path, common).training(trial)
    assert "studies/comparison/peers.py" in " ".join(runner._command(job))
    peers.main([f"--{name}={value}" for name, value in job.flags.items()])
    argv, trainer = given
    _, data, args = parse_arguments(argv)
    assert issubclass(trainer, PeerTrainer)
    assert (args.method, args.deepspeed, args.learning_rate) == (
        "ip-sgd",
        None,
        trial.learning_rate,
    )
    assert data.skip_test


@pytest.mark.parametrize("peer", PEERS)
def test_a_missing_package_is_a_sentence(peer, monkeypatch, capsys):
    for package in ("bitsandbytes", "bitsandbytes.optim", "badam"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ended:
        peers.main(["--peer", peer])
    assert ended.value.code == 1
    assert f"--peer {peer}: " in str(ended.value.__cause__)
    assert "pip install -e '.[peers]'" in str(ended.value.__cause__)


def test_adapters_are_read_with_as_part_of_the_weights(model, tmp_path):
    """In fp32, then rounded to bf16."""
    study = STUDIES["multiemo-peers"]
    lora = next(c for c in study.contenders if c.name == "adamw-lora")
    trial = Trial(study, lora, lora.learning_rates[0])
    job = Comparison([study], tmp_path, {}).test(trial)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(base, settings)
    folder = tmp_path / trial.name / "model"
    adapted.save_pretrained(folder)
    for file in model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    job.folder.mkdir(parents=True)
    runner._begin(job, [])
    merged = AutoModelForCausalLM.from_pretrained(job.flags["model_name_or_path"])
    assert merged.dtype is torch.bfloat16
    plain = dict(adapted.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, plain[name].to(torch.bfloat16)), name
    other = dataclasses.replace(trial, contender=study.contenders[1])
    path = Comparison([study], tmp_path, {}).test(other).flags["model_name_or_path"]
    assert Path(path).name == "model"
