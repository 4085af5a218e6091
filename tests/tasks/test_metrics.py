"""Exact match and F1 against answers that the official scripts are known to give."""

import pytest

from addax_ds.tasks.metrics import drop_scores, squad_scores


@pytest.mark.parametrize(
    ("answer", "right", "exact_match", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the denver  broncos!", ["Denver Broncos"], 1, 1),  # case, article, spaces, punctuation
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], 0, 4 / 5),  # the best
        ("golden golden", ["golden"], 0, 2 / 3),  # words count as often as they stand there
        ("blue", ["golden"], 0, 0),
        ("", ["golden"], 0, 0),
        ("the", ["a"], 1, 0),  # nothing is left of either: as in evaluate-v1.1.py
        ("well-known", ["wellknown"], 1, 1),
        ("Théâtre", ["theatre"], 0, 0),
        ("another", ["other"], 0, 0),  # "an" is removed as a word only
    ],
)
def test_squad(answer, right, exact_match, f1):
    assert squad_scores(answer, right) == pytest.approx({"exact_match": exact_match, "f1": f1})


@pytest.mark.parametrize(
    ("answer", "right", "exact_match", "f1"),
    [
        ("3", ["3.0"], 1, 1),  # numbers by value
        ("1,000 yards", ["1000 yards"], 1, 1),
        ("23 yards", ["25 yards"], 0, 0),  # the wrong number is worth nothing
        ("23 yards", ["23"], 0, 0.67),
        ("yards", ["23 yards"], 0, 0),
        ("23-yard run", ["23 yard run"], 1, 1),  # hyphens part words
        ("the Chiefs Chiefs", ["Chiefs"], 0, 1),  # bags of words have a word once
        ("Chiefs", ["Raiders", "Kansas City Chiefs"], 0, 0.5),
        ("", ["Chiefs"], 0, 0),
    ],
)
def test_drop(answer, right, exact_match, f1):
    found = drop_scores(answer, right)
    assert found["drop_exact_match"] == exact_match
    assert found["drop_f1"] == pytest.approx(f1)


def test_drop_reports_the_squad_scores_of_the_papers_too():
    found = drop_scores("23 yards", ["25 yards"])
    assert found == {"exact_match": 0.0, "f1": 0.5, "drop_exact_match": 0.0, "drop_f1": 0.0}
