"""However a run with workers ends, all of its processes do."""

from pathlib import Path
from typing import Any

import pytest

from addax_ds.checkpoint.atomic import verify
from tests.data.test_loading import ends_in_time
from tests.support.launcher import Outcome, launch
from tests.support.tiny import rows, write_model, write_rows

pytestmark = pytest.mark.slow


def run(how: str, folder: Path, ranks: int, **more: Any) -> Outcome:
    values = {
        "model_name_or_path": write_model(folder / "model"),
        "train_file": write_rows(folder / "train.jsonl", rows(7, 9)),
        "output_dir": folder / "output",
        "use_cpu": True,
        "alpha": 0.01,
        "learning_rate": 1e-3,
        "length_threshold": 12,
        "per_device_train_batch_size": 2,
        "per_device_zo_batch_size": 1,
        "max_steps": 4,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "report_to": "none",
        **more,
    }
    flags = [f"--{name}={value}" for name, value in values.items()]
    script = "tests/workers/ends.py"
    return launch(script, how, str(folder), *flags, ranks=ranks, timeout=120.0, launcher="fork")


def workers(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "workers").read_text().split()]


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_a_rank_that_fails_alone_ends_all(sharding, tmp_path):
    """Without a launcher that would end the others."""
    more = {"deepspeed": "zero3"} if sharding == "zero3" else {"sharding": sharding}
    outcome = run("fail", tmp_path, 2, **more)
    assert outcome.status not in (0, None), outcome.output
    assert outcome.left_behind == 0, outcome.output
    assert "RuntimeError: this rank alone" in outcome.output
    assert "ended in order" not in outcome.output
    assert len(workers(tmp_path)) == 2
    assert ends_in_time(workers(tmp_path))


def test_a_run_whose_processes_are_all_told_to_stop_saves_and_ends(tmp_path):
    """While it evaluates, with workers of both loaders, none of which it can do without."""
    validation = write_rows(tmp_path / "validation.jsonl", rows(6, 6, seed=1))
    evaluation = {"validation_file": validation, "eval_strategy": "steps", "eval_steps": 1}
    outcome = run("terminate", tmp_path, 1, **evaluation, per_device_eval_batch_size=1)
    assert outcome.status == 0, outcome.output
    assert "Stopped by SIGTERM after step 2" in outcome.output
    assert outcome.output.count("ended in order") == 1
    assert len(workers(tmp_path)) == 4
    assert ends_in_time(workers(tmp_path))
    verify(tmp_path / "output" / "checkpoint-2")


def test_ctrl_c_saves_and_ends(tmp_path):
    """Pressed once, though two signals come: workers and the rank get both."""
    outcome = run("interrupt", tmp_path, 1)
    assert outcome.status == 130, outcome.output
    assert outcome.output.count("Ctrl-C: the run ends after this step, with a checkpoint") == 1
    assert "Stopped by Ctrl-C after step 2, with a checkpoint in" in outcome.output
    assert "Traceback" not in outcome.output
    assert len(workers(tmp_path)) == 2
    assert ends_in_time(workers(tmp_path))
    verify(tmp_path / "output" / "checkpoint-2")
    assert not (tmp_path / "output" / "model").exists()


def test_another_ctrl_c_ends_at_once(tmp_path):
    outcome = run("interrupt-twice", tmp_path, 1)
    assert outcome.status == 130, outcome.output
    assert "Traceback" not in outcome.output
    assert ends_in_time(workers(tmp_path))
    assert not (tmp_path / "output" / "checkpoint-2").exists()
