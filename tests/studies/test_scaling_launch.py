"""``launch/scaling.py`` itself: real launches, what it writes, and going on where it stopped."""

import csv
import json
from pathlib import Path

import pytest

from studies.scaling.phases import PHASES
from studies.scaling.projection import LABEL
from tests.support.launcher import Outcome, finish, start
from tests.support.ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.launcher]

FLAGS = (
    *("--models", "tiny", "--methods", "mezo", "--ranks", "2", "--lengths", "16"),
    *("--per_device_zo_batch_size", "1", "--time_limit", "120", "--project", "8", "64"),
)
TWICE_RUNS_IN_S = 280.0


def study(folder: Path, *flags: str) -> Outcome:
    command = ["python", "launch/scaling.py", *FLAGS, "--folder", str(folder), *flags]
    return finish(start(command, free_port()), TWICE_RUNS_IN_S)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    outcome = study(folder, "--steps", "1")
    assert outcome.status == 0, outcome.output
    assert outcome.left_behind == 0
    assert "2 of 2" in outcome.output
    return folder


def test_the_files(folder):
    (row,) = rows(folder / "scaling.csv")
    assert (row["status"], row["model"], row["method"], row["ranks"]) == (
        *("measured", "tiny", "mezo"),
        "2",
    )
    assert float(row["tokens_per_second"]) == 2 * 16 / float(row["step_seconds"])
    phases = sum(float(row[f"{phase}_seconds"]) for phase in PHASES)
    assert phases == pytest.approx(float(row["watched_seconds"]))
    assert float(row["sent_bytes"]) > 2 * int(row["parameters"])  # 2 bytes, 2 passes, 1 of 2 parts
    assert int(row["peak_memory_bytes"]) > int(row["memory_before_model_bytes"]) > 0
    projected = rows(folder / "projection.csv")
    assert [(p["ranks"], p["kind"]) for p in projected] == [("8", LABEL), ("64", LABEL)]
    assert rows(folder / "projection_check.csv") == []  # 2 ranks are the basis themselves
    document = json.loads((folder / "scaling.json").read_text())
    assert document["links"]["2"]["bandwidth"] > 0
    (circumstances,) = document["circumstances"]
    assert set(circumstances["versions"]) >= {"addax_ds", "torch", "deepspeed"}
    assert document["projection"]["kind"] == LABEL
    assert str(folder) not in json.dumps(document["configuration"])
    for name in ("scaling.png", "projection.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_starts_nothing(folder):
    outcomes = {path: path.stat().st_mtime_ns for path in folder.rglob("outcome.json")}
    assert len(outcomes) == 2
    (folder / "scaling.csv").unlink()
    outcome = study(folder, "--steps", "1")
    assert (outcome.status, " of " in outcome.output) == (0, False), outcome.output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("outcome.json")} == outcomes
    assert len(rows(folder / "scaling.csv")) == 1


def test_other_settings_need_another_folder(folder):
    outcome = study(folder, "--steps", "2")
    assert outcome.status == 1
    assert "steps 1 there, 2 here" in outcome.output
    assert "Traceback" not in outcome.output


def test_a_mistake_is_a_sentence(tmp_path):
    outcome = study(tmp_path, "--steps", "0")
    assert outcome.status == 1
    assert "--steps 0: it must be above 0." in outcome.output
    assert "Traceback" not in outcome.output
