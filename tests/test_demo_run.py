"""The embedded default of the command, on a tiny model and a few rows, in one process."""

import json

import pytest

from addax_ds import demo, finetune
from addax_ds.tasks import ChoiceRow, Task
from tests.tiny import write_model


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr(demo, "model_folder", lambda: folder)

    def rows(_: Task) -> dict[str, list[ChoiceRow]]:
        return {
            split: [
                ChoiceRow(" ".join(["w3"] * (3 + i % 4)), (" w5", " w7"), i % 2, f"{split} {i}")
                for i in range(count)
            ]
            for split, count in (("train", 40), ("dev", 5), ("test", 6))
        }

    monkeypatch.setattr(Task, "rows", rows)


@pytest.mark.usefixtures("small_demo")
def test_the_preset_trains_and_reports(tmp_path, capsys):
    output = tmp_path / "output"
    finetune.main(["--output_dir", str(output), "--max_steps", "3", "--eval_steps", "2"])
    results = json.loads((output / "all_results.json").read_text())
    for key in ("test_accuracy_before", "test_accuracy", "test_loss_before", "train_runtime"):
        assert key in results
    assert 0 <= results["test_accuracy"] <= 1
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [2, 3]
    assert (output / "training.png").stat().st_size > 0
    printed = capsys.readouterr().err
    for text in ("L_T = ", "Test accuracy: ", str(output / "model"), "D0 (zeroth-order"):
        assert text in printed
