"""README: the Trainer example runs as printed."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

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
