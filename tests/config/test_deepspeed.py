"""The DeepSpeed JSON: DeepSpeed's and Transformers' own code are the references."""

import copy
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
from transformers import TrainingArguments

from addax_ds import UserError, ds_config
from addax_ds.config.deepspeed import check_ds_config, load_ds_config
from addax_ds.config.deepspeed_keys import DS_KEYS, ZERO_KEYS
from addax_ds.config.support import Status

OPTIMIZER_DEFAULTS = {
    "alpha": 1e-3,
    "zo_eps": 1e-3,
    "weight_decay": 0.0,
    "seed": 0,
    "rounding": "stochastic",
    "zo_directions": 1,
}
READY = sorted(Path(__file__).parents[2].glob("ds_configs/*.json"))
ZERO3 = next(path for path in READY if path.name == "zero3.json")


def minimal(**extra: Any) -> dict[str, Any]:
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, **extra}


def with_key(path: str, value: Any) -> dict[str, Any]:
    """A config that is fine but for one dotted key."""
    config = minimal()
    *parents, last = path.split(".")
    block = config
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    if parents and parents[0] == "optimizer" and last != "type":
        config["optimizer"].setdefault("type", "Addax")
    return config


# ---- the tables know every key -------------------------------------------------------------------


def names_of(model: Any) -> set[str]:
    """The names under which a pydantic model accepts its fields."""
    fields = model.model_fields
    return set(fields) | {field.alias for field in fields.values() if field.alias}


def test_zero_table_is_complete() -> None:
    removed = set(deepspeed_config._REMOVED_ZERO_CONFIG_KEYS)
    known = {name for name in ZERO_KEYS if "." not in name}
    assert known == names_of(DeepSpeedZeroConfig) | removed


@pytest.mark.parametrize(
    ("block", "model"),
    [
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ],
)
def test_block_table_is_complete(block: str, model: Any) -> None:
    known = {key.rpartition(".")[2] for key in DS_KEYS if key.rpartition(".")[0] == block}
    assert known == names_of(model)


class Recorder(dict):
    """A config that remembers every key that somebody asks it for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self


def test_top_level_table_has_every_key_that_deepspeed_reads() -> None:
    Recorder.asked = set()
    deepspeed_config.DeepSpeedConfig(Recorder(minimal()))
    written_out = set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    # Read from the raw config before it is parsed, see deepspeed.initialize.
    source = inspect.getsource(inspect.getmodule(deepspeed_config.DeepSpeedConfig))
    written_out |= set(re.findall(r"param_dict(?:\.get\(|\[)['\"](\w+)", source))
    top_level = {key for key in DS_KEYS if "." not in key}
    assert len(Recorder.asked) > 40
    assert (Recorder.asked | written_out) - top_level == set()


def test_whatever_does_not_work_says_why() -> None:
    for key, rule in DS_KEYS.items():
        if rule.status is not Status.WORKS:
            assert len(rule.note.split()) >= 3, key
            assert rule.note.endswith("."), key


# ---- what is refused -----------------------------------------------------------------------------

BAD: list[tuple[str, Any]] = [
    ("zero_optimization.stage", 0),
    ("zero_optimization.stage", 1),
    ("zero_optimization.stage", 2),
    ("zero_optimization.offload_param.device", "nvme"),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}),
    ("zero_optimization.zero_hpz_partition_size", 2),
    ("zero_optimization.zero_quantized_weights", True),
    ("zero_optimization.zero_quantized_nontrainable_weights", True),
    ("zero_optimization.zero_quantized_gradients", True),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
    ("zero_optimization.mics_shard_size", 2),
    ("zero_optimization.reduce_scatter", False),
    ("zero_optimization.leaf_module", {"classes": []}),
    ("zero_optimization.stage3_module_granularity_threshold", 10),
    ("zero_optimization.module_granularity_threshold", 10),
    ("fp16.auto_cast", True),
    ("fp16.fp16_master_weights_and_grads", True),
    ("bf16.bf16_master_weights_and_grads", True),
    ("torch_autocast.enabled", True),
    ("amp", {"enabled": False}),
    ("compile.deepcompile", True),
    ("tensor_parallel.autotp_size", 2),
    ("sequence_parallel_size", 2),
    ("data_efficiency.enabled", True),
    ("hybrid_engine.enabled", True),
    ("pipeline", {"stages": 2}),
    ("prescale_gradients", True),
    ("gradient_predivide_factor", 2.0),
    ("communication_data_type", "fp8"),
    ("checkpoint.load_universal", True),
    ("optimizer.type", "AdamW"),
    # unknown keys
    ("zero_optimisation", {"stage": 3}),
    ("gradient_cliping", 0),
    ("zero_optimization.overlap_com", True),
    ("optimizer.params.epsilon", 1e-3),
    ("optimizer.params.method", "mezo"),
    ("bf16.enable", True),
    # wrong values
    ("zero_optimization", True),
    ("bf16", True),
    ("optimizer.params", None),
    ("zero_optimization.sub_group_size", -1),
    ("optimizer.params.lr", "1e-3"),
    ("optimizer.params.lr", -1.0),
    ("optimizer.params.alpha", 1.5),
    ("optimizer.params.zo_eps", 0),
    ("optimizer.params.seed", 0.5),
    ("optimizer.params.rounding", "up"),
    ("zero_optimization.overlap_comm", "auto"),
]


@pytest.mark.parametrize(
    ("block", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")],
)
def test_a_monitor_whose_package_is_missing(
    block: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    check_ds_config(with_key(f"{block}.enabled", False), "x.json")
    with pytest.raises(UserError, match=rf"{block}\.enabled = true: .*{package}.*; install it"):
        check_ds_config(with_key(f"{block}.enabled", True), "x.json")
    assert not capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # rank 0 alone writes to it
    check_ds_config(with_key(f"{block}.enabled", True), "x.json")


@pytest.mark.parametrize(("path", "value"), BAD)
def test_refused_and_named(path: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"(?m)^  - {re.escape(path)}[ :]"):
        check_ds_config(with_key(path, value), "x.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zero_optimization.stage3_max_live_parameters", 1000),
        ("zero_optimization.max_live_parameters", 1000),
        ("zero_optimization.offload_param", {"device": "cpu", "pin_memory": False}),
        ("zero_optimization.offload_param", None),
        ("zero_optimization.offload_optimizer", {"device": "none"}),
        ("zero_optimization.log_trace_cache_warnings", True),
        ("gradient_clipping", "auto"),
        ("gradient_clipping", 1.0),
        ("gradient_accumulation_steps", 2),
        ("communication_data_type", "fp16"),
        ("fp16", {"enabled": True, "loss_scale_window": 100}),
        ("fp16", {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}),
        ("compile", {"deepcompile": False, "double_buffer": True}),
        ("csv_monitor", {"enabled": True, "output_path": "x"}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}),
        ("flops_profiler", {"enabled": True}),
    ],
)
def test_accepted(path: str, value: Any) -> None:
    check_ds_config(with_key(path, value), "x.json")


def test_all_problems_are_listed_at_once_with_a_suggestion() -> None:
    config = minimal(prescale_gradients=True, wall_clock_breakdwn=True)
    config["zero_optimization"]["stage"] = 2
    with pytest.raises(UserError) as caught:
        check_ds_config(config, "x.json")
    message = str(caught.value)
    assert message.startswith("x.json ")
    assert "prescale_gradients = true" in message
    assert "zero_optimization.stage = 2" in message
    assert "'wall_clock_breakdown'" in message


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}])
def test_missing_stage(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"zero_optimization\.stage is missing"):
        check_ds_config(config, "x.json")


# ---- reading -------------------------------------------------------------------------------------


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no DeepSpeed config .*absent\.json"):
        load_ds_config(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{\n  "a": 1,\n  "b": }\n')
    with pytest.raises(UserError, match="line 3, column 8"):
        load_ds_config(broken)
    broken.write_text("[1]")
    with pytest.raises(UserError, match="object, not list"):
        load_ds_config(str(broken))
    broken.write_text('{"a": 1, "a": 2}')
    with pytest.raises(UserError, match="duplicate keys: a"):
        load_ds_config(broken)
    with pytest.raises(UserError, match="Cannot read"):
        load_ds_config(tmp_path)
    with pytest.raises(UserError) as unknown:
        load_ds_config("zero4")
    assert str(unknown.value) == (
        f"There is no DeepSpeed config zero4 (looked in {Path.cwd()}), nor a ready one of this "
        "name. Did you mean 'zero3'? Ready are: zero3, zero3_offload."
    )


# ---- ds_config() ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name)
def test_ready_configs_fill_as_trainer_fills_them(path: Path, tmp_path: Path) -> None:
    """The reference is Transformers' own filling, at one rank, for the same model."""
    hidden_size = 96
    args = TrainingArguments(
        output_dir=str(tmp_path),
        deepspeed=str(path),
        use_cpu=True,
        bf16=True,
        learning_rate=3e-4,
        weight_decay=0.1,
        per_device_train_batch_size=5,
        max_grad_norm=0.0,
    )
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    args.hf_deepspeed_config.trainer_config_finalize(args, model, 10)
    expected = args.hf_deepspeed_config.config
    # Trainer logs by itself and silences DeepSpeed; DeepSpeed derives the product of batch sizes.
    del expected["steps_per_print"], expected["train_batch_size"]
    own = {"alpha": 0.5, "zo_eps": 1e-2, "seed": 7, "rounding": "nearest", "zo_directions": 2}
    expected["optimizer"]["params"].update(own)
    filled = ds_config(
        path,
        lr=3e-4,
        micro_batch_size=5,
        weight_decay=0.1,
        **own,
        bf16=True,
        hidden_size=hidden_size,
    )
    assert filled == expected


def test_issue_call_gives_what_deepspeed_parses() -> None:
    config = ds_config(ZERO3, lr=1e-3, micro_batch_size=2)
    assert '"auto"' not in json.dumps(config)
    parsed = deepspeed_config.DeepSpeedConfig(config)
    assert parsed.optimizer_name == "Addax"
    assert parsed.optimizer_params == {"lr": 1e-3, **OPTIMIZER_DEFAULTS}
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_clipping == 0
    assert not parsed.bfloat16_config.enabled
    # Without a hidden size DeepSpeed's own defaults stand.
    assert parsed.zero_config.reduce_bucket_size == DeepSpeedZeroConfig().reduce_bucket_size


def test_no_optimizer_block_is_needed_and_the_input_is_not_changed() -> None:
    source = minimal()
    before = copy.deepcopy(source)
    config = ds_config(source, lr=1e-3)
    assert config["optimizer"] == {"type": "Addax", "params": {"lr": 1e-3, **OPTIMIZER_DEFAULTS}}
    assert source == before
    config["zero_optimization"]["stage"] = 1
    assert source == before


def test_left_over_auto_is_named() -> None:
    with pytest.raises(UserError) as caught:
        ds_config(ZERO3)
    assert "optimizer.params.lr: pass lr=" in str(caught.value)
    assert "train_micro_batch_size_per_gpu: pass micro_batch_size=" in str(caught.value)
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}
    with pytest.raises(UserError, match=r"scheduler\.params\.total_num_steps"):
        ds_config(minimal(scheduler=schedule), lr=1e-3)


@pytest.mark.parametrize(
    ("path", "in_json", "argument", "given"),
    [
        ("optimizer.params.lr", 1e-3, "lr", 1e-4),
        ("optimizer.params.alpha", 0.1, "alpha", 0.2),
        ("optimizer.params.zo_eps", 1e-3, "zo_eps", 1e-2),
        ("optimizer.params.weight_decay", 0.0, "weight_decay", 0.1),
        ("optimizer.params.seed", 1, "seed", 0),
        ("optimizer.params.rounding", "nearest", "rounding", "stochastic"),
        ("gradient_clipping", 0.5, "max_grad_norm", 1.0),
        ("train_micro_batch_size_per_gpu", 3, "micro_batch_size", 4),
        ("bf16.enabled", True, "bf16", False),
    ],
)
def test_contradiction_names_both(path: str, in_json: Any, argument: str, given: Any) -> None:
    config = with_key(path, in_json)
    arguments = {"lr": 1e-3} if path != "optimizer.params.lr" else {}
    with pytest.raises(UserError) as caught:
        ds_config(config, **arguments, **{argument: given})
    message = str(caught.value)
    assert message.startswith(f"{argument} is {given!r}, but {path}")
    assert repr(in_json) in message
    # The value of the JSON alone, and the same value twice, are both fine.
    for extra in ({}, {argument: in_json}):
        filled: Any = ds_config(config, **(arguments | extra))
        for part in path.split("."):
            filled = filled[part]
        assert filled == in_json


def test_wrong_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"alpha = 2: it must be a number from 0 to 1"):
        ds_config(ZERO3, lr=1e-3, micro_batch_size=1, alpha=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alhpa'"):
        ds_config(ZERO3, lr=1e-3, micro_batch_size=1, alhpa=0.5)


def test_key_without_effect_warns(caplog: pytest.LogCaptureFixture) -> None:
    ds_config(with_key("zero_optimization.round_robin_gradients", True), lr=1e-3)
    assert "zero_optimization.round_robin_gradients has no effect" in caplog.text
