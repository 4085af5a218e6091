"""Runs that are stopped, and runs that have nothing left to do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from addax_ds import UserError
from addax_ds.checkpoint import atomic, model_folder, resume
from addax_ds.config.addax_config import AddaxConfig
from addax_ds.training.trainer import AddaxTrainer
from tests.support.tiny import choice_set, examples, rows, tiny_tokenizer, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def trainer(model: Path, output: Path, **training: Any) -> AddaxTrainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    values = {
        "output_dir": str(output),
        "length_threshold": 12,
        "alpha": 0.01,
        "use_cpu": True,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
    }
    return AddaxTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AddaxConfig(**(values | training)),
        train_dataset=examples(rows(7, 9)),
        eval_dataset=choice_set(),
        processing_class=tiny_tokenizer(),
    )


def weights(of: AddaxTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in of.model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("max_steps", [4, 2])
def test_a_checkpoint_of_the_last_step_leaves_nothing_to_train(model, tmp_path, max_steps):
    whole = trainer(model, tmp_path, save_steps=4)
    whole.train()
    again = trainer(model, tmp_path, save_steps=4, max_steps=max_steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert same(weights(again), weights(whole))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: AddaxTrainer | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.trainer.request_stop()


def test_a_stopped_run_keeps_what_it_saved_and_goes_on_to_the_same_end(model, tmp_path):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the worst one, which is not the last
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
    }
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    stopped = trainer(model, tmp_path / "stopped", **best)
    stop = StopAt(2)
    stop.trainer = stopped
    stopped.add_callback(stop)
    stopped.train()
    assert stopped.stopped
    assert stopped.state.global_step == 3
    names = {path.name for path in (tmp_path / "stopped").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3"}
    # What the arguments ask for holds for the same trainer's next training.
    assert (stopped.args.load_best_model_at_end, stopped.args.save_total_limit) == (True, 1)
    resumed = trainer(model, tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.stopped
    assert same(weights(resumed), weights(whole))


@pytest.mark.parametrize("saved", [True, False])
def test_adapters_and_whole_models_are_told_apart(model, tmp_path, saved):
    plain = AutoModelForCausalLM.from_pretrained(model)
    if saved:
        (tmp_path / "adapter_config.json").write_text("{}")
    else:
        plain = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="adapters of PEFT"):
        model_folder.load_model(plain, tmp_path)


def test_what_was_found_intact_is_not_read_again(model, tmp_path, monkeypatch):
    whole = trainer(model, tmp_path, save_steps=2)
    whole.train()
    again = trainer(model, tmp_path)
    found = resume.find(str(tmp_path / "checkpoint-2"), again.args)
    monkeypatch.setattr(atomic, "verify", lambda *_: pytest.fail("read again"))
    again.train(resume_from_checkpoint=found)
    assert same(weights(whole), weights(again))


def test_evaluations_leave_the_draws_of_the_training(tmp_path):
    """A run that stops skips one, and goes on with the dropout masks of a run that did not."""
    write_model(tmp_path / "model", "opt", dropout=0.3)
    ends = []
    for number, often in enumerate(({}, {"eval_strategy": "steps", "eval_steps": 1})):
        run = trainer(tmp_path / "model", tmp_path / f"run-{number}", save_strategy="no", **often)
        torch.manual_seed(3)
        run.train()
        ends.append(weights(run))
    assert same(*ends)
