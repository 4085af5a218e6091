"""What a trainer in Python writes, removes and uploads."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from addax_ds import AddaxConfig, AddaxTrainer, UserError
from addax_ds.checkpoint import checkpoint
from addax_ds.evaluation.scored_set import EvaluationSet
from addax_ds.training import hub
from tests.support.tiny import examples, rows, tiny_model, tiny_tokenizer


def trainer(folder: Path, **more: Any) -> AddaxTrainer:
    usual = {
        **{"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2},
        **{"learning_rate": 0.05, "length_threshold": 12, "report_to": "none"},
        **{"disable_tqdm": True, "save_strategy": "no"},
    }
    return AddaxTrainer(
        model=tiny_model("opt"),
        args=AddaxConfig(**{**usual, **more}),
        train_dataset=examples(rows(5, 6)),
        eval_dataset=EvaluationSet(examples(rows(2, 2, seed=2))),
        processing_class=tiny_tokenizer(),
    )


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def test_a_limit_of_one_keeps_the_best_checkpoint_and_those_of_others(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    first = trainer(tmp_path, **EVERY_STEP, **best)
    first.train()
    assert sorted(checkpoint.steps(tmp_path)) == [1, 2, 3]
    other = checkpoint.path_of(tmp_path, 9)  # damaged, or from before there were ids
    other.mkdir()
    again = trainer(tmp_path, **EVERY_STEP, **best, save_total_limit=1, max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.args.save_total_limit == 1
    assert sorted(checkpoint.steps(tmp_path)) == [again.state.best_global_step, 9]


def test_a_trainer_without_an_id_may_train_once_more(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # as earlier versions wrote them
        patch.setattr(checkpoint, "write_run_id", lambda *_: None)
        trainer(tmp_path, **EVERY_STEP).train()
    again = trainer(tmp_path, **EVERY_STEP, max_steps=4)
    again.train(resume_from_checkpoint=True)
    again.train()
    assert checkpoint.read_run_id(tmp_path / "checkpoint-4") is None


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
