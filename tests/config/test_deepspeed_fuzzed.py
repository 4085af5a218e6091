"""Thousands of configurations: the DeepSpeed JSON and argument files.

Whatever passes is something that DeepSpeed's own classes accept; the rest is a `UserError` that
names the key. Other exceptions do not happen.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st

from addax_ds.config.deepspeed import check_ds_config, ds_config, load_ds_config
from addax_ds.config.deepspeed_keys import DS_KEYS
from addax_ds.config.values import read_argument_file, type_problems, value_problems
from addax_ds.utils.errors import UserError
from addax_ds.utils.messages import shown
from tests.config.test_deepspeed import with_key
from tests.support.fuzz import JSON, TEXT, fuzzed, outcome


def accepted_by_deepspeed(config: dict[str, Any]) -> None:
    parsed = DeepSpeedConfig(copy.deepcopy(config))
    assert parsed.zero_optimization_stage == 3
    assert parsed.optimizer_name == "Addax"
    assert type(parsed.bfloat16_config.enabled) is bool
    if parsed.scheduler_name is not None:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        getattr(lr_schedules, parsed.scheduler_name)(optimizer, **parsed.scheduler_params).step()
    json.dumps(config, allow_nan=False)


# What DeepSpeed can be told beside what `JSON` draws.
PLAUSIBLE = st.one_of(
    st.fixed_dictionaries({"enabled": JSON}),
    st.fixed_dictionaries({"type": st.sampled_from([*lr_schedules.VALID_LR_SCHEDULES, "os"])}),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(lr_schedules.VALID_LR_SCHEDULES),
            "params": st.dictionaries(
                st.sampled_from(
                    ["warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"]
                ),
                st.sampled_from(["auto", 0, 1, 1e-3, 100]) | JSON,
            ),
        }
    ),
    st.sampled_from([10, 5e8, 1e-3, False, True, "bf16", "cpu", "none", [], {}]),
)
VALUES = JSON | PLAUSIBLE


@pytest.mark.parametrize("named", [True, False], ids=["known key", "any key"])
@fuzzed(400)
@given(data=st.data())
@pytest.mark.slow
def test_one_key_of_the_deepspeed_config(named, data):
    path = data.draw(st.sampled_from(sorted(DS_KEYS)) if named else TEXT)
    value = data.draw(VALUES)
    config = with_key(path, value) if named else {**with_key("bf16", {}), path: value}
    before = copy.deepcopy(config)
    filled, refusal = outcome(lambda: ds_config(config, lr=1e-3))
    assert repr(config) == repr(before)
    top = path.partition(".")[0] if named else path
    if filled is None:
        assert shown(top) in refusal or "not JSON" in refusal  # NaN and infinities
    elif "train_batch_size" not in config:  # which is a matter of the ranks
        accepted_by_deepspeed(filled)
    if not named and path not in DS_KEYS:
        assert filled is None  # whatever the value


@fuzzed(150)
@given(st.dictionaries(st.sampled_from(sorted(k for k in DS_KEYS if "." not in k)), VALUES))
def test_many_keys_of_the_deepspeed_config(keys):
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **keys}
    filled, refusal = outcome(lambda: ds_config(config, lr=1e-3))
    if filled is None:
        assert any(key in refusal for key in keys) or "not JSON" in refusal
    elif "train_batch_size" not in keys:
        accepted_by_deepspeed(filled)


@fuzzed(150)
@given(JSON)
def test_anything_as_the_deepspeed_config(content):
    for call in (load_ds_config, ds_config):
        source: Any = content
        result, refusal = outcome(lambda call=call, source=source: call(source))
        assert result is not None or refusal
    if isinstance(content, dict):
        outcome(lambda: check_ds_config(content, "x.json"))


def strict(text: str) -> Any:
    def pairs(found):
        assert len({key for key, _ in found}) == len(found)
        return dict(found)

    return json.loads(text, object_pairs_hook=pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configs")


READY = Path(__file__).parents[2] / "ds_configs" / "zero3.json"


@fuzzed(150)
@given(st.data())
def test_files_with_changed_bytes(folder, data):
    content = bytearray(READY.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b'"', b"{", b"}", b"\n", b",", b"1e999", b"9" * 5000])
        )
    path = folder / "ds.json"
    path.write_bytes(content)
    loaded, refusal = outcome(lambda: load_ds_config(path))
    if loaded is None:
        assert str(path) in refusal
    else:
        assert loaded == (strict(content.decode("utf-8")), str(path))


@fuzzed(150)
@given(
    st.dictionaries(
        st.sampled_from(["lr", "weight_decay", "alpha", "zo_eps", "seed", "rounding", "bf16"]), JSON
    )
)
def test_arguments_of_ds_config(arguments):
    filled, refusal = outcome(lambda: ds_config(with_key("bf16", {}), **{"lr": 0.1, **arguments}))
    if filled is None:
        assert any(name in refusal for name in arguments)
    else:
        accepted_by_deepspeed(filled)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": {"b": 1, "b": 1}}', "duplicate keys: b"),
        ('{"gradient_clipping": 1e999, "zero_optimization": {"stage": 3}}', "gradient_clipping"),
        ("\ufeff{}", "line 1, column 1"),
        ("", "line 1, column 1"),
        (b"\xff\xfe{", "Cannot read the DeepSpeed config"),
    ],
)
def test_deepspeed_files_that_cannot_be_used(content, says, folder):
    path = folder / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        check_ds_config(*load_ds_config(path))
    message = str(raised.value)
    assert str(path) in message
    assert says in message
    assert len(message) < 1000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("read", [load_ds_config, read_argument_file])
@pytest.mark.parametrize("name", ["folder", "pipe", "long"])
def test_what_is_not_a_file(name, read, tmp_path):
    path = tmp_path / (name * 2000 if name == "long" else name)
    if name == "folder":
        path.mkdir()
    if name == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match="Cannot read the"):
        read(path)


def test_a_config_that_is_no_json():
    for config, says in (
        ({"a": Path("x")}, "Path is not JSON"),
        ({"a": torch.float32}, "dtype is not JSON"),
        ({"optimizer": {"params": {"lr": float("nan")}}}, "float values are not JSON"),
    ):
        with pytest.raises(UserError, match=says):
            load_ds_config(config)
    for source in (3, None, [1], b"x"):
        with pytest.raises(UserError, match="is a path or an object"):
            load_ds_config(source)


# ---- argument files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nseed: 2\n", "duplicate keys: seed"),
        ("deepspeed:\n  x: 1\n  x: 1\n", "duplicate keys: x"),
        ("a: !!python/object/apply:os.system [exit]\n", "could not determine a constructor"),
        ("a: !!int ''\n", "Cannot read"),
        ("a: [\n", "Cannot read"),
        ("- 1\n", "must map"),
        ("", "must map"),
    ],
)
def test_argument_files_that_cannot_be_used(text, says, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_argument_file(path)
    message = str(raised.value)
    assert str(path) in message
    assert says in message
    assert len(message) < 1000


def test_an_argument_file_that_names_a_flag_twice(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(UserError, match="duplicate keys: seed"):
        read_argument_file(path)


def test_what_yaml_reads(tmp_path):
    """A byte-order mark, an alias, and what YAML makes of words."""
    path = tmp_path / "run.yaml"
    path.write_text("\ufefflearning_rate: &rate 1e-4\nalpha: *rate\nsave_strategy: no\n")
    content = read_argument_file(path)
    assert content == {"learning_rate": "1e-4", "alpha": "1e-4", "save_strategy": False}
    types = {"learning_rate": float, "alpha": float | None, "save_strategy": str}
    (problem,) = type_problems(content, types)
    assert problem.startswith("save_strategy: ")
    assert not list(type_problems({"a": ["1"], "b": {}}, {"a": list[str] | str, "b": dict | None}))
    assert len(list(type_problems({"a": {}, "b": []}, {"a": list[str] | str, "b": dict}))) == 2


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("learning_rate", float("nan"), "finite"),
        ("weight_decay", float("inf"), "finite"),
        ("num_train_epochs", 0.0, "above 0"),
        ("max_steps", -2, "at least -1"),
        ("report_to", "csv", "tensorboard"),
        ("report_to", ["tensorboard", 3], "tensorboard"),
        ("lr_scheduler_kwargs", "3", "JSON object"),
    ],
)
def test_values_that_no_argument_can_have(name, value, says):
    (problem,) = value_problems({name: value})
    assert problem.startswith(f"--{name} ")
    assert says in problem
    good = {"learning_rate": 0, "max_steps": -1, "report_to": "none", "bf16": True, "alpha": 0.5}
    assert not list(value_problems(good))


@fuzzed(150)
@given(st.dictionaries(TEXT, JSON, max_size=3) | JSON)
def test_yaml_files_are_read_or_refused(folder, content):
    path = folder / "fuzz.yaml"
    path.write_text(
        yaml.safe_dump(content, allow_unicode=False, sort_keys=False), errors="surrogatepass"
    )
    result, refusal = outcome(lambda: read_argument_file(path))
    if result is None:
        assert str(path) in refusal
    else:
        assert repr(result) == repr(content)  # nan is not equal to itself


@fuzzed(150)
@given(st.binary(max_size=30) | TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_an_argument_file(folder, content):
    for suffix in (".yaml", ".json"):
        path = folder / f"bytes{suffix}"
        path.write_bytes(content)
        result, refusal = outcome(lambda path=path: read_argument_file(path))
        assert isinstance(result, dict) or str(path) in refusal
