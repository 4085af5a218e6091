"""Reports of several comparisons in one figure: each method against Addax."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import MultipleLocator

from addax_ds.cli.plotting import METHOD_COLOURS
from addax_ds.optim.methods import Method
from addax_ds.utils.errors import UserError
from studies.comparison.figures import new_figure

_LIMIT = 0.1  # Of accuracy; one method that fails would hide all other differences.


@dataclass(frozen=True)
class Difference:
    """A method against Addax, as a report has it.

    Attributes:
        study: of both.
        name: of the method's settings.
        method: by which it is coloured.
        mean: its accuracy on the test rows less Addax's.
        interval: that holds 95 % of such differences of resampled rows and seeds.
    """

    study: str
    name: str
    method: Method
    mean: float
    interval: tuple[float, float]


def read_differences(reports: Sequence[Path]) -> list[Difference]:
    """Return the differences over several seeds, study by study in the order of the reports.

    Raises:
        UserError: a file is no report, or none has a difference over several seeds.
    """
    found = [difference for report in reports for difference in _differences(report)]
    if not found:
        raise UserError("no report here compares a method with Addax over several seeds")
    return found


def _differences(report: Path) -> Iterator[Difference]:
    try:
        for study, result in json.loads(report.read_text())["studies"].items():
            for name, entry in result["methods"].items():
                against = entry.get("against_addax")
                # One training does not know how much it differs from the next.
                if against is not None and len(against["p_values"]) > 1:
                    low, high = against["interval"]
                    method = entry["flags"]["method"]
                    yield Difference(study, name, method, against["difference"], (low, high))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{report} is no comparison.json of launch/compare.py: {error}") from error


def draw_differences(differences: Sequence[Difference], path: Path) -> None:
    """Draw each difference as a point in its interval, a line each.

    One beyond the limits of the figure is an arrow with its number.
    """
    height = 1.2 + 0.26 * len(differences)
    title = "accuracy on the test rows, less that of Addax"
    figure, axes = new_figure(title, "worse than Addax  ←   →  better", "", height)
    for line, difference in enumerate(differences):
        low, high = difference.interval
        colour = METHOD_COLOURS[difference.method]
        if abs(difference.mean) > _LIMIT:
            side = 1 if difference.mean > 0 else -1
            axes.plot(side * _LIMIT, line, ">" if side > 0 else "<", color=colour)
            number = f"{difference.mean:+.3f} ({low:+.3f} to {high:+.3f})"
            where = "right" if side > 0 else "left"
            axes.text(side * 0.94 * _LIMIT, line, number, va="center", ha=where, fontsize=8)
        else:
            axes.plot([low, high], [line, line], color=colour)
            axes.plot(difference.mean, line, "o", color=colour)
    axes.axvline(0.0, color="grey", linewidth=1)
    axes.set_xlim(-_LIMIT * 1.05, _LIMIT * 1.05)
    axes.xaxis.set_major_locator(MultipleLocator(_LIMIT / 2))
    labels = [f"{difference.study}: {difference.name}" for difference in differences]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()  # from above, as they are read
    figure.savefig(path, dpi=150)
