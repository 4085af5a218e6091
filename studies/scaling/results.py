"""Puts measured points together, projects from them, and writes CSV and JSON."""

import csv
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.collectives import KINDS, Collectives
from studies.scaling import phases
from studies.scaling.point import Point
from studies.scaling.projection import LABEL, Network, Projection, Work, project

Row = dict[str, Any]

_OF_LINKS = ("bandwidth", "latency_s", "load_average")
_FIXED = (phases.FORWARD, phases.BACKWARD, phases.OTHER)
_SHARDED = (phases.PERTURB, phases.UPDATE)


@dataclass(frozen=True)
class Measured:
    """A point and what its launches came to, one a round.

    Attributes:
        point: what was measured.
        outcomes: of the rounds that succeeded.
        failures: reasons of those that did not.
    """

    point: Point
    outcomes: list[dict[str, Any]]
    failures: list[str]

    @property
    def seconds(self) -> float:
        """Median of all steps without instruments."""
        return statistics.median(s for outcome in self.outcomes for s in outcome["seconds"])

    @property
    def tokens(self) -> int:
        """Tokens of a step, all ranks together."""
        return self.outcomes[0]["tokens"]

    @property
    def _watched(self) -> dict[str, Any]:
        """The round whose watched step is the median one."""
        order = sorted(self.outcomes, key=lambda outcome: outcome["watched_seconds"])
        return order[(len(order) - 1) // 2]

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds by phase of one watched step."""
        return self._watched["phase_seconds"]

    @property
    def collectives(self) -> tuple[Collectives, ...]:
        """Collectives of one step."""
        return tuple(
            Collectives(c["kind"], c["ranks"], c["calls"], c["payload"])
            for c in self._watched["collectives"]
        )

    def row(self) -> Row:
        """Return everything as one flat row; of a point that failed, what it is and why."""
        point = self.point
        about: Row = {**point.as_json(), "first_order_length": point.first_order_length}
        if not self.outcomes:
            return {**about, "status": "; ".join(self.failures)}
        steps = [s for outcome in self.outcomes for s in outcome["seconds"]]
        low, high = _quartiles(steps)
        loads = [load for o in self.outcomes for load in _loads(o)]
        return {
            **about,
            "status": "measured",
            "parameters": self.outcomes[0]["parameters"],
            "device": self.outcomes[0]["device"],
            "rounds": len(self.outcomes),
            "steps": len(steps),
            "tokens": self.tokens,
            "step_seconds": self.seconds,
            "step_seconds_q1": low,
            "step_seconds_q3": high,
            "tokens_per_second": self.tokens / self.seconds,
            "watched_seconds": self._watched["watched_seconds"],
            **{f"{name}_seconds": self.phase_seconds[name] for name in phases.PHASES},
            **self._traffic(),
            "peak_memory_bytes": max(max(o["peak_memory_bytes"]) for o in self.outcomes),
            "memory_before_model_bytes": max(
                max(o["memory_before_model_bytes"]) for o in self.outcomes
            ),
            "load_average_min": min(loads),
            "load_average_max": max(loads),
        }

    def _traffic(self) -> Row:
        row: Row = {"sent_bytes": sum(c.sent for c in self.collectives)}
        for kind in KINDS:
            same = [c for c in self.collectives if c.kind == kind]
            row[f"{kind}_calls"] = sum(c.calls for c in same)
            row[f"{kind}_payload_bytes"] = sum(c.payload for c in same)
        return row


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _loads(outcome: dict[str, Any]) -> tuple[float, float]:
    """Return the averages over a minute, before and after."""
    load = outcome["load_average"]
    return load["before"][0], load["after"][0]


# ---- projection --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """Measured points that a workload is projected from.

    Attributes:
        measured: on the fewest ranks.
        counted: on the fewest ranks of those that communicate.
    """

    measured: Measured
    counted: Measured

    @property
    def work(self) -> Work:
        """Return it for `project`."""
        ranks, seconds = self.measured.point.ranks, self.measured.phase_seconds
        return Work(
            fixed_s=sum(seconds[name] for name in _FIXED),
            sharded_s=sum(seconds[name] for name in _SHARDED) * ranks,
            tokens=self.measured.tokens / ranks,
            collectives=self.counted.collectives,
        )


def bases(points: Iterable[Measured]) -> list[Basis]:
    """Return what each workload can be projected from: it needs a point that communicates."""
    by_workload: dict[str, list[Measured]] = {}
    for measured in points:
        if measured.outcomes:
            by_workload.setdefault(measured.point.workload, []).append(measured)
    found = []
    for same in by_workload.values():
        same.sort(key=lambda measured: measured.point.ranks)
        counted = next((m for m in same if m.point.ranks > 1), None)
        if counted is not None:
            found.append(Basis(same[0], counted))
    return found


def projections(found: Iterable[Basis], numbers: Iterable[int], network: Network) -> list[Row]:
    """Return a row for each workload and number of GPUs.

    Of FSDP2 with a copy of the weights on each node, too.
    """
    sizes = list(numbers)
    rows = []
    for basis in found:
        for ranks in sizes:
            projected = project(basis.work, ranks, network)
            row = {
                **_about(basis),
                **_predicted(projected),
                "tokens_per_second_no_overlap": projected.tokens / projected.slowest_s,
                "tokens_per_second_full_overlap": projected.tokens / projected.fastest_s,
            }
            if basis.measured.point.sharding == "fsdp2":
                copies = project(basis.work, ranks, network, copy_a_node=True)
                row |= {f"{name}_copy_a_node": value for name, value in _seconds(copies).items()}
            rows.append(row)
    return rows


def checks(
    found: Iterable[Basis], points: Iterable[Measured], links: dict[int, dict[str, Any]]
) -> list[Row]:
    """Return predicted beside measured, for points on more ranks than their workload's basis.

    Args:
        found: see `bases`.
        points: all that were measured.
        links: of numbers of ranks, what `link` measured.
    """
    larger = [m for m in points if m.outcomes and m.point.ranks in links]
    rows = []
    for basis in found:
        for measured in larger:
            point, base = measured.point, basis.measured.point
            if point.workload != base.workload or point.ranks <= base.ranks:
                continue
            link = links[point.ranks]
            bandwidth = link["bandwidth"]
            network = Network(point.ranks, bandwidth, bandwidth, link["latency_s"])
            projected = project(basis.work, point.ranks, network)
            rows.append(
                {
                    **_about(basis),
                    **_predicted(projected),
                    "step_seconds_measured": measured.seconds,
                    "error_no_overlap": projected.slowest_s / measured.seconds - 1,
                    "error_full_overlap": projected.fastest_s / measured.seconds - 1,
                }
            )
    return rows


def _about(basis: Basis) -> Row:
    point = basis.measured.point
    return {
        "kind": LABEL,
        "model": point.model,
        "method": point.method,
        "length": point.length,
        "compute_measured_on": basis.measured.outcomes[0]["device"],
        "compute_from_ranks": point.ranks,
        "bytes_from_ranks": basis.counted.point.ranks,
    }


def _predicted(projected: Projection) -> Row:
    return {
        "ranks": projected.ranks,
        **_seconds(projected),
    }


def _seconds(projected: Projection) -> Row:
    return {
        "compute_seconds": projected.compute_s,
        "communication_seconds": projected.communication_s,
        "step_seconds_no_overlap": projected.slowest_s,
        "step_seconds_full_overlap": projected.fastest_s,
    }


# ---- files -------------------------------------------------------------------------------------


def write(
    folder: Path,
    points: Sequence[Measured],
    links: dict[int, dict[str, Any]],
    numbers: Sequence[int],
    network: Network,
    about: Row,
) -> tuple[list[Row], list[Row]]:
    """Write ``scaling.csv``, ``projection.csv``, ``projection_check.csv`` and ``scaling.json``.

    Args:
        folder: for the files; made if need be.
        points: those that were tried, failed ones too.
        links: see `checks`.
        numbers: of GPUs to project to.
        network: to project with.
        about: what else the JSON is to say.

    Returns:
        The rows of points and of projections.
    """
    rows = [measured.row() for measured in points]
    found = bases(points)
    projected = projections(found, numbers, network)
    checked = checks(found, points, links)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "scaling.csv", rows)
    _write_csv(folder / "projection.csv", projected)
    _write_csv(folder / "projection_check.csv", checked)
    document = {
        **about,
        "points": rows,
        "links": {n: {name: link[name] for name in _OF_LINKS} for n, link in links.items()},
        "projection": {"kind": LABEL, "network": asdict(network), "rows": projected},
        "projection_check": {"kind": LABEL, "rows": checked},
    }
    (folder / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    return rows, projected


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
