"""Metrics and answers of a run, and the files of ``output_dir`` that hold them."""

import json

from addax_ds.cli.outputs import output_folder
from addax_ds.distributed.collectives import all_gather_object
from addax_ds.evaluation.scored_set import ScoredSet
from addax_ds.training.baseline import BaselineTrainer
from addax_ds.training.steps import StepMixin
from addax_ds.training.trainer import AddaxTrainer

_PREDICTIONS = "predictions_test.jsonl"
_FILES = ("all_results.json", "dev_results.json", "test_results.json", _PREDICTIONS)


def remove_results(trainer: StepMixin) -> None:
    """Remove results of other weights, if there are any; Trainer would add to them."""
    if trainer.is_world_process_zero():
        for name in _FILES:
            (output_folder(trainer.args) / name).unlink(missing_ok=True)


def training_costs(trainer: StepMixin) -> dict[str, float]:
    """Return what the training has cost; memory is that of the rank that held most."""
    costs = trainer.costs.report()
    peak = max(all_gather_object(costs["peak_memory_bytes"]))
    return {**costs, "peak_memory_bytes": peak, "train_steps": trainer.state.global_step}


def dev_metrics(trainer: StepMixin) -> dict[str, float]:
    """Find the dev metrics of the weights that are saved: the best ones, or those of the end."""
    best = trainer.best_step if trainer.args.load_best_model_at_end else None
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == (best or entry["step"]):
            found = {f"dev_{k.removeprefix('eval_')}": v for k, v in entry.items() if "eval_" in k}
            found["dev_step"] = entry["step"]
    return found


def metrics_before_training(trainer: StepMixin) -> dict[str, float]:
    """Find the test metrics from before training in the log, which a resumed run has too."""
    for entry in trainer.state.log_history:
        found = {
            f"test_{name}_before": entry[f"test_before_{name}"]
            for name in ("accuracy", "loss")
            if f"test_before_{name}" in entry
        }
        if found:
            return found
    return {}


def save_predictions(trainer: AddaxTrainer | BaselineTrainer, test: ScoredSet) -> None:
    """Write what the model answered to each test row, if they have answers to choose or write."""
    assert trainer.scores is not None
    rows = list(test.predictions(trainer.scores))
    if rows and trainer.is_world_process_zero():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = output_folder(trainer.args) / _PREDICTIONS
        path.write_text("".join(lines), encoding="utf-8")
