"""Thousands of command lines and argument files: what passes has the types that it should have."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from addax_ds.config.addax_config import AddaxConfig
from addax_ds.config.arguments import (
    DataArguments,
    ModelArguments,
    parse_arguments,
)
from addax_ds.config.training_arguments import DEFAULTS
from tests.support.fuzz import JSON, TEXT, fuzzed, outcome

TYPES = (ModelArguments, DataArguments, AddaxConfig)
# What is looked up elsewhere, or reaches for a network.
NAMES = sorted(
    field.name
    for dtype in TYPES
    for field in fields(dtype)
    if field.init and not field.name.startswith(("hub_", "push_to", "ddp_backend", "local_rank"))
)
FLAG_VALUES = st.one_of(
    st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e400", "1.5", "true", "no", "None", "[]"]),
    st.sampled_from(["{}", "{", "/", ".", "../x", "a" * 300, "1", "3", "linear"]),
    TEXT.filter(lambda text: text.isprintable() and not text.startswith("{")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arguments")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    return folder


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


LISTS = ("train_file", "validation_file", "test_file", "columns")


def base(folder: Path) -> dict[str, Any]:
    return {
        "train_file": str(folder / "rows.jsonl"),
        "model_name_or_path": "x",
        "output_dir": str(folder / "output"),
        "use_cpu": True,
    }


def check(argv: list[str], names: list[str]) -> None:
    parsed, refusal = outcome(lambda: parse_arguments(argv))
    unset_hf_deepspeed_config()
    if parsed is None:
        assert any(name in refusal for name in [*names, "TrainingArguments", "DeepSpeed config"]), (
            refusal
        )
        return
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name in (name for name in names if name in NAMES and name not in DEFAULTS):
        assert not isinstance(values[name], dict), name
        assert not isinstance(values[name], list) or name in LISTS, name
    assert type(values["trust_remote_code"]) is bool
    for name in names:
        value = values.get(name)
        if isinstance(value, float):
            assert math.isfinite(value)
    assert values["learning_rate"] >= 0
    assert values["weight_decay"] >= 0
    assert values["num_train_epochs"] > 0


@fuzzed(150)
@given(st.dictionaries(st.sampled_from(NAMES), FLAG_VALUES, min_size=1, max_size=2))
def test_flags(folder, flags):
    check([f"--{k}={v}" for k, v in {**base(folder), **flags}.items()], list(flags))


@fuzzed(150)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=2))
def test_argument_files(folder, content):
    path = folder / "run.json"
    path.write_text(json.dumps({**base(folder), **content}))
    check([str(path)], [*content, str(path)])
