"""The command line, its defaults, and how it is settled against the DeepSpeed JSON."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DummyOptim
from deepspeed.accelerator import get_accelerator
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from addax_ds import AddaxConfig, UserError
from addax_ds.config.arguments import (
    DEMO_GLOBAL_BATCH_SIZE,
    DEMO_PRESET,
    parse_arguments,
)
from addax_ds.config.training_arguments import (
    DEFAULTS,
    RULES,
    check_training_arguments,
    check_values,
)
from addax_ds.config.values import value_problems
from addax_ds.utils.files import read_regular
from docs import render_arguments

ROOT = Path(__file__).parents[2]
ZERO3 = str(ROOT / "ds_configs" / "zero3.json")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def config(tmp_path: Path, **kwargs: Any) -> AddaxConfig:
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "seed": 0, "learning_rate": 0.1}
    return AddaxConfig(**(defaults | kwargs))


def write_json(tmp_path: Path, **params: Any) -> str:
    """The ready ZeRO-3 config with these optimizer settings instead of "auto"."""
    config = json.loads(Path(ZERO3).read_text())
    config["optimizer"]["params"] |= params
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


# ---- TrainingArguments ---------------------------------------------------------------------------


# Fields that were examined, and work as Transformers documents.
WORKS = """
    activation_checkpointing activation_checkpointing_kwargs bf16 data_seed dataloader_drop_last
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
    dataloader_prefetch_factor ddp_backend ddp_timeout debug deepspeed disable_tqdm do_eval
    eval_delay eval_on_start eval_steps eval_strategy fp16 full_determinism
    gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token learning_rate load_best_model_at_end local_rank log_level log_level_replica
    log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    lr_scheduler_kwargs max_grad_norm max_steps metric_for_best_model num_train_epochs
    output_dir per_device_eval_batch_size per_device_train_batch_size project push_to_hub
    remove_unused_columns report_to restore_callback_states_from_checkpoint
    resume_from_checkpoint run_name
    save_on_each_node save_only_model save_steps save_strategy save_total_limit seed
    skip_memory_metrics tf32 trackio_bucket_id trackio_space_id trackio_static_space_id
    use_cache use_cpu warmup_steps weight_decay
"""


def test_every_field_of_training_arguments_has_been_examined() -> None:
    """A field of a new version is refused, without effect, or looked at and listed above."""
    installed = {field.name for field in dataclasses.fields(TrainingArguments)}
    works = set(WORKS.split())
    assert not installed - works - set(RULES), "new fields: examine what Addax does with them"
    assert not (works | set(RULES)) - installed, "fields that are gone"
    assert not works & set(RULES)


def test_defaults_pass(tmp_path: Path) -> None:
    check_training_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


REFUSED: dict[str, Any] = {
    "optim": "sgd",
    "adam_beta1": 0.0,
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "torch_compile": True,
    "use_liger_kernel": True,
    "fsdp": "full_shard",
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "enable_jit_checkpoint": True,
    "accelerator_config": {"split_batches": True},
    "include_num_input_tokens_seen": "all",
    "ignore_data_skip": True,
    "torch_empty_cache_steps": 5,
    "dataloader_in_order": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_value_is_named_with_a_reason(name: str) -> None:
    with pytest.raises(UserError) as caught:
        check_values({name: REFUSED[name]})
    assert f"--{name} {REFUSED[name]}: {RULES[name].note}" in str(caught.value)


def test_restrictions_are_about_known_defaults() -> None:
    """Every restricted field lets Transformers' default through."""
    for name, rule in RULES.items():
        assert rule.accepts(DEFAULTS[name]), name
        assert rule.note.endswith("."), name


def test_all_violations_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(["--fp16_full_eval", "--adam_beta1", "0.5", "--use_cpu"])
    assert "--fp16_full_eval" in str(caught.value)
    assert "--adam_beta1" in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("gradient_accumulation_steps", "0"),
        ("gradient_accumulation_steps", "-2"),
        ("max_grad_norm", "-1"),
        ("max_grad_norm", "nan"),
        ("max_grad_norm", "inf"),
        ("desync_check_steps", "-1"),
        ("ddp_timeout", "100000000000000"),
        ("task_seed", "4294967296"),
    ],
)
def test_values_out_of_range_are_named(flag: str, value: str) -> None:
    task = ["--task", "sst2"] if flag == "task_seed" else []
    with pytest.raises(UserError, match=rf"--{flag} "):
        parse_arguments([*task, f"--{flag}", value])


@pytest.mark.parametrize("report", integration_utils.INTEGRATION_TO_CALLBACK)
@pytest.mark.filterwarnings("ignore")  # callbacks that are half made complain when they go
def test_a_report_goes_to_what_is_installed(report: str) -> None:
    try:
        integration_utils.INTEGRATION_TO_CALLBACK[report]()
        problems = []
    except Exception:
        problems = [f"--report_to {report}: it is not installed here, or is switched off."]
    assert list(value_problems({"report_to": report})) == problems
    assert list(value_problems({"report_to": ["all", report, "none"]})) == problems


@pytest.mark.parametrize("name", ["file", "file/output", "file/a/b"])
def test_an_output_folder_is_no_file_nor_in_one(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / name
    with pytest.raises(UserError) as caught:
        config(tmp_path, output_dir=str(output))
    assert f"--output_dir {output}: {tmp_path / 'file'} is not a folder" in str(caught.value)
    with pytest.raises(UserError, match=r"--output_dir 0000.*: "):
        config(tmp_path, output_dir="0" * 5000)
    for good in (tmp_path, tmp_path / "new", tmp_path / "a/b/c"):
        assert not list(value_problems({"output_dir": str(good)}))


# ---- AddaxConfig ---------------------------------------------------------------------------------


def test_the_json_is_filled(tmp_path: Path) -> None:
    args = config(
        tmp_path,
        deepspeed=ZERO3,
        learning_rate=3e-4,
        weight_decay=0.1,
        seed=9,
        bf16=True,
        alpha=0.25,
        rounding="nearest",
    )
    assert args.deepspeed == ZERO3
    filled = args.hf_deepspeed_config.config
    assert filled["optimizer"] == {
        "type": "Addax",
        "params": {
            "lr": 3e-4,
            "weight_decay": 0.1,
            "alpha": 0.25,
            "zo_eps": 1e-3,
            "seed": 9,
            "rounding": "nearest",
            "zo_directions": 1,
        },
    }
    assert filled["gradient_clipping"] == 0
    assert filled["gradient_accumulation_steps"] == 1


def test_the_json_is_read_once(
    tmp_path: Path, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(Path(ZERO3).read_text())

    def read_and_delete(path: Path, encoding: str) -> str:
        text = read_regular(path, encoding)
        path.unlink()
        return text

    monkeypatch.setattr("addax_ds.config.deepspeed.read_regular", read_and_delete)
    *_, args = parse_arguments(["--deepspeed", str(path)])
    assert args.deepspeed == str(path)
    assert args.hf_deepspeed_config.config["optimizer"]["params"]["alpha"] == 1e-3


def test_micro_batches_are_kept_from_the_engine(tmp_path: Path) -> None:
    args = config(tmp_path, deepspeed=ZERO3, gradient_accumulation_steps=4, max_grad_norm=0.5)
    settings = args.settings
    assert settings.gradient_accumulation_steps == 4
    assert settings.hyperparameters.max_grad_norm == 0.5
    filled = args.hf_deepspeed_config.config
    assert filled["gradient_accumulation_steps"] == 1
    assert filled["train_batch_size"] == args.per_device_train_batch_size
    assert filled["gradient_clipping"] == 0.5


def test_fp16_where_deepspeed_cannot_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UserError, match="does not train fp16 weights on this device: use --bf16"):
        config(tmp_path, deepspeed=ZERO3, fp16=True)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    args = config(tmp_path, deepspeed=ZERO3, fp16=True)
    assert args.hf_deepspeed_config.config["fp16"]["enabled"] is True


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_json_without_the_block_would_train_fp32(tmp_path: Path, dtype: str) -> None:
    source = json.loads(Path(ZERO3).read_text())
    del source[dtype]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(source))
    with pytest.raises(UserError, match=rf'--{dtype} is True, .* "{dtype}": .*"auto"'):
        config(tmp_path, deepspeed=str(path), **{dtype: True})


def test_accumulation_and_clipping_may_stand_in_the_json_alone(
    tmp_path: Path, launched: None
) -> None:
    config = json.loads(Path(ZERO3).read_text())
    config |= {"gradient_accumulation_steps": 3, "gradient_clipping": 0.25}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    *_, args = parse_arguments(["--deepspeed", str(path)])
    assert (args.gradient_accumulation_steps, args.max_grad_norm) == (3, 0.25)
    with pytest.raises(UserError, match=r"--max_grad_norm is 1\.0, but gradient_clipping .* 0\.25"):
        parse_arguments(["--deepspeed", str(path), "--max_grad_norm", "1"])


def test_configured_values_reach_deepspeed(
    tmp_path: Path, launched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate must hand the very block that `AddaxConfig` wrote to `deepspeed.initialize`."""
    source = {"zero_optimization": {"stage": 3}}
    args = config(tmp_path, deepspeed=source, learning_rate=3e-4, method="mezo", zo_eps=2e-3)
    seen: dict[str, Any] = {}

    def initialize(**kwargs: Any) -> Any:
        seen.update(kwargs["config_params"])
        raise InterruptedError

    monkeypatch.setattr("deepspeed.initialize", initialize)
    model = torch.nn.Linear(2, 2)
    # The Accelerator sets this one; here it ends with the test.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    accelerator = Accelerator(deepspeed_plugin=args.deepspeed_plugin)
    with pytest.raises(InterruptedError):
        accelerator.prepare(model, DummyOptim(model.parameters()))
    assert seen["train_micro_batch_size_per_gpu"] == args.per_device_train_batch_size
    assert seen["optimizer"]["type"] == "Addax"
    expected = {"lr": 3e-4, "alpha": 1.0, "zo_eps": 2e-3, "seed": 0}
    assert expected.items() <= seen["optimizer"]["params"].items()


def test_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AddaxConfig, "n_gpu", 4)
    with pytest.raises(UserError, match="One process sees 4 GPUs: start one a GPU"):
        config(tmp_path)


def test_what_trainer_would_find_after_loading_is_refused(tmp_path: Path) -> None:
    source: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3},
    }
    with pytest.raises(UserError, match=r"train_micro_batch_size_per_gpu=4.*batch_size=8"):
        config(tmp_path, deepspeed=source)
    source = {"zero_optimization": {"stage": 2}}
    with pytest.raises(UserError, match=r"zero_optimization\.stage = 2"):
        config(tmp_path, deepspeed=source)
    source = {"optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match=r"optimizer\.type"):
        config(tmp_path, deepspeed=source)


# ---- parse_arguments -----------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_demo_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, training = parse_arguments([])
    assert model.model_name_or_path is None
    assert data.train_file is None
    for name, value in DEMO_PRESET.items():
        assert getattr(training, name) == value, name
    assert training.per_device_train_batch_size == DEMO_GLOBAL_BATCH_SIZE
    assert training.settings.hyperparameters.alpha == 1e-3
    assert training.output_dir == "output"
    assert training.use_cpu == (not torch.accelerator.is_available())
    # The user's flags win, and the preset never contradicts a method.
    *_, training = parse_arguments(["--max_steps=3", "--seed", "7", "--method", "mezo"])
    assert (training.max_steps, training.seed) == (3, 7)
    assert training.settings.hyperparameters.alpha == 1


def test_demo_batch_is_global(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        parse_arguments(["--deepspeed", ZERO3])


def test_demo_batch_is_divided(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, training = parse_arguments(["--deepspeed", ZERO3, "--local_rank=0"])
    assert training.per_device_train_batch_size == DEMO_GLOBAL_BATCH_SIZE
    monkeypatch.setattr("addax_ds.config.arguments._ranks", lambda: 2)
    *_, training = parse_arguments(["--deepspeed", ZERO3])
    assert training.per_device_train_batch_size == DEMO_GLOBAL_BATCH_SIZE // 2


@pytest.mark.parametrize("own", ["data", "model"])
def test_preset_is_for_the_demo_only(own: str, rows: str) -> None:
    flags = ["--train_file", rows] if own == "data" else ["--model_name_or_path", "x"]
    with pytest.raises(UserError, match="--learning_rate is missing"):
        parse_arguments(flags)
    *_, training = parse_arguments([*flags, "--learning_rate=1e-3"])
    assert training.max_steps == -1
    assert training.output_dir == "output"
    assert training.max_grad_norm == 0


def test_argument_files(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    values = {
        "train_file": rows,
        "learning_rate": "1e-4",
        "report_to": ["tensorboard", "wandb"],
        "bf16": True,
        "append_eos": False,
        "length_threshold": 30,
        "max_steps": -1,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "run_name": None,
    }
    path = tmp_path / "args.json"
    path.write_text(json.dumps(values, indent="\t"))
    _, data, training = parse_arguments([str(path)])
    assert data.train_file == [rows]
    assert data.append_eos is False
    assert training.learning_rate == 1e-4
    assert training.bf16 is True
    assert training.lr_scheduler_kwargs == {"num_cycles": 1}
    assert training.report_to == ["tensorboard", "wandb"]
    assert training.settings.length_threshold == 30
    # YAML reads 1e-4 as a string; flags win over the file, wherever it stands.
    path = tmp_path / "args.yaml"
    path.write_text(f"train_file: {rows}\nlearning_rate: 1e-4\nalpha: 0.5\nlogging_steps: 3\n")
    *_, training = parse_arguments(["--local_rank=0", str(path), "--alpha", "0.25"])
    assert (training.learning_rate, training.logging_steps) == (1e-4, 3)
    assert training.settings.hyperparameters.alpha == 0.25


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_an_argument_file_behind_a_flag_of_many_values(
    ending: str, tmp_path: Path, rows: str
) -> None:
    """An argument file is none of the data, and data are no argument file."""
    settings, data = tmp_path / f"run.{ending}", tmp_path / "data.json"
    values = {"alpha": 0.5, "learning_rate": 0.1, "columns": ["text=a", "tools=b"]}
    settings.write_text(json.dumps(values))
    data.write_text(json.dumps({"text": "a"}))
    for argv in (
        [str(settings), "--train_file", rows, str(data)],
        ["--train_file", rows, str(data), str(settings)],
        ["--train_file", rows, str(settings), str(data)],
        [f"--train-file={rows}", str(settings)],
    ):
        _, found, training = parse_arguments([*argv, "--local_rank=0"])
        assert found.train_file == [rows, str(data)][: argv.count(rows) + 1]
        assert found.columns == ["text=a", "tools=b"]
        assert training.settings.hyperparameters.alpha == 0.5

    adapters = ["--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj"]
    model, *_ = parse_arguments([*adapters, str(settings), "--train_file", rows])
    assert model.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "learning_rat: no such argument. Did you mean 'learning_rate'"),
        ("- 1\n", "must map"),
        ("a: [\n", "Cannot read"),
        ("max_steps: many\n", "max_steps"),
        ("learning_rate: .nan\n", "learning_rate nan: it must be a finite number"),
        ("learning_rate: [1]\n", "learning_rate: a list is not a value"),
        ("save_strategy: no\n", "save_strategy: it is not true or false"),
        ("2: 1\n", "2: no such argument"),
        ("train_file: [1]\n", "train_file: its items must be texts; quote them"),
        ("train_file: []\n", "--train_file: it names nothing"),
        ("train_file: {a: b}\n", "train_file: an object is not a value"),
    ],
)
def test_bad_argument_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_arguments([str(path)])
    assert message in str(caught.value)


@pytest.mark.parametrize("more", [[], ["--eval_strategy=epoch"], ["--eval_on_start"]])
def test_rows_that_nothing_evaluates_are_said(more: list[str], caplog: Any) -> None:
    flags = ["--train_file", __file__, "--validation_file", __file__, "--learning_rate=1"]
    with caplog.at_level(logging.WARNING, "addax_ds"):
        parse_arguments([*flags, "--model_name_or_path=m", *more])
    assert ("--validation_file has no effect" in caplog.text) == (not more)


@pytest.mark.parametrize("word", ["false", "no"])
def test_a_file_may_say_that_nothing_is_resumed(tmp_path: Path, word: str) -> None:
    path = tmp_path / "args.yaml"
    path.write_text(f"resume_from_checkpoint: {word}\n")
    *_, args = parse_arguments([str(path)])
    assert args.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zo_ep", "1"], "Unknown flag --zo_ep. Did you mean 'zo_eps'"),
        (["--alpha", "x"], "--alpha"),
        (["--method", "adam"], "--method"),
        (["absent.yaml"], "no argument file absent.yaml"),
        (["words"], "Not a flag"),
        (["a.yaml", "b.yaml"], "Not a flag"),
        (["--deepspeed", ZERO3], "needs a launcher"),
        (["--train_file", "absent.jsonl"], "--train_file absent.jsonl"),
        (["--train_file", "absent.*"], "--train_file absent.*: no files of rows there"),
        (["--train_file", __file__, __file__], "is named twice"),
        (["--train_file", __file__, "--train-file", "b"], "--train_file is given twice"),
        (["--train_file", __file__, "--dataset_name", "a"], "are two sources of the same"),
        (["--train_file", __file__, "--columns", "a=b"], "--columns a=b: 'a' is no name"),
        (["--columns", "text=b"], "--columns needs --train_file or --dataset_name"),
        (["--train_split", "train"], "--train_split needs --dataset_name"),
        (["--train_file", __file__, "--test_split", "a"], "--test_split needs --dataset_name"),
        (
            ["--dataset_name=a", "--validation_split=b", "--validation_file", __file__],
            "--validation_file and --validation_split are two sources of the same",
        ),
        (["--dataset_name", "a", "--eval_strategy", "epoch"], "or --validation_split"),
        (["--dataset_name", "a", "--num_train", "3"], "--num_train has no effect with --dataset_"),
        (["--test_file", __file__], "--test_file needs --train_file"),
        (["--train_file", __file__, "--eval_strategy", "epoch"], "needs --validation_file."),
        (["--model_revision", "main"], "--model_revision has no effect"),
        (["--cpu_threads", "0"], "--cpu_threads"),
        (["--max_length", "1"], "--max_length"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size"),
        (["--seed", "-1"], "--seed"),
        (["--eval_strategy", "sometimes"], "sometimes"),
        (["--alpha", "2"], "--alpha"),
        (
            [
                "--method=mezo",
                "--per_device_zo_batch_size=2",
                "--per_device_train_batch_size=4",
            ],
            "--per_device_train_batch_size has no effect",
        ),
    ],
)
def test_bad_flags_are_user_errors(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--sharding", "zero3"], {}, r"--sharding zero3 needs --deepspeed zero3\."),
        (["--sharding", "fsdp2"], {}, "--sharding fsdp2 needs a launcher"),
        (
            ["--sharding", "fsdp2"],
            {"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"},
            r"sets ACCELERATE_USE_FSDP, .* use launch/accelerate\.yaml",
        ),
        (
            [],
            {"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"},
            r"sets ACCELERATE_USE_DEEPSPEED, .* use launch/accelerate\.yaml",
        ),
        (
            ["--sharding", "none", "--deepspeed", "ds_configs/zero3.json"],
            {"LOCAL_RANK": "0"},
            "--sharding none contradicts --deepspeed",
        ),
    ],
)
def test_back_ends_that_do_not_fit_the_launcher(
    flags: list[str], environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        parse_arguments(flags)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerate_is_not_to_shard_a_model_of_python_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=f"sets {name}, .* use launch/accelerate"):
        AddaxConfig(str(tmp_path), learning_rate=1e-3)


def test_a_json_that_is_not_there(launched: None) -> None:
    with pytest.raises(UserError, match=r"no DeepSpeed config absent\.json"):
        parse_arguments(["--deepspeed", "absent.json"])


def test_json_wins_over_defaults_but_not_over_flags(launched: None, tmp_path: Path) -> None:
    path = write_json(tmp_path, lr=5e-4, seed=11, weight_decay=0.2, alpha=0.5)
    *_, training = parse_arguments(["--deepspeed", path])
    assert (training.learning_rate, training.seed, training.weight_decay) == (5e-4, 11, 0.2)
    assert training.settings.hyperparameters.alpha == 0.5
    for flags, key in (
        (["--learning_rate", str(DEFAULTS["learning_rate"])], "optimizer.params.lr"),
        (["--learning_rate", "1e-3"], "optimizer.params.lr"),
        (["--seed", "3"], "optimizer.params.seed"),
        (["--weight_decay", "0"], "optimizer.params.weight_decay"),
        (["--alpha", "0.25"], "optimizer.params.alpha"),
    ):
        with pytest.raises(UserError) as caught:
            parse_arguments(["--deepspeed", path, *flags])
        assert flags[0] in str(caught.value)
        assert key in str(caught.value)
        assert path in str(caught.value)


# ---- the document --------------------------------------------------------------------------------


def test_document_is_current() -> None:
    committed = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert committed == render_arguments.render(), (
        "run: python -m docs.render_arguments docs/arguments.md"
    )


def test_a_home_folder_is_found_wherever_it_is_named(tmp_path, monkeypatch):
    """No shell has seen the one in a file, or after a flag's =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "run.yaml"
    file.write_text("train_file: ~/rows.jsonl\nlearning_rate: 0.1\noutput_dir: ~/out\n")
    model, data, training = parse_arguments([str(file), "--model_name_or_path=~/model"])
    assert data.train_file == [str(tmp_path / "rows.jsonl")]
    assert model.model_name_or_path == str(tmp_path / "model")
    assert training.output_dir == str(tmp_path / "out")
