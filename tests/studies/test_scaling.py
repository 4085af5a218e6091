"""The arithmetic of the scaling study: timers, rings, projections and records."""

import csv
import json
import random

import pytest

from studies.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Collectives
from studies.scaling import results
from studies.scaling.phases import PHASES, PhaseTimer
from studies.scaling.point import Point
from studies.scaling.projection import LABEL, Network, Work, communication_seconds, project
from tests.support.scaling_records import outcome

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


def test_with_a_copy_a_node_gradients_alone_go_between_nodes():
    """Eight GPUs on two nodes: rings of four inside, of two between."""
    network = Network(4, intra_node=10.0, inter_node=2.0, latency_s=0.5)
    collectives = (
        Collectives(ALL_GATHER, 2, calls=2, payload=40),
        Collectives(REDUCE_SCATTER, 2, calls=1, payload=20),
        Collectives(ALL_REDUCE, 2, calls=1, payload=8),
    )
    work = Work(2.0, 6.0, 32.0, collectives)
    projected = project(work, 8, network, copy_a_node=True)
    inside = (2 * 3 * 0.5 + 30 / 10) + (3 * 0.5 + 15 / 10)
    between = 2 * 0.5 + 2 * 10 / 2
    over_all = 2 * 7 * 0.5 + 2 * 7 / 2
    assert projected.communication_s == inside + between + over_all
    assert projected.compute_s == 2.0 + 6.0 / 4
    assert project(work, 4, network, copy_a_node=True) == project(work, 4, network)


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
