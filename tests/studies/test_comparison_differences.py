"""The figure that shows each method against Addax, from the JSON files of reports."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from addax_ds.utils.errors import UserError
from studies.comparison.cli import main
from studies.comparison.differences import Difference, draw_differences, read_differences

REPORTS = sorted(Path("docs/comparison").glob("*.json"))


def report(path: Path, **methods: Any) -> Path:
    """Write a report of a study; a method is None or its difference, interval and seeds."""
    entries: dict[str, Any] = {}
    for name, against in methods.items():
        entries[name] = {"flags": {"method": "ip-sgd"}, "against_addax": None}
        if against is not None:
            difference, interval, seeds = against
            p_values = {str(seed): 1.0 for seed in range(seeds)}
            found = {"difference": difference, "interval": interval, "p_values": p_values}
            entries[name]["against_addax"] = found
    path.write_text(json.dumps({"studies": {path.stem: {"methods": entries}}}))
    return path


def test_only_what_has_several_seeds_is_compared(tmp_path):
    first = report(tmp_path / "first.json", addax=None, short=(0.01, [-0.02, 0.03], 3))
    second = report(tmp_path / "second.json", once=(0.5, [0.4, 0.6], 1), all=(0.1, [0, 0.2], 2))
    assert read_differences([second, first]) == [
        Difference("second", "all", "ip-sgd", 0.1, (0, 0.2)),
        Difference("first", "short", "ip-sgd", 0.01, (-0.02, 0.03)),
    ]


def test_the_published_reports_are_read():
    found = {(d.study, d.name): d for d in read_differences(REPORTS)}
    assert len(found) >= 14
    for difference in found.values():
        low, high = difference.interval
        assert low <= difference.mean <= high


def test_what_is_drawn(monkeypatch, tmp_path):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    inside = Difference("tiny", "inside", "ip-sgd", 0.02, (-0.01, 0.05))
    far = Difference("tiny", "far", "mezo", -0.3, (-0.4, -0.2))
    draw_differences([inside, far], tmp_path / "differences.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tiny: inside", "tiny: far"]
    interval, mean, arrow, zero = axes.lines
    assert list(interval.get_xdata()) == [-0.01, 0.05]
    assert list(mean.get_xdata()) == [0.02]
    assert list(zero.get_xdata()) == [0.0, 0.0]
    left, right = axes.get_xlim()
    assert left < arrow.get_xdata()[0] < -0.05 < right
    assert [text.get_text() for text in axes.findobj(Text, include_self=False)].count(
        "-0.300 (-0.400 to -0.200)"
    ) == 1


def test_the_command(tmp_path):
    main(["--differences", *map(str, REPORTS), f"--report={tmp_path / 'new'}"])
    assert (tmp_path / "new" / "differences.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "said"),
    [("no JSON", "is no comparison.json"), ("[]", "is no comparison.json"), (None, "over several")],
)
def test_a_file_without_differences_is_refused(content, said, tmp_path):
    path = tmp_path / "given.json"
    if content is None:
        report(path, addax=None, once=(0.5, [0.4, 0.6], 1))
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_differences([path])


def test_a_figure_needs_a_folder():
    with pytest.raises(SystemExit) as ended:
        main(["--differences", str(REPORTS[0])])
    assert ended.value.code != 0
    assert "--report" in str(ended.value.__cause__)
