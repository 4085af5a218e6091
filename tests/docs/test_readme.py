"""README: the examples in Python run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from studies.jobs import free_port
from tests.support.ranks import ROOT
from tests.support.tiny import rows, write_model, write_rows

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.usefixtures("program_alone")
def test_the_trainer_example(tmp_path, monkeypatch):
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "AddaxTrainer(" in code
    )
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(write_model(Path("model"), dtype=torch.bfloat16))
    write_rows(Path("train.jsonl"), rows(9, 12))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    exec(example, {})
    after = AutoModelForCausalLM.from_pretrained("output/model")
    assert after.dtype == torch.bfloat16
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    changed = sum(not torch.equal(one, other) for one, other in pairs)
    assert changed > len(pairs) / 2  # bf16 hides what 20 small steps do to some gains


SET_UP = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
rows = torch.arange(12).view(2, 6)
batches = [({"input_ids": rows, "labels": rows},) * 2] * 2
"""
CHECK = """
taken = engine.optimizer.optimizer if "engine" in globals() else optimizer
assert taken.index == 2
assert taken.report.g0
assert taken.report.first_order_loss is not None
"""
LOOPS = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if ".measure(" in code]


@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS, ids=["zero3", "fsdp2"])
def test_the_loops(loop, tmp_path):
    write_model(tmp_path / "model", dtype=torch.bfloat16)
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    environment = {**os.environ, **one_rank, "MASTER_PORT": str(free_port())}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SET_UP + loop + CHECK]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=200)
