"""Figures of a comparison: accuracy against time and against memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from addax_ds.cli.plotting import METHOD_COLOURS, plain_axes
from addax_ds.optim.methods import Method

_LEAST_ACCURACY_SPAN = 0.1


@dataclass(frozen=True)
class Curve:
    """One method.

    Attributes:
        method: by which it is coloured.
        name: of its settings.
        steps: of its trainings.
        points: minutes of training and accuracy on dev, means over seeds.
        tests: accuracy on the test rows, one a seed.
        peak_memory: in bytes.
    """

    method: Method
    name: str
    steps: int
    points: list[tuple[float, float]]
    tests: list[float]
    peak_memory: float

    @property
    def label(self) -> str:
        """Name in the legend."""
        return f"{self.name}, {self.steps} steps"


def draw_curves(curves: list[Curve], path: Path, title: str) -> None:
    """Draw accuracy on dev against minutes of training."""
    figure, axes = new_figure(title, "training, minutes", "accuracy on dev")
    for curve, style in _styled(curves):
        minutes, accuracy = zip(*curve.points, strict=True)
        axes.plot(minutes, accuracy, "o-", markersize=4, **style)
    _widen(axes)
    axes.set_xscale("log")
    for of_ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        of_ticks("{x:g}")  # minutes, not powers of ten
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_costs(
    curves: list[Curve], path: Path, title: str, most_frequent: float | None = None
) -> None:
    """Draw accuracy on the test rows, each seed a point, against peak memory.

    Args:
        curves: the methods.
        path: of the PNG file.
        title: stands above it.
        most_frequent: accuracy of the most frequent answer, which becomes a line, if it is known.
    """
    memory_label = "peak memory, GB (on a CPU the resident set of the process)"
    figure, axes = new_figure(title, memory_label, "accuracy on the test rows")
    for curve, style in _styled(curves):
        memory = [curve.peak_memory / 1e9] * len(curve.tests)
        axes.plot(memory, curve.tests, "o", **style)
    if most_frequent is not None:
        axes.axhline(most_frequent, color="grey", linestyle="--", label="most frequent answer")
    _widen(axes)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _widen(axes: Axes) -> None:
    """Make the accuracies shown span enough for a small difference to look small."""
    low, high = axes.get_ylim()
    missing = max(0.0, _LEAST_ACCURACY_SPAN - (high - low))
    axes.set_ylim(low - missing / 2, high + missing / 2)


def _styled(curves: list[Curve]) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """Yield the curves with their colours; a method's later ones have hollow points."""
    methods: set[Method] = set()
    for curve in curves:
        colour = METHOD_COLOURS[curve.method]
        style = {"color": colour, "label": curve.label}
        if curve.method in methods:
            style |= {"markerfacecolor": "white", "markeredgecolor": colour}
        methods.add(curve.method)
        yield curve, style


def new_figure(title: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Axes]:
    """Return an empty figure with labelled axes, ``height`` in inches."""
    figure = Figure(figsize=(6.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title)
    plain_axes(axes, x, y)
    return figure, axes
