"""Tables and figures of a comparison, from the outcomes of its runs."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from addax_ds.circumstances import distinct
from addax_ds.comparison.figures import Curve, draw_costs, draw_curves
from addax_ds.comparison.runner import Comparison, dev_score, seconds_a_step
from addax_ds.comparison.study import Contender, Study, Trial
from addax_ds.errors import UserError

_NOT_RUN = "not run"


@dataclass(frozen=True)
class Entry:
    """What is known of one method on one task.

    Attributes:
        contender: the method.
        grid: best dev accuracy of each learning rate that has run; None where training diverged.
        chosen: the learning rate that is best on dev, once all have run.
        trainings: outcomes of the trainings at that learning rate, by seed.
        tests: accuracy on the test rows, by seed.
        step_seconds: seconds of a step with the machine to itself; None if not measured.
    """

    contender: Contender
    grid: dict[float, float | None]
    chosen: float | None
    trainings: dict[int, dict[str, Any]]
    tests: dict[int, float]
    step_seconds: float | None

    @property
    def peak_memory(self) -> float | None:
        """Most that a rank has held (`peak_memory`), in bytes, median over seeds."""
        peaks = [o["results"]["peak_memory_bytes"] for o in self.trainings.values()]
        return statistics.median(peaks) if peaks else None

    def curve(self) -> list[tuple[int, float, float]]:
        """Return steps, and mean accuracy and loss on dev over the seeds that got there."""
        found: dict[int, list[tuple[float, float]]] = {}
        for outcome in self.trainings.values():
            for line in outcome["log"]:
                if "eval_accuracy" in line:
                    pair = line["eval_accuracy"], line["eval_loss"]
                    found.setdefault(line["step"], []).append(pair)
        curve = []
        for step, pairs in sorted(found.items()):
            accuracies, losses = zip(*pairs, strict=True)
            curve.append((step, statistics.fmean(accuracies), statistics.fmean(losses)))
        return curve


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.json``, ``tables.md`` and the figures of what has run.

    Raises:
        UserError: nothing has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"studies": {}}
    pages = []
    for study in comparison.studies:
        entries = [_entry(comparison, study, contender) for contender in study.contenders]
        if not any(entry.grid for entry in entries):
            continue
        untrained = comparison.test(Trial(study)).outcome
        start = None if untrained is None else untrained["results"]["test_accuracy"]
        content["studies"][study.name] = _as_json(study, entries, start)
        pages.append("\n".join(_tables(study, entries, start)))
        curves = list(_curves(entries))
        if curves:
            draw_curves(curves, folder / f"{study.name}-time.png", study.name)
            draw_costs(curves, folder / f"{study.name}-memory.png", study.name)
    if not pages:
        raise UserError(f"{comparison.folder}: no training of these studies is over")
    (folder / "comparison.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "tables.md").write_text("\n".join(pages) + "\n")


def _entry(comparison: Comparison, study: Study, contender: Contender) -> Entry:
    grid: dict[float, float | None] = {}
    for trial in study.grid:
        outcome = comparison.training(trial).outcome
        if trial.contender == contender and outcome is not None:
            accuracy = dev_score(outcome)[0] if outcome["exit_code"] == 0 else None
            grid[trial.learning_rate] = accuracy
    winner = comparison.chosen(study).get(contender.method)
    trainings, tests = {}, {}
    for seed in study.seeds if winner else ():
        assert winner is not None
        trial = Trial(study, contender, winner.learning_rate, seed)
        outcome = comparison.training(trial).outcome
        if outcome is not None and outcome["exit_code"] == 0:
            trainings[seed] = outcome
        outcome = comparison.test(trial).outcome
        if outcome is not None:
            tests[seed] = outcome["results"]["test_accuracy"]
    timed = [
        job.outcome
        for job in comparison.timings()
        if job.trial.study == study and job.trial.contender == contender
    ]
    seconds = seconds_a_step([o for o in timed if o is not None]) if all(timed) else None
    rate = winner.learning_rate if winner else None
    return Entry(contender, grid, rate, trainings, tests, seconds)


def _tables(study: Study, entries: list[Entry], untrained: float | None) -> Iterator[str]:
    """Yield the lines of two tables: the result, and the learning rates that were tried."""
    yield f"### {study.name}\n"
    yield (
        "| method | learning rate | steps | test accuracy | seeds | seconds a step | "
        "training, minutes | peak memory, GB |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    if untrained is not None:
        yield f"| as it is | | 0 | {untrained:.3f} | | | | |"
    for entry in entries:
        steps, seconds = entry.contender.steps, entry.step_seconds
        yield (
            "| "
            + " | ".join(
                (
                    entry.contender.method,
                    f"{entry.chosen:g}" if entry.chosen else "",
                    str(steps),
                    _spread(list(entry.tests.values())),
                    str(len(entry.tests)),
                    f"{seconds:.2f}" if seconds else "",
                    f"{steps * seconds / 60:.1f}" if seconds else "",
                    f"{entry.peak_memory / 1e9:.2f}" if entry.peak_memory else "",
                )
            )
            + " |"
        )
    yield "\n| method | best accuracy on dev by learning rate, seed 0 |"
    yield "|---|---|"
    for entry in entries:
        tried = (f"{rate:g}: {_grid_word(entry, rate)}" for rate in entry.contender.learning_rates)
        yield f"| {entry.contender.method} | {', '.join(tried)} |"
    yield from _equal_terms(entries)
    yield ""


def _grid_word(entry: Entry, rate: float) -> str:
    if rate not in entry.grid:
        return _NOT_RUN
    accuracy = entry.grid[rate]
    return "diverged" if accuracy is None else f"{accuracy:.3f}"


def _spread(values: list[float]) -> str:
    if not values:
        return _NOT_RUN
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _equal_terms(entries: list[Entry]) -> Iterator[str]:
    """Yield dev accuracy after as many steps, and after as long, as Addax's first evaluations."""
    addax = next((e for e in entries if e.contender.method == "addax"), None)
    if addax is None or not addax.curve() or addax.step_seconds is None:
        return
    points = addax.curve()
    heads = [f"{step} steps | {step * addax.step_seconds:.0f} s" for step, _, _ in points]
    yield "\nAccuracy on dev at the steps at which Addax was evaluated, and after as much time:\n"
    yield f"| method | {' | '.join(heads)} |"
    yield "|---" * (1 + 2 * len(points)) + "|"
    for entry in entries:
        cells = []
        for step, _, _ in points:
            cells.append(_at(entry, step))
            seconds = step * addax.step_seconds
            cells.append(_at(entry, seconds / entry.step_seconds if entry.step_seconds else 0))
        yield f"| {entry.contender.method} | {' | '.join(cells)} |"


def _at(entry: Entry, step: float) -> str:
    """Return the accuracy at the last evaluation up to a step, and the step if it is another."""
    reached = [(at, accuracy) for at, accuracy, _ in entry.curve() if at <= step + 1e-6]
    if not reached:
        return "none yet"
    at, accuracy = reached[-1]
    return f"{accuracy:.3f}" + ("" if at == step else f" (step {at})")


def _curves(entries: list[Entry]) -> Iterator[Curve]:
    for entry in entries:
        if entry.step_seconds is not None and entry.trainings:
            minutes = entry.step_seconds / 60
            points = [(step * minutes, accuracy) for step, accuracy, _ in entry.curve()]
            yield Curve(
                entry.contender.method,
                points,
                list(entry.tests.values()),
                entry.peak_memory or 0.0,
            )


def _as_json(study: Study, entries: list[Entry], untrained: float | None) -> dict[str, Any]:
    return {
        "data": study.data_flags | {"task": study.task},
        "seeds": study.seeds,
        "untrained_test_accuracy": untrained,
        "methods": {
            entry.contender.method: {
                "flags": entry.contender.flags,
                "dev_accuracy_by_learning_rate": entry.grid,
                "learning_rate": entry.chosen,
                "circumstances": distinct(o["circumstances"] for o in entry.trainings.values()),
                "test_accuracy_by_seed": entry.tests,
                "seconds_a_step": entry.step_seconds,
                "peak_memory_bytes": entry.peak_memory,
                "dev_curve": [
                    {"step": step, "accuracy": accuracy, "loss": loss}
                    for step, accuracy, loss in entry.curve()
                ],
                "costs_by_seed": {
                    seed: {
                        name: outcome["results"][name]
                        for name in ("train_steps", "train_tokens", "train_cpu_seconds")
                    }
                    for seed, outcome in entry.trainings.items()
                },
            }
            for entry in entries
        },
    }
