"""The tables of a study, and sentences that follow from them."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from studies.comparison.entries import Entry, StudyResult
from studies.comparison.outcome import Outcome
from studies.comparison.rows import Paired, by_length

_NOT_RUN = "not run"


def page(result: StudyResult, addax: Entry | None, against: Mapping[str, Paired]) -> Iterator[str]:
    """Yield the lines of a study's tables, each with what its runs were made with.

    Args:
        result: of the study.
        addax: with which its methods are compared; of this or of another study on the same data.
        against: its methods, by name, compared with Addax on the test rows.
    """
    yield f"### {result.study.name}\n"
    yield from _results(result)
    yield from _made_with(result.outcomes)
    yield from _progress(result.entries)
    yield from _above_addax(result)
    yield from _against(result.entries, addax, against)
    yield from _lengths(result)
    yield from _grids(result.entries)
    yield from _equal_terms(result.entries)
    yield ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _results(result: StudyResult) -> Iterator[str]:
    yield _row(
        *("method", "learning rate", "steps", "test accuracy", "seeds"),
        *("seconds a step", "training, minutes", "CPU minutes", "peak memory, GB"),
    )
    yield "|---" * 9 + "|"
    for name, accuracy in _without_training(result):
        yield _row(name, "", "0", f"{accuracy:.3f}", *[""] * 5)
    for entry in result.entries:
        steps, seconds, cpu = entry.contender.steps, entry.step_seconds, entry.cpu_seconds
        peak = entry.peak_memory
        yield _row(
            entry.contender.name,
            _rate(entry),
            str(steps),
            _spread(list(entry.test_accuracies.values())),
            str(len(entry.tests)),
            f"{seconds:.1f}" if seconds else "",
            f"{steps * seconds / 60:.1f}" if seconds else "",
            f"{cpu / 60:.1f}" if cpu else "",
            f"{peak / 1e9:.2f}" if peak else "",
        )


def _without_training(result: StudyResult) -> Iterator[tuple[str, float]]:
    """Yield what accuracies are to be compared with besides those of methods."""
    if result.most_frequent is not None:
        yield "most frequent answer", result.most_frequent
    if result.untrained_accuracy is not None:
        yield "as it is", result.untrained_accuracy


def _rate(entry: Entry) -> str:
    if entry.chosen is None:
        return ""
    return f"{entry.chosen.learning_rate:g}" + (", at the edge of the grid" * entry.at_edge)


def _spread(values: list[float]) -> str:
    if not values:
        return _NOT_RUN
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _made_with(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """Yield a line with the commits, versions and machines of some runs."""
    records = [outcome.circumstances for outcome in outcomes]
    versions: dict[str, list[str]] = {}
    for record in records:
        for name, version in record.get("versions", {}).items():
            versions.setdefault(name, []).append(version)
    parts = [f"commit {_alternatives(map(_commit, records))}"]
    parts += [f"{name} {_alternatives(found)}" for name, found in versions.items()]
    parts.append(_alternatives(f"{r.get('processor')}, {r.get('cores')} cores" for r in records))
    yield f"\nMade with {'; '.join(parts)}."


def _commit(record: dict[str, Any]) -> str:
    commit = record.get("commit")
    if commit is None:
        return "unknown"
    return str(commit)[:12] + (" with changes" if record.get("uncommitted_changes") else "")


def _alternatives(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


def _progress(entries: list[Entry]) -> Iterator[str]:
    """Yield for each method how far it got: an unfinished run is not a beaten one."""
    lines = []
    for entry in entries:
        curve = entry.curve()
        if not curve:
            continue
        # The first of equal ones: accuracy that stays as it was does not rise.
        best, accuracy, _ = max(curve, key=lambda point: point[1])
        last = curve[-1][0]
        rising = best == last and len(curve) > 1
        what = "still rising at the end" if rising else f"best at step {best}"
        lines.append(f"- {entry.contender.name}: {last} steps, dev accuracy {what}")
        lines[-1] += f" ({accuracy:.3f})"
        lost = [str(t.seed) for t, o in entry.trainings.items() if _lost(entry, t.learning_rate, o)]
        if lost:
            lines[-1] += f"; diverged with seed {', '.join(lost)}"
    if lines:
        yield "\nHow far each method got, at its chosen learning rate (mean over seeds):\n"
        yield from lines


def _lost(entry: Entry, rate: float, outcome: Outcome) -> bool:
    assert entry.chosen is not None
    return rate == entry.chosen.learning_rate and outcome.dev_score is None


def _above_addax(result: StudyResult) -> Iterator[str]:
    """Yield where Addax loses on the test rows."""
    means: dict[str, float] = {
        entry.contender.name: statistics.fmean(entry.test_accuracies.values())
        for entry in result.entries
        if entry.tests
    }
    if "addax" not in means:
        return
    addax = means.pop("addax")
    others = {**dict(_without_training(result)), **means}
    above = [
        f"{name} by {accuracy - addax:.3f}" for name, accuracy in others.items() if accuracy > addax
    ]
    found = ", ".join(above) if above else "none"
    yield f"\nAbove addax on the test rows, of {', '.join(others)}: {found}."


def _against(
    entries: list[Entry], addax: Entry | None, against: Mapping[str, Paired]
) -> Iterator[str]:
    """Yield the methods against Addax, on the same rows and seeds."""
    lines = []
    for name, found in against.items():
        low, high = found.interval
        alone = ", ".join(f"{it} to {others}" for others, it in found.alone.values())
        p_values = ", ".join(f"{p:.2g}" for p in found.p_values.values())
        interval = f"{found.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(_row(name, interval, alone, p_values))
    if lines:
        yield "\nTest rows paired with those of addax, by seed (p is McNemar's, exact; the interval"
        yield "holds 95 % of the differences of resampled rows and seeds):\n"
        yield _row("method", "accuracy less addax's", "rows right alone, to addax's", "p")
        yield "|---" * 4 + "|"
        yield from lines
        yield from _made_with(
            o for entry in (addax, *entries) if entry for o in entry.tests.values()
        )


def _lengths(result: StudyResult) -> Iterator[str]:
    """Yield accuracy and loss of the shorter and of the longer half of the test rows."""
    border = result.border
    if border is None:
        return
    readings = [("as it is", [result.untrained_rows])]
    readings += [(entry.contender.name, list(entry.rows.values())) for entry in result.entries]
    yield f"\nTest rows of up to {border} tokens (the median) and longer ones, mean over seeds:\n"
    yield f"| method | accuracy, up to {border} | above | loss, up to {border} | above |"
    yield "|---" * 5 + "|"
    for name, rows in readings:
        if found := by_length(rows, border):
            short, long = found
            values = (short.accuracy, long.accuracy, short.loss, long.loss)
            yield _row(name, *(f"{value:.3f}" for value in values))
    yield from _made_with(outcome for entry in result.entries for outcome in entry.tests.values())


def _grids(entries: list[Entry]) -> Iterator[str]:
    yield "\n| method | best accuracy on dev by learning rate, first seed |"
    yield "|---|---|"
    for entry in entries:
        rates = entry.contender.learning_rates
        tried = ", ".join(f"{rate:g}: {_grid_word(entry, rate)}" for rate in rates)
        yield _row(entry.contender.name, tried)
    yield from _made_with(o for entry in entries for o in entry.trainings.values())


def _grid_word(entry: Entry, rate: float) -> str:
    if rate not in entry.grid:
        return _NOT_RUN
    accuracy = entry.grid[rate]
    return "diverged" if accuracy is None else f"{accuracy:.3f}"


def _equal_terms(entries: list[Entry]) -> Iterator[str]:
    """Yield dev accuracy after as many steps, and after as long, as Addax's evaluations."""
    addax = next((e for e in entries if e.contender.name == "addax"), None)
    if addax is None or addax.step_seconds is None or not addax.curve():
        return
    points = [(step, step * addax.step_seconds) for step, _, _ in addax.curve()]
    heads = [f"{step} steps | {seconds:.0f} s" for step, seconds in points]
    yield "\nAccuracy on dev at the steps at which Addax was evaluated, and after as much time:\n"
    yield _row("method", *heads)
    yield "|---" * (1 + 2 * len(points)) + "|"
    for entry in entries:
        cells = []
        for step, seconds in points:
            cells.append(_at(entry, step))
            cells.append(_at(entry, seconds / entry.step_seconds if entry.step_seconds else None))
        yield _row(entry.contender.name, *cells)
    used = [[*entry.final.values(), *entry.timings] for entry in entries]
    yield from _made_with(outcome for outcomes in used for outcome in outcomes)


def _at(entry: Entry, step: float | None) -> str:
    """Return the accuracy at the last evaluation up to a step, or at the first one after it."""
    curve = entry.curve()
    if step is None or not curve:
        return _NOT_RUN
    reached = [(at, accuracy) for at, accuracy, _ in curve if at <= step + 1e-6]
    if not reached:
        at, accuracy, _ = curve[0]
        return f"{accuracy:.3f} (first at step {at})"
    at, accuracy = reached[-1]
    return f"{accuracy:.3f}" + ("" if at >= step - 1e-6 else f" (step {at})")
