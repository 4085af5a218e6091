"""Draws what was measured, and what the model makes of it, as PNGs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from addax_ds.cli.plotting import METHOD_COLOURS, plain_axes
from studies.scaling.phases import PHASES
from studies.scaling.projection import LABEL

Row = dict[str, Any]

_PHASE_COLORS = dict(
    zip(
        PHASES,
        ("#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#BBBBBB", "#444444"),
        strict=True,
    )
)


def draw_points(rows: Sequence[Row], path: Path) -> None:
    """Draw speed, phases, memory and bytes; a column for each model and length."""
    measured = [row for row in rows if row["status"] == "measured"]
    figure, columns = _columns(measured, panels=4, height=13.0)
    for (model, length), (speed, bars, memory, sent) in columns.items():
        same = [row for row in measured if (row["model"], row["length"]) == (model, length)]
        speed.set_title(f"{model}, {length} tokens", fontsize="medium", parse_math=False)
        _curves(speed, same, "tokens a second", lambda row: row["tokens_per_second"])
        _bars(bars, same)
        _curves(memory, same, "peak GB of a rank", lambda row: row["peak_memory_bytes"] / 1e9)
        _curves(sent, same, "MB that a rank sends in a step", lambda row: row["sent_bytes"] / 1e6)
    _legends(figure, columns)
    figure.savefig(path, dpi=120)


def draw_projection(rows: Sequence[Row], path: Path) -> None:
    """Draw projected speed over GPUs, as a band between no overlap and full overlap."""
    figure, columns = _columns(rows, panels=1, height=4.2)
    for (model, length), (axes,) in columns.items():
        same = [row for row in rows if (row["model"], row["length"]) == (model, length)]
        axes.set_title(f"{model}, {length} tokens", fontsize="medium", parse_math=False)
        plain_axes(axes, "GPUs", "tokens a second, projected")
        for method in dict.fromkeys(row["method"] for row in same):
            own = sorted((r for r in same if r["method"] == method), key=lambda r: r["ranks"])
            numbers = [row["ranks"] for row in own]
            slow = [row["tokens_per_second_no_overlap"] for row in own]
            fast = [row["tokens_per_second_full_overlap"] for row in own]
            color = METHOD_COLOURS[method]
            axes.fill_between(numbers, slow, fast, color=color, alpha=0.25, linewidth=0)
            axes.plot(numbers, slow, color=color, marker="o", markersize=3.5, label=method)
            axes.plot(numbers, fast, color=color, linestyle="--")
        axes.set(xscale="log", yscale="log")
        _ticks(axes, sorted({row["ranks"] for row in same}))
    device = ", ".join(sorted({row["compute_measured_on"] for row in rows}))
    figure.suptitle(
        f"{LABEL} (compute measured on: {device})\nsolid: no overlap, dashed: full overlap",
        fontsize="medium",
    )
    _legends(figure, columns)
    figure.savefig(path, dpi=120)


def _columns(
    rows: Sequence[Row], panels: int, height: float
) -> tuple[Figure, dict[tuple[str, int], list[Axes]]]:
    """Return a figure, and the axes of its columns from top to bottom."""
    keys = list(dict.fromkeys((row["model"], row["length"]) for row in rows))
    figure = Figure(figsize=(max(3.4 * len(keys), 5.0) + 1.2, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, len(keys), squeeze=False)
    return figure, {key: list(axes[:, index]) for index, key in enumerate(keys)}


def _curves(axes: Axes, rows: Sequence[Row], label: str, value: Callable[[Row], float]) -> None:
    plain_axes(axes, "ranks", label)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda r: r["ranks"])
        axes.plot(
            [row["ranks"] for row in own],
            [value(row) for row in own],
            color=METHOD_COLOURS[method],
            marker="o",
            markersize=3.5,
            label=method,
        )
    axes.set_ylim(0, 1.1 * max(value(row) for row in rows) or 1.0)
    _ticks(axes, sorted({row["ranks"] for row in rows}))


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Stack the phases of each method and number of ranks."""
    plain_axes(axes, "method, ranks", "seconds of a watched step")
    ordered = sorted(
        rows, key=lambda row: (list(METHOD_COLOURS).index(row["method"]), row["ranks"])
    )
    places = range(len(ordered))
    below = [0.0] * len(ordered)
    for phase in PHASES:
        seconds = [row[f"{phase}_seconds"] for row in ordered]
        axes.bar(places, seconds, bottom=below, color=_PHASE_COLORS[phase], label=phase)
        below = [a + b for a, b in zip(below, seconds, strict=True)]
    names = [f"{row['method']}, {row['ranks']}" for row in ordered]
    axes.set_xticks(list(places), names, rotation=90, fontsize="small")


def _ticks(axes: Axes, numbers: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(numbers)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _legends(figure: Figure, columns: dict[tuple[str, int], list[Axes]]) -> None:
    """Put one legend a row of the figure to the right of it."""
    last = list(columns.values())[-1]
    for axes in last:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
