"""What Trainer makes of the arguments only later is refused when they are read."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import SchedulerType

from addax_ds import AddaxConfig, UserError
from addax_ds.config import trials
from addax_ds.config.training_arguments import RULES
from addax_ds.config.trials import check_steps
from addax_ds.training.steps import plan_steps
from tests.support.tiny import examples, rows

CHECKPOINTING = {"activation_checkpointing": True}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(**options: Any) -> AddaxConfig:
    return AddaxConfig(**({"use_cpu": True, "max_steps": 20, "learning_rate": 0.1} | options))


def of_schedule(kind: str, **own: Any) -> dict[str, Any]:
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": own}


REFUSED: list[tuple[dict[str, Any], str]] = [
    (of_schedule("cosine_with_min_lr"), "min_lr or min_lr_rate .* may have num_cycles, min_lr"),
    (of_schedule("cosine_warmup_with_min_lr"), "min_lr or min_lr_rate should be set"),
    (
        of_schedule("warmup_stable_decay"),
        "'num_decay_steps'.* may have num_decay_steps, ",
    ),
    (of_schedule("warmup_stable_decay", num_decay_steps=2, decay_type="x"), "decay type: x"),
    (of_schedule("linear", min_lr=1.0), "'min_lr'.* may have nothing"),
    (of_schedule("cosine", num_cycles="a"), '"num_cycles": "a".*not convert string to float'),
    (of_schedule("polynomial", lr_end=1.0), r"lr_end \(1\.0\) must be smaller"),
    (of_schedule("inverse_sqrt", timescale=0), "division by zero"),
    ({**of_schedule("cosine_with_min_lr"), "max_steps": -1}, "min_lr or min_lr_rate"),
    ({"lr_scheduler_kwargs": "{bad"}, "{bad: it must be a JSON object"),
    ({"lr_scheduler_kwargs": "[1]"}, r"\[1\]: it must be a JSON object"),
    ({**CHECKPOINTING, "activation_checkpointing_kwargs": {"foo": 1}}, '{"foo": 1}.*: foo'),
    ({**CHECKPOINTING, "activation_checkpointing_kwargs": '{"foo": 1}'}, '{"foo": 1}.*: foo'),
    ({**CHECKPOINTING, "activation_checkpointing_kwargs": {"every_n_layers": 0}}, "by zero"),
    ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}}, "foo"),
    ({"dataloader_persistent_workers": True}, "--dataloader_num_workers 0, .*: persistent_workers"),
    ({"dataloader_prefetch_factor": 2}, "--dataloader_num_workers 0, .*: prefetch_factor"),
    (
        {"dataloader_prefetch_factor": 0, "dataloader_num_workers": 1},
        "factor 0: .* least 1",
    ),
    ({"max_steps": 0}, "--max_steps 0: it must be above 0, or -1"),
    ({"save_strategy": "best"}, "--save_strategy best needs --eval_strategy"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("offline", "token", "name", "message"),
    [
        (False, "t", "a/b", ""),
        (True, "t", "a/b", "HF_HUB_OFFLINE"),
        (False, None, "a/b", "there is no token"),
        (False, "t", "a/b/c", "--push_to_hub to a/b/c: Repo id must be"),
        (False, "t", None, "--push_to_hub to not a name: Repo id must"),
    ],
)
def test_a_hub_that_would_refuse(
    offline: bool, token: str | None, name: str | None, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trials, "is_offline_mode", lambda: offline)
    monkeypatch.setattr(trials, "get_token", lambda: token)
    options = {"push_to_hub": True, "hub_model_id": name, "output_dir": "not a name"}
    if not message:
        config(**options)
    else:
        with pytest.raises(UserError, match=message):
            config(**options)


def test_a_rank_that_does_not_upload_needs_no_token(monkeypatch: Any) -> None:
    monkeypatch.setattr(trials, "is_offline_mode", lambda: False)
    monkeypatch.setattr(trials, "get_token", lambda: None)
    args = config(hub_model_id="a/b")
    args.push_to_hub = True
    for rank, refused in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert bool(list(trials.problems(args, in_json=False))) is refused


def test_an_object_in_json_is_what_the_text_says() -> None:
    """Transformers would make numbers of the texts in it, and read none after a blank."""
    options = {**CHECKPOINTING, "activation_checkpointing_kwargs": ' {"determinism_check": "none"}'}
    assert config(**options).activation_checkpointing_kwargs == {"determinism_check": "none"}
    with pytest.raises(UserError, match="1e-7"):
        config(**of_schedule("polynomial") | {"lr_scheduler_kwargs": '{"lr_end": "1e-7"}'})


ACCEPTED: list[dict[str, Any]] = [
    of_schedule("cosine_with_min_lr", min_lr=1e-6),
    of_schedule("warmup_stable_decay", num_decay_steps=4),
    of_schedule("inverse_sqrt", timescale=10),
    {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    {**CHECKPOINTING, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    {"save_strategy": "best", "eval_strategy": "epoch"},
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_what_can_be_made_passes_without_a_word(options: dict[str, Any], caplog: Any) -> None:
    state = torch.get_rng_state()
    config(**options)
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


def test_every_schedule_that_is_not_refused_can_be_tried() -> None:
    """Those that need arguments of their own say so; no other fails."""
    needy = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}
    kinds = {kind.value for kind in RULES["lr_scheduler_type"].allowed}
    assert kinds == {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    for kind in kinds - needy:
        config(lr_scheduler_type=kind, warmup_steps=0 if kind == "constant" else 3)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (of_schedule("constant", min_lr=1.0), "lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps"),
        ({"activation_checkpointing_kwargs": {"foo": 1}}, "activation_checkpointing_kwargs"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
        ({"greater_is_better": True}, "greater_is_better"),
        ({"greater_is_better": False}, "greater_is_better"),
        ({"do_eval": True}, "do_eval"),
        ({"hub_model_id": "me/model"}, "hub_model_id"),
        ({"hub_strategy": "end"}, "hub_strategy"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end"),
        ({"eval_steps": 5}, "eval_steps"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps"),
        ({"logging_steps": 5, "logging_strategy": "no"}, "logging_steps"),
        ({"num_train_epochs": 5, "max_steps": 2}, "num_train_epochs"),
    ],
)
def test_what_has_no_effect_is_said(options: dict[str, Any], name: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "addax_ds"):
        config(**options)
    assert [record.args[0] for record in caplog.records if "no effect" in record.msg] == [name]


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 5, "logging_strategy": "no", "eval_strategy": "steps"},
        {"save_only_model": True, "save_strategy": "no"},  # of a run that is stopped
    ],
)
def test_what_has_an_effect_all_the_same(options: dict[str, Any], caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "addax_ds"):
        config(**options)
    assert not [record.msg for record in caplog.records if "no effect" in record.msg]


def with_scheduler(kind: str, **params: Any) -> dict[str, Any]:
    scheduler = {"type": kind, "params": params}
    return {"zero_optimization": {"stage": 3}, "scheduler": scheduler}


DECAY = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}


@pytest.mark.parametrize(
    ("params", "warmup", "mismatch"),
    [
        ({"total_num_steps": "auto"}, 3, ""),
        ({"total_num_steps": 20}, 3, ""),
        ({"total_num_steps": 20, "warmup_num_steps": 3}, 3, ""),
        ({"total_num_steps": 20, "warmup_num_steps": 1}, 0, ""),
        ({"total_num_steps": 19}, 3, r"total_num_steps=19.*=20"),
        ({"total_num_steps": 20, "warmup_num_steps": 2}, 3, r"warmup_num_steps=2.*=3"),
        ({"total_num_steps": 20, "warmup_num_steps": 2}, 0.25, r"warmup_num_steps=2.*=5"),
    ],
)
def test_step_counts_in_the_json_are_those_of_the_training(params, warmup, mismatch, launched):
    source = with_scheduler("WarmupDecayLR", **(DECAY | params))
    args = config(deepspeed=source, warmup_steps=warmup)
    if not mismatch:
        check_steps(args, 20)
    else:
        with pytest.raises(UserError, match=mismatch):
            check_steps(args, 20)


def test_the_steps_of_the_training_follow_from_its_data(launched: None) -> None:
    """9 short rows in batches of 4 are 3 steps an epoch, as the loader has them."""
    lengths = [example.length for example in examples(rows(7, 9))]
    for counted, epochs in ((6, 2), (5, 1.5)):
        source = with_scheduler("WarmupDecayLR", **DECAY, total_num_steps=counted)
        more = {"per_device_train_batch_size": 4, "length_threshold": 12}
        args = config(deepspeed=source, max_steps=-1, num_train_epochs=epochs, **more)
        _, schedule = plan_steps(lengths, args)
        assert schedule.steps_per_epoch == 3
        args.num_train_epochs += 1
        with pytest.raises(UserError, match=f"total_num_steps={counted} .*={counted + 3}"):
            plan_steps(lengths, args)
