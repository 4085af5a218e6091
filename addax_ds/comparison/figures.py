"""Figures of a comparison: accuracy against time and against memory."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Colours that colour-blind readers tell apart (Okabe and Ito).
_COLOURS = {
    "addax": "#D55E00",
    "addax-wa": "#E69F00",
    "mezo": "#0072B2",
    "ip-sgd": "#009E73",
    "adamw": "#CC79A7",
    "sgd": "#56B4E9",
}


@dataclass(frozen=True)
class Curve:
    """One method.

    Attributes:
        method: its name.
        points: minutes of training and accuracy on dev, means over seeds.
        tests: accuracy on the test rows, one a seed.
        peak_memory: in bytes.
    """

    method: str
    points: list[tuple[float, float]]
    tests: list[float]
    peak_memory: float


def draw_curves(curves: list[Curve], path: Path, title: str) -> None:
    """Draw accuracy on dev against minutes of training."""
    figure, axes = _figure(title)
    for curve in curves:
        colour = _COLOURS[curve.method]
        minutes, accuracy = zip(*curve.points, strict=True)
        axes.plot(minutes, accuracy, "o-", color=colour, label=curve.method, markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("training, minutes")
    axes.set_ylabel("accuracy on dev")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_costs(curves: list[Curve], path: Path, title: str) -> None:
    """Draw accuracy on the test rows, each seed a point, against peak memory."""
    figure, axes = _figure(title)
    for curve in curves:
        memory = [curve.peak_memory / 1e9] * len(curve.tests)
        axes.plot(memory, curve.tests, "o", color=_COLOURS[curve.method], label=curve.method)
    axes.set_xlabel("peak memory, GB (on a CPU the resident set of the process)")
    axes.set_ylabel("accuracy on the test rows")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
