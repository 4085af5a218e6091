"""Training curves as one picture, drawn from what ``transformers.Trainer`` logged."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from addax_ds.optim.methods import Method

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
) -> None:
    """Draw loss, g⁰ and accuracy over steps as a PNG at ``path``, replacing it at once.

    Args:
        log_history: ``Trainer.state.log_history``. Read from every entry with a ``step``: the
            losses ``fo_loss`` (or else ``loss``), ``zo_loss`` and ``eval_loss``; the projected
            gradient ``g0``; the accuracies ``eval_accuracy``, ``test_before_accuracy`` and
            ``test_accuracy``, between 0 and 1. Values that are not finite leave a gap.
        path: the PNG file; its folder is made if need be.
        title: stands above the panels.
        metric: what is drawn in place of accuracy, such as ``f1``.
    """
    # A title with two dollar signs, as a path may have, is no formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        _save(_figure(log_history, title, metric), Path(path))


def _figure(log_history: Sequence[dict[str, Any]], title: str, metric: str) -> Figure:
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    loss, g0, accuracy = figure.subplots(3, 1, sharex=True)
    figure.suptitle(title)

    _style(loss, "loss")
    _curve(loss, _points(log_history, "fo_loss", "loss"), "first-order batch", _BLUE)
    _curve(loss, _points(log_history, "zo_loss"), "zeroth-order batch", _ORANGE)
    _curve(loss, _points(log_history, "eval_loss"), "dev", _GREEN)
    _finish(loss, "no loss was logged")

    _style(g0, "g⁰")
    _curve(g0, _points(log_history, "g0"), "projected gradient g⁰", _ORANGE)
    if g0.lines:
        g0.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
    _finish(g0, "no zeroth-order pass")

    _style(accuracy, metric)
    _curve(accuracy, _points(log_history, f"eval_{metric}"), "dev", _GREEN)
    _marks(accuracy, _points(log_history, f"test_before_{metric}"), "test, before", "left")
    _marks(accuracy, _points(log_history, f"test_{metric}"), "test, after", "right")
    _finish(accuracy, f"no {metric} was measured")
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    accuracy.set_xlabel("step")
    accuracy.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
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


def _style(axes: Axes, label: str) -> None:
    plain_axes(axes, y=label)
    axes.margins(x=0.02, y=0.1)


def _curve(axes: Axes, points: Points, label: str, color: str) -> None:
    if any(math.isfinite(value) for _, value in points):
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) <= _MARKED_POINTS else None
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=3.5, lw=1.4)


def _marks(axes: Axes, points: Points, label: str, side: Literal["left", "right"]) -> None:
    """Draw single measurements as diamonds, each with its value on the inner side."""
    if not points:
        return
    steps, values = zip(*points, strict=True)
    face = "white" if side == "left" else "black"
    axes.plot(steps, values, "D", color="black", markerfacecolor=face, markersize=7, label=label)
    for point in points:
        offset = (10, -4) if side == "left" else (-10, -4)
        axes.annotate(f"{point[1]:.1%}", point, offset, textcoords="offset points", ha=side)


def _finish(axes: Axes, if_empty: str) -> None:
    if axes.lines:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0)
    else:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, if_empty, transform=axes.transAxes, ha="center", va="center", color=_GREY
        )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
