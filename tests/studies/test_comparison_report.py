"""The report of a comparison: its tables, what follows from them, its JSON and its figures."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from addax_ds.utils.errors import UserError
from studies.comparison.figures import Curve, draw_costs, draw_curves
from studies.comparison.outcome import Outcome, seconds_a_step
from studies.comparison.report import write_report
from studies.comparison.rows import bootstrap, mcnemar
from studies.comparison.runner import Comparison
from studies.comparison.study import Study, Trial
from tests.studies.test_comparison import (
    ADDAX,
    MADE_WITH,
    MEZO,
    STUDY,
    comparison,
    evaluated,
    finish,
    outcome_of,
)


def test_seconds_a_step():
    logs = [[5.0, 10.0, 12.0, 14.0], [9.0, 30.0, 34.0, 38.0]]  # after two that warm up
    outcomes = [
        Outcome(**outcome_of(0, [{"loss": 1.0, "train_seconds": s} for s in log])) for log in logs
    ]
    diverged = Outcome(**outcome_of(1, []))
    assert seconds_a_step([*outcomes, diverged]) == 3.0
    assert seconds_a_step([diverged]) is None


LABELS = [0, 1, 1, 0, 1]
COSTS = {
    **{"train_steps": 4, "train_tokens": 9, "train_seconds": 7.5, "train_cpu_seconds": 90.0},
    "peak_memory_bytes": 2.5e9,
}


@pytest.fixture
def compared(tmp_path) -> Comparison:
    """A comparison of which everything has run."""
    compared = comparison(tmp_path)
    untrained = compared.test(Trial(STUDY))
    finish(untrained, results={"test_accuracy": 0.5})
    rows = [{"candidates": [" terrible", " great"], "label": label} for label in LABELS]
    (untrained.folder / "predictions_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for trial, accuracy in zip(STUDY.grid, (0.7, 0.81, 0.8), strict=True):
        assert trial.contender is not None
        half = trial.contender.steps // 2
        log = [evaluated(accuracy - 0.1, half), evaluated(accuracy, 2 * half)]
        for seed in STUDY.seeds:
            repeated = Trial(STUDY, trial.contender, trial.learning_rate, seed)
            finish(compared.training(repeated), log=log, results=COSTS)
            finish(compared.test(repeated), results={"test_accuracy": accuracy + seed / 100})
    for job in compared.timings():
        assert job.trial.contender is not None
        slower = 1.0 if job.trial.contender.method == "addax" else 2.0
        finish(job, log=[{"loss": 1.0, "train_seconds": slower * step} for step in range(6)])
    return compared


def report(compared: Comparison) -> tuple[str, dict[str, Any]]:
    folder = compared.folder / "report"
    write_report(compared, folder)

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (folder / "comparison.json").read_text()
    return (folder / "tables.md").read_text(), json.loads(text, parse_constant=no_number)


def test_tables(compared):
    tables, _ = report(compared)
    assert "| most frequent answer |  | 0 | 0.600 |" in tables
    assert "| as it is |  | 0 | 0.500 |" in tables
    row = "| addax | 0.002, at the edge of the grid | 4 | 0.805 (0.800 to 0.810) | 2 | 1.0 | 0.1 |"
    assert f"{row} 1.5 | 2.50 |" in tables
    assert "| mezo | 1e-06 | 8 | 0.815 (0.810 to 0.820) | 2 | 2.0 | 0.3 | 1.5 | 2.50 |" in tables
    assert "| addax | 0.001: 0.700, 0.002: 0.800 |" in tables
    # After 4 steps of Addax mezo has had the time for 2, and was first evaluated after 4.
    assert "| addax | 0.700 | 0.700 | 0.800 | 0.800 |" in tables
    first = "0.710 (first at step 4)"
    assert f"| mezo | {first} | {first} | 0.710 | {first} |" in tables
    made_with = "Made with commit 0123456789ab; torch 2.0; abacus, 2 cores."
    assert tables.count(made_with) == tables.count("\n|---") == 3


def test_a_rate_inside_the_grid_is_not_at_its_edge(compared, monkeypatch):
    wider = replace(ADDAX, learning_rates=(1e-3, 2e-3, 4e-3))
    study = replace(STUDY, contenders=(wider, MEZO))
    compared.studies[:] = [study]
    finish(compared.training(Trial(study, wider, 4e-3)), log=[evaluated(0.75)], results=COSTS)
    tables, content = report(compared)
    assert "| addax | 0.002 | 4 |" in tables
    assert not content["studies"]["tiny"]["methods"]["addax"]["at_the_edge_of_the_grid"]


def test_the_report_says_how_far_each_got_and_where_addax_loses(compared):
    tables, _ = report(compared)
    assert "- mezo: 8 steps, dev accuracy still rising at the end (0.810)\n" in tables
    others = "most frequent answer, as it is, mezo"
    assert f"Above addax on the test rows, of {others}: mezo by 0.010." in tables
    mezo = next(trial for trial in STUDY.grid if trial.contender == MEZO)
    falling = [evaluated(0.9, 4), evaluated(0.7, 8)]
    finish(compared.training(mezo), log=falling, results=COSTS)
    other_seed = replace(mezo, seed=1)
    finish(compared.training(other_seed), log=[], exit_code=1)
    for seed in STUDY.seeds:
        finish(compared.test(replace(mezo, seed=seed)), results={"test_accuracy": 0.6})
    tables, _ = report(compared)
    assert "- mezo: 8 steps, dev accuracy best at step 4 (0.900); diverged with seed 1\n" in tables
    assert f"of {others}: none." in tables


def test_comparison_json(compared):
    _, content = report(compared)
    study = content["studies"]["tiny"]
    assert study["most_frequent_answer_share"] == 0.6
    assert study["untrained_circumstances"] == MADE_WITH
    addax = study["methods"]["addax"]
    assert addax["test_accuracy_by_seed"] == {"0": 0.8, "1": 0.81}
    assert addax["circumstances"] == {
        kind: [MADE_WITH] for kind in ("trainings", "tests", "timings")
    }
    trained = [(one["learning_rate"], one["seed"]) for one in addax["trainings"]]
    assert trained == [(1e-3, 0), (2e-3, 0), (2e-3, 1)]
    for one in addax["trainings"]:
        assert {name: one[name] for name in COSTS} == COSTS
        assert [point["step"] for point in one["dev_curve"]] == [2, 4]
        assert one["command"].startswith("deepspeed --num_gpus 1 launch/train.py --bf16=True ")
        assert f" --learning_rate={one['learning_rate']:g} " in one["command"]
        assert str(compared.folder) not in one["command"]


def test_the_command_of_a_training_names_its_program(tmp_path):
    peer = replace(ADDAX, learning_rates=(1e-3,), program="studies/comparison/peers.py")
    compared = comparison(tmp_path)
    compared.studies[:] = [replace(STUDY, contenders=(peer,))]
    finish(compared.training(compared.studies[0].grid[0]), log=[evaluated(0.7)], results=COSTS)
    _, content = report(compared)
    (trained,) = content["studies"]["tiny"]["methods"]["addax"]["trainings"]
    assert trained["command"].startswith("deepspeed --num_gpus 1 studies/comparison/peers.py ")


def read(job: Any, rights: str, tokens: str = "3579", loss: float = 1.0) -> None:
    """Write what a job answered: which rows it has right, and their lengths."""
    rows = [
        {
            "origin": f"row {number}",
            "tokens": int(length),
            "answer_tokens": number + 1,
            "candidates": ["a", "b"],
            "scores": [-loss * int(length), -1.0],
            "label": 0,
            "right": right == "+",
        }
        for number, (right, length) in enumerate(zip(rights, tokens, strict=True))
    ]
    (job.folder / "predictions_test.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_rows_by_length_and_against_addax(compared):
    """Every second seed reads the rows in another order, and its loss is twice as high."""
    addax, mezo = (Trial(STUDY, ADDAX, 2e-3), Trial(STUDY, MEZO, 1e-6))
    read(compared.test(Trial(STUDY)), "----")
    for trial, of_seeds in ((addax, ("++-+", "+---")), (mezo, ("-+++", "+--+"))):
        for seed, rights in enumerate(of_seeds):
            read(compared.test(replace(trial, seed=seed)), rights, loss=1.0 + seed)
    tables, content = report(compared)
    # Of two rows each; token by token: (3 + 2 * 5) / 3 and (3 * 7 + 4 * 9) / 7, half as much again.
    assert "| method | accuracy, up to 5 | above | loss, up to 5 | above |" in tables
    assert "| as it is | 0.000 | 0.000 | 4.333 | 8.143 |" in tables
    assert "| addax | 0.750 | 0.250 | 6.500 | 12.214 |" in tables
    short, long = content["studies"]["tiny"]["methods"]["mezo"]["test_rows_by_length"]
    assert short == {"rows": 2, "accuracy": 0.5, "loss": pytest.approx(6.5)}
    assert long == {"rows": 2, "accuracy": 0.75, "loss": pytest.approx(12.214, abs=1e-3)}
    against = content["studies"]["tiny"]["methods"]["mezo"]["against_addax"]
    assert against["difference"] == 0.125
    assert against["alone"] == {"0": [1, 1], "1": [0, 1]}
    assert against["p_values"] == {"0": 1.0, "1": 1.0}
    assert "| 1 to 1, 1 to 0 | 1, 1 |" in tables
    assert content["studies"]["tiny"]["methods"]["addax"]["against_addax"] is None
    made_with = "Made with commit 0123456789ab; torch 2.0; abacus, 2 cores."
    assert tables.count(made_with) == tables.count("\n|---") == 5


def test_answers_that_differ_from_row_to_row_have_no_most_frequent_one(compared):
    untrained = compared.test(Trial(STUDY))
    read(untrained, "++--")
    _, content = report(compared)
    assert content["studies"]["tiny"]["most_frequent_answer_share"] == 1.0
    path = untrained.folder / "predictions_test.jsonl"
    path.write_text(path.read_text().replace('"b"', '"c"', 1))
    tables, content = report(compared)
    assert content["studies"]["tiny"]["most_frequent_answer_share"] is None
    assert "most frequent answer" not in tables


def test_methods_of_another_study_on_the_same_rows_are_compared_with_its_addax(compared):
    beside = Study("tiny-peers", "MULTIEMO", 64, (MEZO,), (0, 1))
    elsewhere = replace(beside, name="tiny-other", max_length=65)
    compared.studies += [beside, elsewhere]
    read(compared.test(Trial(STUDY, ADDAX, 2e-3, 1)), "+---")
    for study in (beside, elsewhere):
        for seed in (0, 1):
            trial = Trial(study, MEZO, 1e-6, seed)
            finish(compared.training(trial), log=[evaluated(0.8, 4)], results=COSTS)
            finish(compared.test(trial), results={"test_accuracy": 0.8})
            read(compared.test(trial), "++++")
    _, content = report(compared)
    against = {
        name: content["studies"][name]["methods"]["mezo"]["against_addax"]
        for name in ("tiny-peers", "tiny-other")
    }
    assert against["tiny-peers"]["alone"] == {"1": [0, 3]}
    assert against["tiny-peers"]["difference"] == 0.75
    assert against["tiny-other"] is None


def test_mcnemar():
    """The example of Fay, "Exact McNemar's test and matching confidence intervals" (exact2x2)."""
    assert mcnemar(9, 2) == mcnemar(2, 9) == pytest.approx(0.06543, abs=5e-6)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0


def test_the_interval_of_a_difference():
    """Of one seed it is the binomial one; seeds that differ make it wider."""
    gains = np.zeros((1, 400))
    gains[0, :100] = 1.0
    low, high = bootstrap(gains)
    margin = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == (
        pytest.approx(0.25 - margin, abs=5e-3),
        pytest.approx(0.25 + margin, abs=5e-3),
    )
    low, high = bootstrap(np.concatenate([gains, -gains]))
    assert low == pytest.approx(-0.25, abs=0.05)
    assert high == pytest.approx(0.25, abs=0.05)


def test_figures(compared):
    report(compared)
    for figure in ("tiny-time.png", "tiny-memory.png"):
        assert (compared.folder / "report" / figure).stat().st_size > 1000


def test_a_study_beside_another_is_drawn_in_its_figures(compared, monkeypatch):
    drawn = {}
    for draw in ("draw_curves", "draw_costs"):
        monkeypatch.setattr(
            f"studies.comparison.report.{draw}",
            lambda curves, path, *more: drawn.update({path.name: (curves, *more)}),
        )
    long = replace(MEZO, learning_rates=(1e-6,), steps=16)
    beside = Study("tiny-long", "SST2", 64, (long,), (0,), beside="tiny")
    compared.studies.insert(0, beside)  # which must not make it the first in the figures
    trial = Trial(beside, long, 1e-6, 0)
    finish(compared.training(trial), log=[evaluated(0.9, 16)], results=COSTS)
    for job in compared.timings():
        finish(job, log=[{"loss": 1.0, "train_seconds": 2.0 * step} for step in range(6)])
    report(compared)
    assert drawn.keys() == {"tiny-time.png", "tiny-memory.png"}
    curves, *more = drawn["tiny-memory.png"]
    assert more == ["tiny", 0.6]  # the title, and the share of the most frequent answer
    assert [curve.label for curve in curves] == [
        *("addax, 4 steps", "mezo, 8 steps", "mezo, 16 steps")
    ]


def test_a_training_whose_losses_are_nan_has_diverged(compared):
    """It ends with 0 if the step is finite and the evaluation is not."""
    lost = [evaluated(0.9, step, float("nan")) for step in (2, 4)]
    finish(compared.training(STUDY.grid[0]), log=lost, results=COSTS)
    finish(compared.training(Trial(STUDY, ADDAX, 2e-3, 1)), log=lost, results=COSTS)
    tables, content = report(compared)
    assert "| addax | 0.001: diverged, 0.002: 0.800 |" in tables
    assert "- addax: 4 steps, dev accuracy still rising at the end (0.800); diverged with" in tables
    first, *_ = content["studies"]["tiny"]["methods"]["addax"]["trainings"]
    assert first["diverged"]


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no training"):
        write_report(comparison(tmp_path), tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """What would have been saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    return saved


def test_a_small_difference_looks_small(figures, tmp_path):
    curve = Curve("addax", "addax", 4, [(1.0, 0.62), (2.0, 0.621)], [0.62, 0.621], 1e9)
    draw_curves([curve], tmp_path / "time.png", "tiny")
    draw_costs([curve], tmp_path / "memory.png", "tiny")
    for figure in figures:
        low, high = figure.axes[0].get_ylim()
        assert high - low == pytest.approx(0.1)
        assert low < 0.62 < 0.621 < high


def test_two_curves_of_a_method_are_told_apart(figures, tmp_path):
    short, long = (Curve("mezo", "mezo", steps, [(1.0, 0.6)], [0.6], 1e9) for steps in (4, 8))
    draw_costs([short, long], tmp_path / "memory.png", "tiny", most_frequent=0.5)
    first, second, line = figures[0].axes[0].lines
    assert first.get_color() == second.get_color() == first.get_markerfacecolor()
    assert second.get_markerfacecolor() == "white"
    assert list(line.get_ydata()) == [0.5, 0.5]


def test_without_its_neighbour_a_study_has_figures_of_its_own(compared):
    compared.studies[:] = [replace(STUDY, beside="other")]
    report(compared)
    assert (compared.folder / "report" / "tiny-time.png").is_file()
