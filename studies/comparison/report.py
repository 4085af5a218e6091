"""Tables, figures and a JSON file of a comparison, from the outcomes of its runs."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from addax_ds.utils.errors import UserError
from studies.comparison.entries import Entry, StudyResult, gather
from studies.comparison.figures import Curve, draw_costs, draw_curves
from studies.comparison.outcome import Outcome
from studies.comparison.rows import Paired, Rows, by_length, paired
from studies.comparison.runner import Comparison
from studies.comparison.study import Trial
from studies.comparison.tables import page
from studies.provenance import distinct

_COSTS = (
    "train_steps",
    "train_tokens",
    "train_seconds",
    "train_cpu_seconds",
    "peak_memory_bytes",
)


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json``, ``tables.md`` and the figures of what has run.

    Raises:
        UserError: nothing has.
    """
    content: dict[str, Any] = {"studies": {}}
    pages = []
    drawn: dict[str, list[StudyResult]] = {}
    names = {study.name for study in comparison.studies}
    # Those with figures of their own come first in them.
    studies = sorted(comparison.studies, key=lambda study: study.beside is not None)
    results = [gather(comparison, study) for study in studies]
    for result in results:
        if not any(entry.trainings for entry in result.entries):
            continue
        study, addax = result.study, _addax(result, results)
        against = _against(result, addax)
        content["studies"][study.name] = _as_json(result, against)
        pages.append("\n".join(page(result, addax, against)))
        figure = study.beside if study.beside in names else study.name
        drawn.setdefault(figure, []).append(result)
    if not pages:
        raise UserError(f"{comparison.folder}: no training of these studies is over")
    folder.mkdir(parents=True, exist_ok=True)
    for name, shown in drawn.items():
        curves = [curve for result in shown for curve in _curves(result.entries)]
        if curves:
            draw_curves(curves, folder / f"{name}-time.png", name)
            draw_costs(curves, folder / f"{name}-memory.png", name, shown[0].most_frequent)
    # NaN is no JSON: a number that may be NaN has to be left out before this.
    written = json.dumps(content, indent=1, allow_nan=False)
    (folder / "comparison.json").write_text(written + "\n")
    (folder / "tables.md").write_text("\n".join(pages) + "\n")


def _addax(result: StudyResult, results: list[StudyResult]) -> Entry | None:
    """Return Addax of a study, or of another one on the same rows."""
    same = (other for other in results if other.study.data_flags == result.study.data_flags)
    return next((found.addax for found in (result, *same) if found.addax), None)


def _against(result: StudyResult, addax: Entry | None) -> dict[str, Paired]:
    """Compare the other methods of a study with Addax on the test rows, by name."""
    if addax is None:
        return {}
    others = (entry for entry in result.entries if entry is not addax)
    found = {entry.contender.name: paired(entry.rows, addax.rows) for entry in others}
    return {name: pair for name, pair in found.items() if pair is not None}


def _curves(entries: list[Entry]) -> Iterator[Curve]:
    for entry in entries:
        if entry.step_seconds is not None and entry.curve():
            minutes = entry.step_seconds / 60
            points = [(step * minutes, accuracy) for step, accuracy, _ in entry.curve()]
            yield Curve(
                entry.contender.method,
                entry.contender.name,
                entry.contender.steps,
                points,
                list(entry.test_accuracies.values()),
                entry.peak_memory or 0.0,
            )


def _as_json(result: StudyResult, against: dict[str, Paired]) -> dict[str, Any]:
    study = result.study
    return {
        "data": study.data_flags | {"task": study.task},
        "seeds": study.seeds,
        "most_frequent_answer_share": result.most_frequent,
        "untrained_test_accuracy": result.untrained_accuracy,
        "untrained_circumstances": result.untrained.circumstances if result.untrained else None,
        "median_test_row_tokens": result.border,
        "untrained_by_length": _halves([result.untrained_rows], result.border),
        "methods": {
            entry.contender.name: {
                **_entry_as_json(entry),
                "test_rows_by_length": _halves(list(entry.rows.values()), result.border),
                "against_addax": _attributes(against.get(entry.contender.name)),
            }
            for entry in result.entries
        },
    }


def _halves(readings: list[Rows], border: int | None) -> list[dict[str, Any]] | None:
    found = None if border is None else by_length(readings, border)
    return None if found is None else [asdict(half) for half in found]


def _attributes(found: Paired | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _entry_as_json(entry: Entry) -> dict[str, Any]:
    return {
        "flags": entry.contender.flags,
        "dev_accuracy_by_learning_rate": entry.grid,
        "learning_rate": entry.chosen.learning_rate if entry.chosen else None,
        "at_the_edge_of_the_grid": entry.at_edge,
        "test_accuracy_by_seed": entry.test_accuracies,
        "seconds_a_step": entry.step_seconds,
        "peak_memory_bytes": entry.peak_memory,
        "dev_curve": _points(entry.curve()),
        "trainings": [_training(trial, outcome) for trial, outcome in entry.trainings.items()],
        "circumstances": {
            "trainings": distinct(o.circumstances for o in entry.trainings.values()),
            "tests": distinct(o.circumstances for o in entry.tests.values()),
            "timings": distinct(o.circumstances for o in entry.timings),
        },
    }


def _training(trial: Trial, outcome: Outcome) -> dict[str, Any]:
    """Return one training with its costs; one that diverged has none."""
    costs = {name: outcome.results[name] for name in _COSTS if name in outcome.results}
    return {
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "diverged": outcome.dev_score is None,
        "command": _command(trial, outcome),
        **costs,
        "dev_curve": _points(outcome.dev_curve),
    }


def _points(curve: list[tuple[int, float, float]]) -> list[dict[str, float]]:
    return [{"step": step, "accuracy": accuracy, "loss": loss} for step, accuracy, loss in curve]


def _command(trial: Trial, outcome: Outcome) -> str:
    """Return the command with folders as seen from that of the comparison."""
    flags = {**outcome.flags, "output_dir": trial.name}
    given = " ".join(f"--{name}={value}" for name, value in flags.items())
    assert trial.contender is not None
    return f"deepspeed --num_gpus 1 {trial.contender.program} {given}"
