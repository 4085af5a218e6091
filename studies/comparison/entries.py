"""State of a study's methods, gathered from the outcomes of its jobs."""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from studies.comparison.outcome import Outcome, seconds_a_step
from studies.comparison.rows import Rows, median_length, read_rows
from studies.comparison.runner import Comparison, Job
from studies.comparison.study import Contender, Study, Trial


@dataclass(frozen=True)
class Entry:
    """State of one method on one task.

    Attributes:
        contender: the method.
        trainings: that have run: the grid's, then those of the other seeds at the chosen rate.
        chosen: the training that is best on dev, once the grid is complete.
        tests: readings of the test rows at the chosen rate, by seed.
        rows: what these answered.
        timings: short trainings with the machine to themselves; empty unless all have run.
    """

    contender: Contender
    trainings: dict[Trial, Outcome]
    chosen: Trial | None
    tests: dict[int, Outcome]
    rows: dict[int, Rows]
    timings: list[Outcome]

    @property
    def grid(self) -> dict[float, float | None]:
        """Best dev accuracy of each rate that has run; None where training diverged."""
        return {
            trial.learning_rate: None if outcome.dev_score is None else outcome.dev_score[0]
            for trial, outcome in self.trainings.items()
            if trial.seed == trial.study.seeds[0]
        }

    @property
    def at_edge(self) -> bool:
        """True if the chosen rate is the smallest or the largest of several."""
        rates = self.contender.learning_rates
        edges = min(rates), max(rates)
        return self.chosen is not None and len(rates) > 1 and self.chosen.learning_rate in edges

    @property
    def final(self) -> dict[int, Outcome]:
        """Trainings at the chosen rate that came to their end, by seed."""
        if self.chosen is None:
            return {}
        return {
            trial.seed: outcome
            for trial, outcome in self.trainings.items()
            if trial.learning_rate == self.chosen.learning_rate and outcome.exit_code == 0
        }

    @property
    def test_accuracies(self) -> dict[int, float]:
        """Accuracy on the test rows, by seed."""
        return {seed: outcome.results["test_accuracy"] for seed, outcome in self.tests.items()}

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step with the machine to itself; None if not measured."""
        return seconds_a_step(self.timings)

    @property
    def cpu_seconds(self) -> float | None:
        """What the processors spent on the steps of a training, mean over seeds."""
        seconds = [outcome.results["train_cpu_seconds"] for outcome in self.final.values()]
        return statistics.fmean(seconds) if seconds else None

    @property
    def peak_memory(self) -> float | None:
        """Most that a rank has held (`peak_memory`), in bytes, median over seeds."""
        peaks = [outcome.results["peak_memory_bytes"] for outcome in self.final.values()]
        return statistics.median(peaks) if peaks else None

    @property
    def outcomes(self) -> list[Outcome]:
        """All that is known of the method."""
        return [*self.trainings.values(), *self.tests.values(), *self.timings]

    def curve(self) -> list[tuple[int, float, float]]:
        """Return steps, and mean accuracy and loss on dev over the seeds that got there."""
        found: dict[int, list[tuple[float, float]]] = {}
        for outcome in self.final.values():
            for step, accuracy, loss in outcome.dev_curve:
                found.setdefault(step, []).append((accuracy, loss))
        curve = []
        for step, pairs in sorted(found.items()):
            accuracies, losses = zip(*pairs, strict=True)
            curve.append((step, statistics.fmean(accuracies), statistics.fmean(losses)))
        return curve


@dataclass(frozen=True)
class StudyResult:
    """State of a study.

    Attributes:
        study: the study.
        entries: of its methods.
        untrained: the reading of the test rows by the model as it is, if it has run.
        untrained_rows: what it answered.
    """

    study: Study
    entries: list[Entry]
    untrained: Outcome | None
    untrained_rows: Rows

    @property
    def most_frequent(self) -> float | None:
        """Share of the most frequent right answer of the test rows.

        None if it is not known, or if rows differ in what they choose from.
        """
        if len({tuple(row["candidates"]) for row in self.untrained_rows}) != 1:
            return None
        labels = Counter(row["label"] for row in self.untrained_rows)
        return max(labels.values()) / labels.total()

    @property
    def addax(self) -> Entry | None:
        """The method that the others are compared with, if it is here and has read test rows."""
        return next((e for e in self.entries if e.contender.name == "addax" and e.rows), None)

    @property
    def border(self) -> int | None:
        """Median length of the test rows in tokens, if it is known."""
        readings = (rows for entry in self.entries for rows in entry.rows.values())
        return median_length([self.untrained_rows, *readings])

    @property
    def untrained_accuracy(self) -> float | None:
        """Accuracy of the model as it is."""
        return None if self.untrained is None else self.untrained.results["test_accuracy"]

    @property
    def outcomes(self) -> list[Outcome]:
        """All that is known of the study."""
        start = [] if self.untrained is None else [self.untrained]
        return start + [outcome for entry in self.entries for outcome in entry.outcomes]


def gather(comparison: Comparison, study: Study) -> StudyResult:
    """Read what has run of a study."""
    start = comparison.test(Trial(study))
    return StudyResult(
        study,
        [_entry(comparison, study, contender) for contender in study.contenders],
        start.outcome,
        read_rows(start.folder) if start.outcome else [],
    )


def _entry(comparison: Comparison, study: Study, contender: Contender) -> Entry:
    trials = [trial for trial in study.grid if trial.contender == contender]
    trainings = dict(_outcomes(map(comparison.training, trials)))
    timings = [
        job
        for job in comparison.timings()
        if job.trial.study == study and job.trial.contender == contender
    ]
    timed = [outcome for _, outcome in _outcomes(timings)]
    timed = timed if len(timed) == len(timings) else []
    winner = comparison.chosen(study).get(contender.name)
    if winner is None:
        return Entry(contender, trainings, None, {}, {}, timed)
    repeated = [Trial(study, contender, winner.learning_rate, seed) for seed in study.seeds]
    trainings |= _outcomes(map(comparison.training, repeated))
    read = [job for job in map(comparison.test, repeated) if job.outcome is not None]
    tests = {trial.seed: outcome for trial, outcome in _outcomes(read)}
    rows = {job.trial.seed: read_rows(job.folder) for job in read}
    rows = {seed: of_seed for seed, of_seed in rows.items() if of_seed}
    return Entry(contender, trainings, winner, tests, rows, timed)


def _outcomes(jobs: Iterable[Job]) -> Iterator[tuple[Trial, Outcome]]:
    for job in jobs:
        outcome = job.outcome
        if outcome is not None:
            yield job.trial, outcome
