"""Settling the arguments of Addax: defaults, methods, ranges, and contradictions with the JSON."""

from types import SimpleNamespace
from typing import Any

import pytest

from addax_ds import UserError
from addax_ds.config.settings import AddaxArguments, AddaxSettings, resolve


def training_args(**kwargs: Any) -> Any:
    """What `resolve` reads of `TrainingArguments`."""
    values = {
        "seed": 0,
        "bf16": False,
        "fp16": False,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
    }
    return SimpleNamespace(**(values | kwargs))


def settled(json_params: dict[str, Any] | None = None, **addax: Any) -> Any:
    return resolve(AddaxArguments(**addax), training_args(), json_params or {}, "ds.json")


def test_defaults() -> None:
    assert settled() == AddaxSettings(
        method="addax",
        alpha=1e-3,
        zo_eps=1e-3,
        length_threshold="median",
        rounding="stochastic",
        seed=0,
        per_device_zo_batch_size=6,
        gradient_accumulation_steps=1,
        max_grad_norm=0.0,
        desync_check_steps=100,
    )


def test_methods() -> None:
    mezo = settled(method="mezo", per_device_zo_batch_size=3)
    assert (mezo.alpha, mezo.length_threshold, mezo.per_device_zo_batch_size) == (1.0, None, 3)
    sgd = settled(method="ip-sgd", alpha=0.0)
    assert (sgd.alpha, sgd.length_threshold, sgd.per_device_zo_batch_size) == (0.0, None, 0)
    whole = settled(method="addax-wa", alpha=0.2)
    assert (whole.alpha, whole.length_threshold) == (0.2, None)
    for threshold in (200, "200"):
        assert settled(length_threshold=threshold).length_threshold == 200


@pytest.mark.parametrize(
    ("addax", "message"),
    [
        ({"method": "adam"}, "--method adam"),
        ({"alpha": 1.5}, r"--alpha = 1\.5: it must be a number from 0 to 1"),
        ({"alpha": float("nan")}, "--alpha = nan"),
        ({"alpha": 1.0}, "--method mezo"),
        ({"alpha": 0.0}, "--method ip-sgd"),
        ({"zo_eps": 0.0}, r"--zo_eps = 0\.0: it must be a number above 0"),
        ({"zo_eps": -1.0}, "--zo_eps"),
        ({"rounding": "up"}, "--rounding"),
        ({"length_threshold": "mean"}, "--length_threshold mean"),
        ({"length_threshold": 0}, "--length_threshold 0"),
        ({"per_device_zo_batch_size": 0}, "--per_device_zo_batch_size"),
        ({"method": "mezo", "alpha": 0.5}, r"--alpha 0\.5 contradicts --method mezo"),
        ({"method": "ip-sgd", "alpha": 0.5}, r"--alpha 0\.5 contradicts --method ip-sgd"),
        ({"method": "ip-sgd", "zo_eps": 1e-3}, "--zo_eps has no effect"),
        ({"method": "ip-sgd", "per_device_zo_batch_size": 2}, "per_device_zo_batch_size has no"),
        ({"method": "mezo", "length_threshold": 9}, "--length_threshold has no effect"),
        ({"method": "addax-wa", "length_threshold": 9}, "--length_threshold has no effect"),
    ],
)
def test_wrong_addax_arguments(addax: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settled(**addax)


def test_json_alone_wins_over_the_default_and_auto_means_the_argument() -> None:
    alone = settled({"alpha": 0.2, "zo_eps": 1e-2, "rounding": "nearest", "seed": 0})
    assert (alone.alpha, alone.zo_eps, alone.rounding) == (0.2, 1e-2, "nearest")
    auto = dict.fromkeys(("alpha", "zo_eps", "rounding", "seed", "lr"), "auto")
    given = settled(auto, alpha=0.3, zo_eps=1e-2, rounding="nearest")
    assert (given.alpha, given.zo_eps, given.rounding) == (0.3, 1e-2, "nearest")
    assert settled({"alpha": 0.3}, alpha=0.3).alpha == 0.3
    # A JSON that is shared between methods may keep its zo_eps.
    assert settled({"zo_eps": 1e-2}, method="ip-sgd").alpha == 0


@pytest.mark.parametrize(
    ("addax", "in_json", "parts"),
    [
        ({"alpha": 0.2}, {"alpha": 0.1}, ["--alpha is 0.2", "optimizer.params.alpha", "0.1"]),
        ({"zo_eps": 0.2}, {"zo_eps": 0.1}, ["--zo_eps is 0.2", "optimizer.params.zo_eps", "0.1"]),
        ({"rounding": "nearest"}, {"rounding": "stochastic"}, ["--rounding", "'stochastic'"]),
        ({"method": "mezo"}, {"alpha": 0.1}, ["--method mezo", "optimizer.params.alpha", "0.1"]),
        ({}, {"seed": 5}, ["--seed is 0", "optimizer.params.seed", "5"]),
    ],
)
def test_contradiction_names_both(
    addax: dict[str, Any], in_json: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        settled(in_json, **addax)
    for part in [*parts, "ds.json"]:
        assert part in str(caught.value)
