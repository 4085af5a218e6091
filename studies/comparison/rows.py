"""Test rows one by one: methods against each other on the same rows, and rows by their length."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PREDICTIONS = "predictions_test.jsonl"
_RESAMPLES = 10_000

Rows = Sequence[Mapping[str, Any]]
"""What a run has answered to the test rows, as `PREDICTIONS` has it."""


def read_rows(folder: Path) -> Rows:
    """Return the rows that a job has read, or none."""
    path = folder / PREDICTIONS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@dataclass(frozen=True)
class Paired:
    """A method against another one on the same rows.

    Attributes:
        difference: of the mean accuracies over the seeds that both have.
        interval: that holds 95 % of such differences of resampled rows and seeds.
        alone: by seed, how many rows the other one alone has right, and how many this one alone.
        p_values: by seed, of McNemar's exact test.
    """

    difference: float
    interval: tuple[float, float]
    alone: dict[int, tuple[int, int]]
    p_values: dict[int, float]


def paired(rows: Mapping[int, Rows], others: Mapping[int, Rows]) -> Paired | None:
    """Compare a method with another one; None if they have no row of a seed in common.

    Args:
        rows: of the method, by seed.
        others: of the other one.
    """
    right = {seed: _right(rows[seed]) for seed in sorted(rows.keys() & others.keys())}
    right_there = {seed: _right(others[seed]) for seed in right}
    common = set.intersection(*map(set, (*right.values(), *right_there.values()))) if right else ()
    if not common:
        return None
    origins = sorted(common)
    gains = np.array([[right[s][o] - right_there[s][o] for o in origins] for s in right])
    alone = {
        seed: (int((of_seed < 0).sum()), int((of_seed > 0).sum()))
        for seed, of_seed in zip(right, gains, strict=True)
    }
    p_values = {seed: mcnemar(*counts) for seed, counts in alone.items()}
    return Paired(float(gains.mean()), bootstrap(gains), alone, p_values)


def _right(rows: Rows) -> dict[str, int]:
    return {row["origin"]: int(row["right"]) for row in rows}


def mcnemar(one: int, other: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Rows that one of two methods alone has right are tosses of a fair coin if both are equally good.

    Args:
        one: rows that the one alone has right.
        other: rows that the other alone has right.
    """
    tosses = one + other
    tail = sum(math.comb(tosses, heads) for heads in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def bootstrap(gains: np.ndarray) -> tuple[float, float]:
    """Return the interval that holds 95 % of the means of resampled rows and seeds.

    Both are drawn with replacement. Seeds share their rows, so these are drawn for all of them.

    Args:
        gains: shape ``(seeds, rows)``.
    """
    seeds, rows = gains.shape
    generator = np.random.default_rng(0)
    of_rows = generator.multinomial(rows, np.full(rows, 1 / rows), _RESAMPLES)
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), _RESAMPLES)
    means = ((of_rows @ gains.T) * of_seeds).sum(axis=1) / gains.size
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Bucket:
    """Test rows of some lengths.

    Attributes:
        rows: how many there are.
        accuracy: mean over seeds.
        loss: per token of the right answers, mean over seeds.
    """

    rows: int
    accuracy: float
    loss: float


def median_length(readings: Iterable[Rows]) -> int | None:
    """Return the median of the rows' tokens, prompt and right answer; None if nothing has them."""
    lengths = next(([row.get("tokens") for row in rows] for rows in readings if rows), [])
    known = [length for length in lengths if length is not None]
    return statistics.median_low(known) if known else None


def by_length(readings: Sequence[Rows], border: int) -> tuple[Bucket, Bucket] | None:
    """Return the rows of up to ``border`` tokens and the longer ones; None if lengths are missing.

    Args:
        readings: of the same rows, one a seed.
        border: in tokens.
    """
    halves = []
    for is_long in (False, True):
        chosen = [
            [row for row in rows if (row["tokens"] > border) is is_long]
            for rows in readings
            if rows and all("tokens" in row for row in rows)
        ]
        if not any(chosen):
            return None
        accuracies = [statistics.fmean(row["right"] for row in rows) for rows in chosen]
        losses = list(map(_loss, chosen))
        halves.append(
            Bucket(len(chosen[0]), statistics.fmean(accuracies), statistics.fmean(losses))
        )
    short, long = halves
    return short, long


def _loss(rows: Rows) -> float:
    tokens = [row["answer_tokens"] for row in rows]
    total = sum(
        row["scores"][row["label"]] * count for row, count in zip(rows, tokens, strict=True)
    )
    return -total / sum(tokens)
