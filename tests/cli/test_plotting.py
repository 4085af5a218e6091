"""The picture of a run: what it takes from the log, and that it is written whole or not at all."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from addax_ds.cli.plotting import training_curves

LOG = [
    {"step": 0, "test_before_accuracy": 0.52, "test_before_loss": 2.5},
    {"step": 1, "loss": 1.5, "zo_loss": 1.7, "g0": -3.0, "learning_rate": 1e-3, "epoch": 0.5},
    {"step": 2, "loss": 1.25, "fo_loss": 1.2, "zo_loss": 1.4, "g0": math.nan, "epoch": 1.0},
    {"step": 2, "eval_loss": 1.1, "eval_accuracy": 0.7},
    {"step": 3, "loss": 1.0, "zo_loss": 1.3, "g0": 4.0},
    {"step": 3, "test_accuracy": 0.8, "test_loss": 0.9, "train_runtime": 12.0},
    {"note": "an entry without a step"},
]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, beside being saved."""
    seen, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: seen.append(self) or save(self, *a, **k)
    )
    return seen


def curves(axes) -> dict[str, list[tuple[float, float]]]:
    """The labelled curves of a panel as lists of points."""
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    lines = {line.get_label(): line for line in axes.lines}
    return {label: list(map(tuple, lines[label].get_xydata())) for label in labels}


def test_every_logged_value_is_drawn_where_it_belongs(tmp_path, figures):
    training_curves(LOG, tmp_path / "plots" / "curves.png", "A title")
    loss, g0, accuracy = figures[0].axes
    assert curves(loss) == {
        "first-order batch": [(1, 1.5), (2, 1.2), (3, 1.0)],
        "zeroth-order batch": [(1, 1.7), (2, 1.4), (3, 1.3)],
        "dev": [(2, 1.1)],
        "test, before": [(0, 2.5)],
        "test, after": [(3, 0.9)],
    }
    assert [text.get_text() for text in loss.texts] == ["2.500", "0.900"]
    assert [text.get_text() for text in accuracy.texts] == ["52.0%", "80.0%"]
    (points,) = curves(g0).values()
    np.testing.assert_array_equal(points, [(1, -3), (2, math.nan), (3, 4)])
    assert curves(accuracy) == {
        "dev": [(2, 0.7)],
        "test, before": [(0, 0.52)],
        "test, after": [(3, 0.8)],
    }
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["loss", "g⁰", "accuracy"]
    assert accuracy.get_xlabel() == "step"
    assert figures[0].get_suptitle() == "A title"


def test_what_was_tested_stands_at_the_step_of_its_weights(tmp_path, figures):
    training_curves(LOG, tmp_path / "curves.png", "A title", best_step=2)
    loss, _, accuracy = figures[0].axes
    assert curves(loss)["test, after"] == [(2, 0.9)]
    assert curves(loss)["test, before"] == [(0, 2.5)]
    assert curves(accuracy)["test, after"] == [(2, 0.8)]


def test_dollar_signs_are_no_formula(tmp_path, figures):
    title, metric = "/models/cost $5 {or $6", "a $\\frac$"
    log = [{"step": 1, f"eval_{metric}": 1.0}]
    training_curves(log, tmp_path / "curves.png", title, metric)
    assert figures[0].get_suptitle() == title
    assert [axes.get_ylabel() for axes in figures[0].axes] == [metric]


def test_file_is_a_picture(tmp_path):
    path = tmp_path / "curves.png"
    training_curves(LOG, path, "A title")
    height, width, _ = imread(path).shape
    assert min(height, width) > 600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("entry", "panels"),
    [
        ({"loss": 1.5, "test_loss": 1.0}, ["loss"]),
        ({"test_before_loss": 1.5}, ["loss"]),
        ({"loss": 1.5, "zo_loss": 2.0, "g0": 0.5}, ["loss", "g⁰"]),
        ({"loss": math.nan, "eval_accuracy": 0.5}, ["accuracy"]),
        ({"fo_loss": 1.5, "test_accuracy": 0.5}, ["loss", "accuracy"]),
    ],
)
def test_what_was_not_measured_has_no_panel(entry, panels, tmp_path, figures):
    training_curves([{"step": 1, **entry}], tmp_path / "curves.png", "Some")
    assert [axes.get_ylabel() for axes in figures[0].axes] == panels
    assert all(axes.lines for axes in figures[0].axes)
    assert figures[0].axes[-1].get_xlabel() == "step"


@pytest.mark.parametrize(
    "log", [[], [{"step": 1, "learning_rate": 1e-3}], [{"step": 1, "g0": math.inf}]]
)
def test_nothing_to_draw_is_said(log, tmp_path, figures):
    training_curves(log, tmp_path / "curves.png", "Nothing")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["nothing was logged"]


def test_failed_write_keeps_the_former_picture(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"former")

    def fail(self, file, **_):
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        training_curves(LOG, path, "A title")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]
