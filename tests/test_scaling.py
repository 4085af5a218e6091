"""The scaling study without processes: timers, rings, projections, records and the runner."""

import csv
import itertools
import json
import random
import sys
import time

import psutil
import pytest

from addax_ds.errors import UserError
from addax_ds.scaling import results, runner
from addax_ds.scaling.phases import PHASES, PhaseTimer
from addax_ds.scaling.point import Point, sweep
from addax_ds.scaling.projection import LABEL, Network, Work, communication_seconds, project
from addax_ds.scaling.runner import Hosts, Job
from addax_ds.scaling.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collectives

# ---- phases --------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.mark.parametrize("seed", range(20))
def test_each_moment_belongs_to_the_innermost_phase(seed):
    chance, clock = random.Random(seed), Clock()
    timer = PhaseTimer(clock)
    expected = dict.fromkeys(PHASES, 0)

    def run(open_phase: str, depth: int) -> None:
        for _ in range(chance.randrange(4)):
            ticks = chance.randrange(10)
            clock.now += ticks
            expected[open_phase] += ticks
            if depth < 5:
                inner = chance.choice(PHASES)
                with timer.phase(inner):
                    run(inner, depth + 1)

    began = clock.now
    timer.start()
    run("other", 0)
    found = timer.stop()
    assert found == expected
    assert sum(found.values()) == clock.now - began


def test_a_phase_that_fails_ends_and_between_steps_nobody_is_charged():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("gather"):
        clock.now += 100
    timer.start()

    def fail() -> None:
        with timer.phase("forward"), timer.phase("wait"):
            clock.now += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 4
    assert {k: v for k, v in timer.stop().items() if v} == {"wait": 3, "other": 4}


def test_the_device_is_waited_for_at_each_boundary():
    """What a phase has queued is done, on the clock, before the next one begins."""
    clock = Clock()
    queued = [0]

    def synchronize() -> None:
        clock.now += queued.pop()
        queued.append(0)

    timer = PhaseTimer(clock, synchronize)
    queued[0] = 50  # by the step before
    timer.start()
    with timer.phase("backward"):
        queued[0] = 7
        with timer.phase("reduce"):
            queued[0] = 11
    queued[0] = 13
    assert {k: v for k, v in timer.stop().items() if v} == {
        "backward": 7,
        "reduce": 11,
        "other": 13,
    }


# ---- rings ---------------------------------------------------------------------------------------


def simulated_ring(kind: str, ranks: int, part: int) -> list[int]:
    """Pass parts of a tensor round until all ranks have what they need; return bytes sent."""
    sent = [0] * ranks
    partial = [{p: {rank} for p in range(ranks)} for rank in range(ranks)]  # summands held
    whole = [{rank} for rank in range(ranks)]  # finished parts held
    if kind != ALL_GATHER:
        for turn in range(ranks - 1):
            moves = [((rank - turn) % ranks, rank) for rank in range(ranks)]
            carried = [partial[rank][p] for p, rank in moves]
            for (p, rank), summands in zip(moves, carried, strict=True):
                partial[(rank + 1) % ranks][p] = partial[(rank + 1) % ranks][p] | summands
                sent[rank] += part
        everyone = set(range(ranks))
        whole = [{p for p in range(ranks) if partial[rank][p] == everyone} for rank in range(ranks)]
        assert all(len(own) == 1 for own in whole)
    if kind != REDUCE_SCATTER:
        for _ in range(ranks - 1):
            passed = [set(own) for own in whole]
            for rank in range(ranks):
                new = passed[rank] - passed[(rank + 1) % ranks]
                whole[(rank + 1) % ranks] |= new
                sent[rank] += part * len(new)
        assert all(len(own) == ranks for own in whole)
    return sent


@pytest.mark.parametrize("kind", [ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_bytes_are_those_of_a_ring(kind, ranks):
    part = 24
    collectives = Collectives(kind, ranks, 1, part * ranks)
    assert simulated_ring(kind, ranks, part) == [collectives.sent] * ranks


# ---- projection ----------------------------------------------------------------------------------

NETWORK = Network(gpus_per_node=8, intra_node=100.0, inter_node=10.0, latency_s=0.5)


def test_projection_by_hand():
    """On 4 ranks of a node: 3/4 of 400 bytes at 100 B/s and 3 hops, twice for an all-reduce."""
    gathers = Collectives(ALL_GATHER, 2, 5, 400)
    sums = Collectives(ALL_REDUCE, 2, 1, 800)
    work = Work(fixed_s=2.0, sharded_s=6.0, tokens=32, collectives=(gathers, sums))
    projected = project(work, 4, NETWORK)
    assert projected.compute_s == 2.0 + 6.0 / 4
    assert projected.communication_s == (3.0 + 5 * 3 * 0.5) + (12.0 + 6 * 0.5)
    assert projected.slowest_s == 3.5 + 25.5
    assert projected.fastest_s == 25.5
    assert projected.tokens == 128


def test_a_ring_over_nodes_has_the_pace_of_their_link():
    scattered = [Collectives(REDUCE_SCATTER, 2, 1, 160)]
    silent = Network(8, 100.0, 10.0, 0.0)
    assert communication_seconds(scattered, 8, silent) == 160 * 7 / 8 / 100
    assert communication_seconds(scattered, 16, silent) == 160 * 15 / 16 / 10
    slow_inside = Network(8, 5.0, 10.0, 0.0)
    assert communication_seconds(scattered, 16, slow_inside) == 160 * 15 / 16 / 5


def test_one_rank_is_the_measured_step_and_sends_nothing():
    work = Work(2.0, 6.0, 32, (Collectives(ALL_GATHER, 2, 5, 400),))
    assert project(work, 1, NETWORK).slowest_s == 8.0


# ---- records -------------------------------------------------------------------------------------


def outcome(seconds: list[float], ranks: int, scale: float = 1.0) -> dict:
    phases = dict(zip(PHASES, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0), strict=True))
    phases = {name: value * scale for name, value in phases.items()}
    gathers = [{"kind": ALL_GATHER, "ranks": ranks, "calls": 3, "payload": 600, "sent": 300.0}]
    return {
        "parameters": 10,
        "device": "cpu",
        "tokens": 100 * ranks,
        "seconds": seconds,
        "phase_seconds": phases,
        "watched_seconds": sum(phases.values()),
        "collectives": gathers if ranks > 1 else [],
        "peak_memory_bytes": [7, 9],
        "memory_before_model_bytes": [5, 4],
        "load_average": {"before": [1.0, 0, 0], "after": [2.0, 0, 0]},
    }


def point(ranks: int) -> Point:
    return Point("tiny", "addax", ranks, 32)


def test_projections_and_checks_say_what_they_are(tmp_path):
    """Compute comes from 1 rank, bytes from 2; the check uses the link of the point's own ranks."""
    points = [
        results.Measured(point(2), [outcome([50.0], 2, scale=0.5)], []),
        results.Measured(point(1), [outcome([190.0, 200.0, 230.0], 1)], []),
        results.Measured(point(4), [], ["took more than 3 s"]),
    ]
    links = {2: {"bandwidth": 30.0, "latency_s": 1.0, "load_average": {}}}
    results.write(tmp_path, points, links, [16], NETWORK, {})
    (projected,) = csv.DictReader((tmp_path / "projection.csv").open())
    assert projected["kind"] == LABEL
    assert (projected["compute_from_ranks"], projected["bytes_from_ranks"]) == ("1", "2")
    compute, communication = 4 + 8 + 128 + (1 + 32) / 16, 3 * 15 * 0.5 + 600 * 15 / 16 / 10
    assert float(projected["compute_seconds"]) == compute
    assert float(projected["communication_seconds"]) == communication
    assert float(projected["tokens_per_second_no_overlap"]) == 1600 / (compute + communication)
    assert float(projected["tokens_per_second_full_overlap"]) == 1600 / compute
    (check,) = csv.DictReader((tmp_path / "projection_check.csv").open())
    assert check["kind"] == LABEL
    compute, communication = 4 + 8 + 128 + (1 + 32) / 2, 3 * 1.0 + 600 / 2 / 30.0
    assert float(check["step_seconds_measured"]) == 50.0
    assert float(check["error_no_overlap"]) == (compute + communication) / 50 - 1
    assert float(check["error_full_overlap"]) == compute / 50 - 1
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert document["projection"]["kind"] == document["projection_check"]["kind"] == LABEL
    assert [row["status"] for row in document["points"]] == [
        "measured",
        "measured",
        "took more than 3 s",
    ]


def test_a_row_holds_medians_over_rounds():
    rounds = [outcome([1.0, 9.0], 2, scale=3.0), outcome([2.0, 3.0, 4.0], 2), outcome([5.0], 2, 2)]
    row = results.Measured(point(2), rounds, []).row()
    assert row["step_seconds"] == 3.5
    assert row["tokens_per_second"] == 200 / 3.5
    assert row["watched_seconds"] == sum(row[f"{phase}_seconds"] for phase in PHASES) == 2 * 255
    assert (row["sent_bytes"], row["all_gather_calls"]) == (300, 3)
    assert (row["peak_memory_bytes"], row["memory_before_model_bytes"]) == (9, 5)
    assert (row["load_average_min"], row["load_average_max"]) == (1.0, 2.0)


def test_nothing_is_projected_without_communication():
    assert results.bases([results.Measured(point(1), [outcome([1.0], 1)], [])]) == []


# ---- points --------------------------------------------------------------------------------------


def test_a_sweep_is_all_combinations_with_names_of_their_own():
    points = sweep(["tiny", "facebook/opt-125m"], ["addax", "adamw"], [1, 2], [16, 32])
    expected = itertools.product(
        ["tiny", "facebook/opt-125m"], ["addax", "adamw"], [1, 2], [16, 32]
    )
    assert {(p.model, p.method, p.ranks, p.length) for p in points} == set(expected)
    assert len({p.name for p in points}) == len(points) == 16
    assert all("/" not in p.name for p in points)


def test_built_in_shapes_have_no_dropout():
    for model in ("tiny", "opt-125m", "facebook/opt-66b"):
        assert Point(model, "addax", 1, 32).config().dropout == 0.0


@pytest.mark.parametrize(
    ("model", "method", "length", "sharding", "words"),
    [
        ("tiny", "addax", 67, "zero3", "takes 8 to 66"),
        ("tiny", "addax", 7, "zero3", "takes 8 to 66"),
        ("tiny", "adamw", 32, "fsdp2", "--sharding zero3 alone"),
        ("nowhere", "addax", 32, "zero3", "no such folder"),
    ],
)
def test_points_that_cannot_run(model, method, length, sharding, words):
    with pytest.raises(UserError, match=words):
        sweep([model], [method], [1], [length], sharding=sharding)


# ---- runner --------------------------------------------------------------------------------------

PROGRAM = """
import json, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "point.json").read_text())
with Path(job["log"]).open("a") as log:
    log.write(folder.name + "\\n")
if job["how"] == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(job["log"]).parent / "child").write_text(str(child.pid))
    time.sleep(600)
if job["how"] == "fails":
    sys.exit("no luck")
(folder / "measured.json").write_text(json.dumps({"value": job["value"]}))
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(
        runner, "_command", lambda job, hosts: [sys.executable, str(program), str(job.folder)]
    )
    log = tmp_path / "log"

    def make(**how: str) -> list[Job]:
        return [
            Job("none", 1, tmp_path / name, {"how": kind, "log": str(log), "value": 1})
            for name, kind in how.items()
        ]

    make.log = lambda: log.read_text().split()
    return make


def test_what_was_measured_is_not_run_again(jobs):
    failed = runner.run(jobs(a="works", b="fails", c="works"), Hosts(), 60)
    assert [job.folder.name for job in failed] == ["b"]
    assert jobs.log() == ["a", "b", "c"]
    assert [job.outcome["value"] for job in jobs(a="works", c="works")] == [1, 1]
    assert jobs(b="fails")[0].failure["reason"] == "exit status 1"
    assert runner.run(jobs(a="works", b="works", c="works"), Hosts(), 60) == []
    assert jobs.log() == ["a", "b", "c", "b"]
    assert jobs(b="works")[0].failure is None


def test_a_job_that_takes_too_long_is_ended_with_its_children(jobs, tmp_path):
    began = time.monotonic()
    failed = runner.run(jobs(slow="hangs", a="works"), Hosts(), 6.0)
    assert [job.folder.name for job in failed] == ["slow"]
    assert failed[0].failure["reason"] == "took more than 6 s"
    assert jobs.log() == ["slow", "a"]
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 300  # the child sleeps for 600 s


def test_a_folder_with_other_settings_is_refused_before_anything_runs(jobs):
    runner.run(jobs(a="works"), Hosts(), 60)
    changed = jobs(b="works", a="works")
    changed[1].content["value"] = 2
    with pytest.raises(UserError, match="value 1 there, 2 here"):
        runner.run(changed, Hosts(), 60)
    assert jobs.log() == ["a"]


def test_ranks_over_a_hostfile(tmp_path):
    hosts = Hosts(tmp_path / "hosts", ranks_per_node=8)
    assert hosts.launcher_flags(16)[2:] == ["--num_nodes", "2", "--num_gpus", "8"]
    assert hosts.launcher_flags(4)[2:] == ["--num_nodes", "1", "--num_gpus", "4"]
    assert hosts.launcher_flags(12)[2:] == ["--num_nodes", "2", "--num_gpus", "6"]
    with pytest.raises(UserError, match="2 nodes with different numbers"):
        hosts.launcher_flags(13)
    assert Hosts().launcher_flags(2) == ["--num_gpus", "2"]
