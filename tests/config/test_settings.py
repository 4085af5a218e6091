"""Settling the arguments of Addax: defaults, methods, ranges, and contradictions with the JSON."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from addax_ds import AddaxConfig, UserError
from addax_ds.config.addax_config import divide_batches
from addax_ds.config.settings import AddaxSettings
from addax_ds.optim.hyperparameters import Hyperparameters


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(json_params: dict[str, Any] | None = None, **options: Any) -> AddaxConfig:
    """With ``optimizer.params`` of a DeepSpeed JSON, if there are any."""
    deepspeed = None
    if json_params is not None:
        block = {"type": "Addax", "params": json_params}
        deepspeed = {"zero_optimization": {"stage": 3}, "optimizer": block}
    defaults = {"use_cpu": True, "per_device_train_batch_size": 6, "deepspeed": deepspeed}
    if "lr" not in (json_params or {}):
        defaults["learning_rate"] = 0.1
    return AddaxConfig(**(defaults | options))


def settled(json_params: dict[str, Any] | None = None, **options: Any) -> AddaxSettings:
    return config(json_params, **options).settings


def test_defaults() -> None:
    args = config()
    assert args.settings == AddaxSettings(
        method="addax",
        hyperparameters=Hyperparameters(lr=args.learning_rate, seed=args.seed),
        length_threshold="median",
        per_device_zo_batch_size=6,
        gradient_accumulation_steps=1,
    )
    assert args.desync_check_steps == 100
    assert (args.max_grad_norm, args.output_dir) == (0.0, "output")


def test_methods() -> None:
    def essence(settings: AddaxSettings) -> tuple[Any, ...]:
        rows = settings.per_device_zo_batch_size
        return settings.hyperparameters.alpha, settings.length_threshold, rows

    own_rows = ["per_device_zo_batch_size"]
    mezo = settled(method="mezo", per_device_zo_batch_size=3, given=own_rows)
    assert essence(mezo) == (1.0, None, 3)
    assert essence(settled(method="ip-sgd", alpha=0.0)) == (0.0, None, 0)
    control = settled(method="ip-sgd", length_threshold=200)
    assert essence(control) == (0.0, 200, 0)
    assert essence(settled(method="addax-wa", alpha=0.2)) == (0.2, None, 6)
    for threshold in (200, "200"):
        assert settled(length_threshold=threshold).length_threshold == 200


@pytest.mark.parametrize(
    ("addax", "message"),
    [
        ({"method": "adam"}, "--method adam"),
        ({"alpha": 1.5}, r"--alpha = 1\.5: it must be a number from 0 to 1"),
        ({"alpha": float("nan")}, "--alpha nan: it must be a finite number"),
        ({"alpha": 1.0}, "--method mezo"),
        (
            {"alpha": "x", "method": "mezo"},
            r"--alpha = 'x': it must be a number from 0 to 1\.$",
        ),
        ({"ddp_timeout": 10**14}, "--ddp_timeout 100000000000000: it must be at most 1000000000"),
        ({"alpha": 0.0}, "--method ip-sgd"),
        ({"zo_eps": 0.0}, r"--zo_eps = 0\.0: it must be a number above 0"),
        ({"learning_rate": -1.0}, r"--learning_rate = -1\.0: it must be a number of at least 0"),
        ({"zo_eps": -1.0}, "--zo_eps"),
        ({"rounding": "up"}, "--rounding"),
        ({"length_threshold": "mean"}, "--length_threshold mean"),
        ({"length_threshold": 0}, "--length_threshold 0"),
        ({"per_device_zo_batch_size": 0}, "--per_device_zo_batch_size"),
        ({"method": "mezo", "alpha": 0.5}, r"--alpha 0\.5 contradicts --method mezo"),
        ({"method": "ip-sgd", "alpha": 0.5}, r"--alpha 0\.5 contradicts --method ip-sgd"),
        (
            {"method": "ip-sgd", "length_threshold": "auto", "max_steps": 5},
            "--length_threshold auto is for --method addax.* rows longer than L_T are left out",
        ),
        ({"method": "ip-sgd", "zo_eps": 1e-3}, "--zo_eps has no effect"),
        ({"method": "ip-sgd", "per_device_zo_batch_size": 2}, "per_device_zo_batch_size has no"),
        ({"method": "mezo", "length_threshold": 9}, "--length_threshold has no effect"),
        ({"method": "addax-wa", "length_threshold": 9}, "--length_threshold has no effect"),
        ({"weight_decay": -1.0}, "--weight_decay = -1"),
        ({"label_smoothing_factor": 0.1}, r"--label_smoothing_factor 0\.1: "),
        ({"deepspeed": "absent.json"}, r"no DeepSpeed config absent\.json"),
        ({"bf16": True, "fp16": True}, "TrainingArguments: At most one of fp16 and bf16"),
        (
            {"method": "mezo", "per_device_zo_batch_size": 2},
            "--per_device_train_batch_size has no effect with --method mezo",
        ),
    ],
)
def test_wrong_arguments(addax: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(**addax)


def test_json_alone_wins_over_the_default_and_auto_means_the_argument() -> None:
    in_json = {"alpha": 0.2, "zo_eps": 1e-2, "rounding": "nearest", "seed": 5, "lr": 0.1}
    args = config(in_json)
    assert args.settings.hyperparameters == Hyperparameters(**in_json)
    assert (args.seed, args.learning_rate) == (5, 0.1)
    auto = dict.fromkeys(("alpha", "zo_eps", "rounding", "seed", "lr"), "auto")
    rest = {"rounding": "nearest", "seed": 4, "learning_rate": 0.1}
    given = settled(auto, alpha=0.3, zo_eps=1e-2, **rest).hyperparameters
    assert (given.alpha, given.zo_eps, given.rounding, given.seed) == (0.3, 1e-2, "nearest", 4)
    assert settled({"alpha": 0.3}, alpha=0.3).hyperparameters.alpha == 0.3
    # A JSON that is shared between methods may keep its zo_eps.
    assert settled({"zo_eps": 1e-2}, method="ip-sgd").hyperparameters.alpha == 0


@pytest.mark.parametrize("method", ["addax", "addax-wa", "mezo", "ip-sgd"])
def test_a_learning_rate_has_to_be_given(method: str) -> None:
    options = {"use_cpu": True, "method": method}
    with pytest.raises(UserError, match=r"--learning_rate is missing.*--find_learning_rate"):
        AddaxConfig(**options)
    for rate in (5e-5, 0.0):  # Trainer's default, when it is meant
        args = AddaxConfig(**options, learning_rate=rate)
        assert args.learning_rate == args.settings.hyperparameters.lr == rate
    assert AddaxConfig(**options, find_learning_rate=True).settings.hyperparameters.lr == 0
    with pytest.raises(UserError, match="--learning_rate has no effect with --find_learning_rate"):
        AddaxConfig(**options, find_learning_rate=True, learning_rate=5e-5)


@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_baselines_keep_trainer_s_learning_rate(method: str) -> None:
    deepspeed = {"zero_optimization": {"stage": 3}}
    args = AddaxConfig(use_cpu=True, method=method, deepspeed=deepspeed)
    assert args.learning_rate == TrainingArguments("output", use_cpu=True).learning_rate
    with pytest.raises(UserError, match="--find_learning_rate is for Addax's methods"):
        AddaxConfig(use_cpu=True, method=method, deepspeed=deepspeed, find_learning_rate=True)


@pytest.mark.parametrize(
    ("addax", "in_json", "parts"),
    [
        ({"alpha": 0.2}, {"alpha": 0.1}, ["--alpha is 0.2", "optimizer.params.alpha", "0.1"]),
        ({"zo_eps": 0.2}, {"zo_eps": 0.1}, ["--zo_eps is 0.2", "optimizer.params.zo_eps", "0.1"]),
        ({"rounding": "nearest"}, {"rounding": "stochastic"}, ["--rounding", "'stochastic'"]),
        ({"method": "mezo"}, {"alpha": 0.1}, ["--method mezo", "optimizer.params.alpha", "0.1"]),
        ({"seed": 0}, {"seed": 5}, ["--seed is 0", "optimizer.params.seed", "5"]),
        ({"given": ["seed"]}, {"seed": 5}, ["--seed is 42", "optimizer.params.seed", "5"]),
    ],
)
def test_contradiction_names_both(
    addax: dict[str, Any], in_json: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        settled(in_json, **addax)
    for part in [*parts, "the DeepSpeed config"]:
        assert part in str(caught.value)


def test_batches_are_divided_in_arguments_settings_and_json() -> None:
    args = config({"alpha": 0.2}, per_device_zo_batch_size=3)
    divide_batches(args, 3)
    assert args.per_device_train_batch_size == 2
    assert args.settings.per_device_zo_batch_size == 1
    assert args.settings.gradient_accumulation_steps == args.gradient_accumulation_steps == 3
    assert args.hf_deepspeed_config.config["train_micro_batch_size_per_gpu"] == 2
    assert args.hf_deepspeed_config.config["gradient_accumulation_steps"] == 1


def test_what_clipping_costs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    settled(max_grad_norm=0.0)
    assert "twice" not in caplog.text
    settled(max_grad_norm=1.0)
    assert "first-order forward and backward twice" in caplog.text
