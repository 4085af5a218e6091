"""Training curves as one picture, drawn from what ``transformers.Trainer`` logged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from addax_ds.optim.methods import Method
from addax_ds.utils.files import appearing

# Blue, orange, green and grey that colour-blind readers tell apart (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
_MARKED_POINTS = 60  # A longer curve reads better without a marker at every point.

Points = list[tuple[float, float]]


METHOD_COLOURS: dict[Method, str] = {
    "addax": _ORANGE,
    "addax-wa": "#E69F00",
    "mezo": _GREEN,
    "ip-sgd": _BLUE,
    "sgd": "#56B4E9",
    "adamw": "#000000",
}
"""In every figure that compares methods, in this order."""


def plain_axes(axes: Axes, x: str = "", y: str = "") -> None:
    """Label axes, with a light grid behind the curves and no frame around them."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def training_curves(
    log_history: Sequence[dict[str, Any]],
    path: str | Path,
    title: str,
    metric: str = "accuracy",
    best_step: int | None = None,
) -> None:
    """Draw loss, g⁰ and accuracy over steps as a PNG at ``path``, replacing it at once.

    A panel is left out if nothing of it was measured.

    Args:
        log_history: ``Trainer.state.log_history``. Read from every entry with a ``step``: the
            losses ``fo_loss`` (or else ``loss``), ``zo_loss``, ``eval_loss``, ``test_before_loss``
            and ``test_loss``; the projected gradient ``g0``; the accuracies ``eval_accuracy``,
            ``test_before_accuracy`` and ``test_accuracy``, between 0 and 1. Values that are not
            finite leave a gap.
        path: the PNG file; its folder is made if need be.
        title: stands above the panels.
        metric: what is drawn in place of accuracy, such as ``f1``.
        best_step: step of the weights that were tested; None if they are those of the last.
    """
    # A title with two dollar signs, as a path may have, is no formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        _save(_figure(log_history, title, metric, best_step), Path(path))


@dataclass(frozen=True)
class _Panel:
    """What one panel shows, over the same steps as the others.

    Attributes:
        label: of its axis.
        curves: points, label and colour of each.
        before: measurements before training.
        after: measurements after it.
        percent: whether values are shares, to be written in percent.
    """

    label: str
    curves: tuple[tuple[Points, str, str], ...]
    before: Points = field(default_factory=list)
    after: Points = field(default_factory=list)
    percent: bool = False

    @property
    def is_empty(self) -> bool:
        return not any(map(_drawable, (self.before, self.after, *(c[0] for c in self.curves))))

    def draw(self, axes: Axes) -> None:
        plain_axes(axes, y=self.label)
        axes.margins(x=0.02, y=0.15)
        for points, label, color in self.curves:
            _curve(axes, points, label, color)
        form = "{:.1%}" if self.percent else "{:.3f}"
        _marks(axes, self.before, "test, before", "left", form)
        _marks(axes, self.after, "test, after", "right", form)
        if axes.lines:
            place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
            axes.legend(frameon=False, ncols=5, borderpad=0, **place)
        if self.percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _figure(
    log_history: Sequence[dict[str, Any]], title: str, metric: str, best_step: int | None
) -> Figure:
    log = partial(_points, log_history)

    def tested(key: str) -> Points:
        return [(step if best_step is None else best_step, value) for step, value in log(key)]

    loss = _Panel(
        "loss",
        (
            (log("fo_loss", "loss"), "first-order batch", _BLUE),
            (log("zo_loss"), "zeroth-order batch", _ORANGE),
            (log("eval_loss"), "dev", _GREEN),
        ),
        log("test_before_loss"),
        tested("test_loss"),
    )
    g0 = _Panel("g⁰", ((log("g0"), "projected gradient g⁰", _ORANGE),))
    of_dev = ((log(f"eval_{metric}"), "dev", _GREEN),)
    before, after = log(f"test_before_{metric}"), tested(f"test_{metric}")
    score = _Panel(metric, of_dev, before, after, percent=True)
    panels = [panel for panel in (loss, g0, score) if not panel.is_empty]
    figure = Figure(figsize=(8, 3 * max(len(panels), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    drawn = figure.subplots(len(panels) or 1, 1, sharex=True, squeeze=False)[:, 0]
    for panel, axes in zip(panels, drawn, strict=False):
        panel.draw(axes)
        if panel is g0:
            axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
    if not panels:
        drawn[0].set_axis_off()
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": _GREY}
        drawn[0].text(0.5, 0.5, "nothing was logged", transform=drawn[0].transAxes, **middle)
        return figure
    drawn[-1].set_xlabel("step")
    drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.align_ylabels()
    return figure


def _points(log_history: Sequence[dict[str, Any]], *keys: str) -> Points:
    """Collect (step, value) of the first of ``keys`` that an entry has."""
    points = []
    for entry in log_history:
        value = next((entry[key] for key in keys if entry.get(key) is not None), None)
        if value is not None and "step" in entry:
            points.append((float(entry["step"]), float(value)))
    return points


def _drawable(points: Points) -> bool:
    return any(math.isfinite(value) for _, value in points)


def _curve(axes: Axes, points: Points, label: str, color: str) -> None:
    if _drawable(points):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= _MARKED_POINTS else None
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=3.5, lw=1.4)


def _marks(
    axes: Axes, points: Points, label: str, side: Literal["left", "right"], form: str
) -> None:
    """Draw single measurements as diamonds, each with its value above it."""
    if not _drawable(points):
        return
    steps, values = zip(*points, strict=True)
    face = "white" if side == "left" else "black"
    axes.plot(steps, values, "D", color="black", markerfacecolor=face, markersize=7, label=label)
    for point in points:
        offset = (-4, 8) if side == "left" else (4, 8)
        text = axes.annotate(
            form.format(point[1]), point, offset, textcoords="offset points", ha=side
        )
        text.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as file:
        figure.savefig(file, format="png", dpi=150)
