"""What a trainer in Python writes, removes and uploads."""

import logging
import math
import shutil
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, GenerationConfig, PreTrainedTokenizerFast

from addax_ds import AddaxConfig, AddaxTrainer, UserError
from addax_ds.checkpoint import atomic, folders
from addax_ds.evaluation.scored_set import EvaluationSet
from addax_ds.training import hub, likelihood
from tests.support.tiny import (
    BYTE_VOCABULARY,
    byte_tokenizer,
    examples,
    rows,
    tiny_model,
    tiny_tokenizer,
)


def arguments(folder: Path, **more: Any) -> AddaxConfig:
    usual = {
        **{"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2},
        **{"learning_rate": 0.05, "length_threshold": 12, "report_to": "none"},
        **{"disable_tqdm": True, "save_strategy": "no"},
    }
    return AddaxConfig(**{**usual, **more})


def trainer(folder: Path, dev: Any = None, **more: Any) -> AddaxTrainer:
    return AddaxTrainer(
        model=tiny_model("opt"),
        args=arguments(folder, **more),
        train_dataset=examples(rows(5, 6)),
        eval_dataset=dev or EvaluationSet(examples(rows(2, 2, seed=2))),
        processing_class=tiny_tokenizer(),
    )


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "stops"),
    [
        ({"messages": CHAT}, [1, BYTE_VOCABULARY + 1]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, [1, BYTE_VOCABULARY + 1]),
        ({"text": "hi<|im_end|>"}, 1),
    ],
)
def test_a_model_that_has_learnt_conversations_stops_where_a_turn_ends(row, stops, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    sizes = {"vocab_size": BYTE_VOCABULARY + 2, "max_position_embeddings": 64}
    args = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none"}
    trainer = AddaxTrainer(
        tiny_model(**sizes),
        AddaxConfig(str(tmp_path), **args, **EVERY_STEP, method="ip-sgd", learning_rate=0.05),
        train_dataset=[row] * 4,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    for folder in ("model", "checkpoint-1"):
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == stops


def test_a_limit_of_one_keeps_the_best_checkpoint_and_those_of_others(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    first = trainer(tmp_path, **EVERY_STEP, **best)
    first.train()
    assert sorted(folders.steps(tmp_path)) == [1, 2, 3]
    other = folders.path_of(tmp_path, 9)  # damaged
    other.mkdir()
    again = trainer(tmp_path, **EVERY_STEP, **best, save_total_limit=1, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.args.save_total_limit == 1
    assert sorted(folders.steps(tmp_path)) == [again.state.best_global_step, 9]


BEST = {**EVERY_STEP, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
# The loss falls, so that its first value would stay the largest.
FIRST_IS_BEST = {
    **BEST,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "learning_rate": 1e-3,
}


def resumed(caplog, again: AddaxTrainer, checkpoint: Any = True) -> str:
    """Let a trainer go on; return what it has said since the last time."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=checkpoint)
    return caplog.text


def test_another_metric_on_a_resume_does_not_compete_with_the_old_one(tmp_path, caplog):
    first = trainer(tmp_path, **FIRST_IS_BEST, max_steps=2)
    first.train()
    assert first.best_step == 1
    smallest = {**FIRST_IS_BEST, "greater_is_better": False}
    again = trainer(tmp_path, **smallest)
    resumed(caplog, again, str(tmp_path / "checkpoint-1"))
    assert again.best_step == again.state.best_global_step == 3
    unchanged = trainer(tmp_path, **smallest, max_steps=4)
    assert "the best checkpoint up to now" not in resumed(caplog, unchanged)
    largest_again = trainer(tmp_path, **FIRST_IS_BEST, max_steps=5)
    assert "was chosen by loss" in resumed(caplog, largest_again)
    assert largest_again.best_step == 5


def test_a_value_on_other_rows_does_not_compete_with_that_on_the_old_ones(tmp_path, caplog):
    trainer(tmp_path, **FIRST_IS_BEST, max_steps=2).train()
    same = trainer(tmp_path, **FIRST_IS_BEST)
    assert "the best checkpoint up to now" not in resumed(caplog, same)
    assert same.best_step == 1
    other = trainer(tmp_path, **FIRST_IS_BEST, max_steps=5)
    other.eval_dataset = EvaluationSet(examples(rows(2, 2, seed=3)))
    assert "was chosen on other rows" in resumed(caplog, other)
    assert other.best_step == 4


def test_rows_of_another_metric_may_change(tmp_path, caplog):
    of_a = {**FIRST_IS_BEST, "metric_for_best_model": "a_loss"}
    sets = {name: EvaluationSet(examples(rows(2, 2, seed=s))) for s, name in enumerate("abc", 2)}
    two = {name: sets[name] for name in "ab"}
    trainer(tmp_path, two, **of_a, max_steps=2).train()
    again = trainer(tmp_path, sets, **of_a)
    assert "the best checkpoint up to now" not in resumed(caplog, again)
    assert again.best_step == 1


def test_a_best_checkpoint_that_is_gone_is_not_the_best_one_any_more(tmp_path, caplog):
    first = trainer(tmp_path, **FIRST_IS_BEST, max_steps=2)
    first.train()
    assert first.best_step == 1
    shutil.rmtree(tmp_path / "checkpoint-1")
    again = trainer(tmp_path, **FIRST_IS_BEST)
    assert "is not there any more" in resumed(caplog, again)
    assert again.best_step == again.state.best_global_step == 3


def test_the_best_checkpoint_is_found_where_the_folder_was_moved_to(tmp_path, caplog):
    trainer(tmp_path / "a", **FIRST_IS_BEST, max_steps=2, save_total_limit=2).train()
    (tmp_path / "a").rename(tmp_path / "b")
    again = trainer(tmp_path / "b", **FIRST_IS_BEST, max_steps=5, save_total_limit=2)
    assert "the best checkpoint up to now" not in resumed(caplog, again)
    assert again.best_step == 1
    assert sorted(folders.steps(tmp_path / "b")) == [1, 5]


def test_another_runs_checkpoint_of_the_best_step_is_not_the_best(tmp_path, caplog):
    trainer(tmp_path / "a", **FIRST_IS_BEST, max_steps=2).train()
    trainer(tmp_path / "b", **FIRST_IS_BEST, max_steps=2, seed=5).train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    (tmp_path / "a" / "checkpoint-2").rename(tmp_path / "b" / "checkpoint-2")
    shutil.rmtree(tmp_path / "a")
    again = trainer(tmp_path / "c", **FIRST_IS_BEST, max_steps=3)
    assert "is not there any more" in resumed(caplog, again, str(tmp_path / "b" / "checkpoint-2"))
    assert again.best_step == 3


def test_buffers_that_a_model_makes_when_it_runs_are_not_missed(tmp_path):
    first = trainer(tmp_path, **EVERY_STEP, max_steps=1)
    first.model.model.decoder.layers[0].activation_fn.register_buffer("seen", torch.ones(2))
    first.train()
    again = trainer(tmp_path, **EVERY_STEP, max_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_model_with_fewer_weights_does_not_go_on_from_a_checkpoint(tmp_path):
    """All that it has is there, in the same shapes."""
    trainer(tmp_path, **EVERY_STEP, max_steps=1).train()
    again = trainer(tmp_path, **EVERY_STEP)
    again.model.model.decoder.layers.pop(1)
    with pytest.raises(UserError, match=r"that this model lacks, such as .*layers\.1\."):
        again.train(resume_from_checkpoint=True)


def test_the_mean_loss_after_a_resume_is_of_all_steps(tmp_path):
    steady = {**EVERY_STEP, "lr_scheduler_type": "constant", "logging_steps": 500}
    whole = trainer(tmp_path / "whole", **steady, max_steps=6).train().training_loss
    assert trainer(tmp_path / "parts", **steady, max_steps=4).train().training_loss != whole
    for _ in range(2):  # the second one has nothing left to train
        again = trainer(tmp_path / "parts", **steady, max_steps=6)
        result = again.train(resume_from_checkpoint=True)
        assert result.training_loss == pytest.approx(whole, rel=1e-6)
        assert result.metrics["train_loss"] == result.training_loss


def test_samples_per_second_count_the_rows_of_both_batches(tmp_path):
    many = {"per_device_zo_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": -1}
    epoch = trainer(tmp_path, **many, num_train_epochs=1, per_device_train_batch_size=1)
    metrics = epoch.train().metrics
    steps = math.ceil(6 / 2)  # of D1
    rate = steps * (2 + 2) / metrics["train_runtime"]
    assert metrics["train_samples_per_second"] == pytest.approx(rate, rel=0.01)


def test_a_resume_heeds_the_steps_and_the_schedule_that_it_is_given(tmp_path):
    first = {**EVERY_STEP, "save_steps": 2, "logging_steps": 1}
    trainer(tmp_path, **first, max_steps=4, lr_scheduler_type="linear").train()
    again = trainer(
        tmp_path,
        **{**EVERY_STEP, "save_steps": 3, "logging_steps": 1, "max_steps": 12},
        **{"lr_scheduler_type": "linear", "eval_strategy": "steps", "eval_steps": 5},
    )
    again.train(resume_from_checkpoint=True)
    assert sorted(folders.steps(tmp_path)) == [2, 4, 6, 9, 12]
    log = again.state.log_history
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [5, 10, 12]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    for step in range(5, 13):
        assert rates[step] == pytest.approx(0.05 * (13 - step) / 12)


@pytest.mark.parametrize("value", ["True", "False"])
def test_an_argument_that_train_does_not_heed_is_said(value, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="addax_ds"):
        trainer(tmp_path, resume_from_checkpoint=value).train()
    said = "resume_from_checkpoint of the arguments has no effect on train()" in caplog.text
    assert said == (value == "True")


def test_a_trainer_without_rows_to_train_on_cannot_resume(tmp_path):
    trainer(tmp_path, **EVERY_STEP).train()
    other = trainer(tmp_path, **EVERY_STEP)
    other.template_time = "2025-01-01T00:00:00"
    other.train_dataset = None
    with pytest.raises(UserError, match="training needs a train_dataset"):
        other.train(resume_from_checkpoint=True)


def test_a_refused_resume_leaves_the_time_of_templates(tmp_path):
    first = trainer(tmp_path, **EVERY_STEP)
    first.template_time = "2025-01-01T00:00:00"
    first.train()
    other = trainer(tmp_path, **EVERY_STEP, seed=8)
    other.template_time = "2025-01-02T00:00:00"
    with pytest.raises(UserError, match="the seed was"):
        other.train(resume_from_checkpoint=True)
    assert other.template_time == "2025-01-02T00:00:00"


DATED = "w{{ strftime_now('%d') | int }} {% for m in messages %}{{ m.content }} {% endfor %}"


class Clock:
    """Stands in for ``datetime`` in a module."""

    def __init__(self, now: str) -> None:
        self._now = datetime.fromisoformat(now)

    def now(self) -> datetime:
        return self._now

    fromisoformat = staticmethod(datetime.fromisoformat)


def test_rows_that_read_the_date_are_those_of_the_first_start(tmp_path, monkeypatch):
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": " ".join(f"w{word}" for word in range(length))},
                {"role": "assistant", "content": "w40"},
            ]
        }
        for length in (3, 4, 5, 6, 14, 15, 16, 17)
    ]

    def make(day: str, template: str) -> AddaxTrainer:
        monkeypatch.setattr(likelihood, "datetime", Clock(day))
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        return AddaxTrainer(
            model=tiny_model("opt"),
            args=arguments(tmp_path, **EVERY_STEP, length_threshold="median"),
            train_dataset=dialogues,
            processing_class=tokenizer,
        )

    make("2025-01-01", DATED).train()
    other_day = make("2025-01-02", DATED)
    first = other_day._data_digest
    other_day.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other_day._data_digest != first
    assert other_day.resumed_step == 2
    with pytest.raises(UserError, match="the training data had the digest"):
        make("2025-01-02", "w9 " + DATED).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_a_callback_may_come_with_a_resume(tmp_path):
    watched = {**BEST, "metric_for_best_model": "loss"}
    trainer(tmp_path, **watched, max_steps=2).train()
    again = trainer(tmp_path, **watched)
    again.add_callback(EarlyStoppingCallback(early_stopping_patience=9))
    again.train(resume_from_checkpoint=True)
    states = again.state.stateful_callbacks
    assert states["EarlyStoppingCallback"]["args"] == {
        "early_stopping_patience": 9,
        "early_stopping_threshold": 0.0,
    }
    assert isinstance(states["TrainerControl"], dict)


def test_what_is_uploaded(tmp_path):
    """Trainer leaves out what begins with an underscore; its card would name --optim."""
    assert fnmatch(f"{atomic.UNFINISHED}/checkpoint-1/model.safetensors", "_*")
    uploading = trainer(tmp_path, gradient_accumulation_steps=2, alpha=0.25)
    uploading.train()
    uploading.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "adam" not in card.lower()
    assert "- optimizer: addax_ds, method addax, " in card
    assert ", alpha 0.25" in card
    assert "- zeroth_order_batch_size: 4 over all ranks\n- first_order_batch_size: 4 over" in card


def test_what_is_not_to_be_saved_need_not_be_savable(tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    trainer(tmp_path).train()
    asked = trainer(tmp_path)
    asked.saves_at_end = True
    for refused in (asked, trainer(tmp_path, **EVERY_STEP)):
        with pytest.raises(UserError, match=r"could not be saved .*no such thing"):
            refused.train()


def test_a_repository_out_of_reach_leaves_no_rank_in_a_collective(tmp_path, monkeypatch):
    """Rank 0 cannot make the repository, and another rank hears of it before it saves."""

    @contextmanager
    def refused_elsewhere() -> Any:
        yield
        raise UserError("stopped, as rank 0 had an error")

    other = trainer(tmp_path)
    monkeypatch.setattr(hub, "raise_on_all_ranks", refused_elsewhere)
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(other, "save_model", lambda **_: pytest.fail("rank 0 does not take part"))
    with pytest.raises(UserError, match="as rank 0 had an error"):
        other.push_to_hub()
