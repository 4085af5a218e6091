"""The embedded default of the command, on a tiny model and a few rows, in one process."""

import dataclasses
import json

import pytest

from addax_ds.cli import train
from addax_ds.models import demo
from addax_ds.tasks import TASKS, Sizes, SourceRow
from tests.support.tiny import write_model


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    folder = write_model(tmp_path / "model")
    monkeypatch.setattr(demo, "model_folder", lambda: folder)

    def source() -> dict[str, list[SourceRow]]:
        sentences = [" ".join(["w3"] * (3 + i % 4)) for i in range(51)]
        return {
            "validation": [
                SourceRow(f"row {i}", {"sentence": sentence, "label": i % 2})
                for i, sentence in enumerate(sentences)
            ]
        }

    small = dataclasses.replace(
        TASKS["sst2-demo"],
        source=source,
        sizes=Sizes(40, 5, 6),
        candidates=lambda columns: (" w5", " w7"),
    )
    monkeypatch.setitem(TASKS, "sst2-demo", small)


@pytest.mark.usefixtures("small_demo")
def test_the_preset_trains_and_reports(tmp_path, capsys):
    output = tmp_path / "output"
    train.main(["--output_dir", str(output), "--max_steps", "3", "--eval_steps", "2"])
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
