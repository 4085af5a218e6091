"""Which rows of a task a run gets, and what is said of rows that cannot be used."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addax_ds.tasks import TASKS, ChoiceTask, GenerationTask, Sizes, SourceRow, find_task
from addax_ds.utils.errors import UserError
from tests.tasks.test_tasks import FIXTURES, WORDED, fixture_rows

# ---- which rows ----------------------------------------------------------------------------------


def numbered(name: str, count: int) -> list[SourceRow]:
    return [SourceRow(f"{name} {i}", {"text": f"{name}{i}", "label": i % 2}) for i in range(count)]


def toy(splits: dict[str, list[SourceRow]], **options: Any) -> ChoiceTask:
    return ChoiceTask(
        name="toy",
        title="Toy",
        source=lambda: splits,
        columns={"text": str, "label": int},
        prompt=lambda row: f"{row['text']}?",
        candidates=lambda row: (" no", " yes"),
        **options,
    )


def origins(rows: list[Any]) -> list[str]:
    return [row.origin for row in rows]


@pytest.mark.parametrize("seed", [0, 7])
def test_rows_are_drawn_as_mezo_draws_them(seed):
    """By its `sample_subset`, which seeds NumPy's global generator."""

    def subset(size: int, number: int) -> list[int]:
        state = np.random.get_state()
        np.random.seed(seed)
        indices = np.random.permutation(size).tolist()[:number]
        np.random.set_state(state)
        return indices

    task = toy({"train": numbered("t", 40), "validation": numbered("v", 30)})
    rows = task.rows(Sizes(20, 5, 10), seed)
    train_and_dev = [f"t {i}" for i in subset(40, 25)]
    assert origins(rows.train) == train_and_dev[:-5]
    assert origins(rows.dev) == train_and_dev[-5:]
    assert origins(rows.test) == [f"v {i}" for i in subset(30, 10)]
    assert rows.notes == ()


def test_published_sizes():
    sizes = {name: TASKS[name].sizes for name in WORDED}
    small = {name for name, size in sizes.items() if size == Sizes(1000, 100, 1000)}
    assert small == {"cb", "copa"}
    assert all(sizes[name] == Sizes(1000, 500, 1000) for name in sizes.keys() - small)


def test_small_sets_use_what_is_left_and_say_so():
    task = toy({"train": numbered("t", 25), "validation": numbered("v", 6)})
    rows = task.rows(Sizes(1000, 10, 1000))
    assert (len(rows.train), len(rows.dev), len(rows.test)) == (15, 10, 6)
    assert rows.notes == (
        "15 training rows, not 1000: 25 rows, 10 of them dev",
        "6 test rows, not 1000: 6 rows in the validation split",
    )
    assert not set(origins(rows.train)) & set(origins(rows.dev))


def test_without_training_rows_there_is_no_dev_and_the_same_test():
    task = toy({"train": numbered("t", 25), "validation": numbered("v", 20)})
    rows = task.rows(Sizes(0, 10, 8), seed=3)
    assert (rows.train, rows.dev, rows.notes) == ([], [], ())
    assert origins(rows.test) == origins(task.rows(Sizes(5, 5, 8), seed=3).test)


def test_one_split_is_dealt_whatever_its_order():
    rows = numbered("v", 50)
    first = toy({"validation": rows}).rows(Sizes(20, 8, 12), seed=3)
    again = toy({"validation": rows[::-1]}).rows(Sizes(20, 8, 12), seed=3)
    assert first == again
    assert first != toy({"validation": rows}).rows(Sizes(20, 8, 12), seed=4)
    dealt = origins([*first.train, *first.dev, *first.test])
    assert (len(first.train), len(first.dev), len(first.test)) == (20, 8, 12)
    assert len(set(dealt)) == 40
    assert first.description == "re-partitioned Toy validation rows"
    assert toy({"validation": rows}).rows(Sizes(0, 0, 12), seed=3).test == first.test


def test_one_split_that_is_too_small_is_divided_in_proportion():
    rows = toy({"train": numbered("t", 50)}).rows(Sizes(100, 50, 100))
    assert (len(rows.train), len(rows.dev), len(rows.test)) == (20, 10, 20)
    assert rows.notes[1] == "10 dev rows, not 50: 50 rows in all"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 3, "test": 3}, r"found the splits \[test, train\]; there must be train and val"),
        (
            {"train": 3, "validation": 3},
            "of 3 train rows and 3 validation rows none is left for train.* lower --num_train",
        ),
        ({"validation": 0}, "of 0 validation rows none is left for train"),
    ],
)
def test_splits_that_cannot_be_used(splits, message):
    task = toy({name: numbered(name, count) for name, count in splits.items()})
    with pytest.raises(UserError, match=message):
        task.rows(Sizes(2, 3, 2))


# ---- bad rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "x"}, "task toy, file:7: there is no column label; found text"),
        ({"text": None, "label": 0}, "column text must be of type str, and is NoneType"),
        ({"text": "x", "label": "1"}, "column label must be of type int, and is str"),
        ({"text": "x", "label": True}, "column label must be of type int, and is bool"),
        ({"text": "x", "label": -1}, "toy, file:7: label -1 .* unlabelled rows cannot be used"),
        ({"text": "x", "label": 2}, "label 2 names none of the 2 candidates"),
    ],
)
def test_bad_rows_are_named(columns, message):
    task = toy({"validation": [SourceRow("file:7", columns)]})
    with pytest.raises(UserError, match=message):
        task.rows(Sizes(0, 0, 1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("copa", {"question": "why"}, "the row cannot be put in words: KeyError"),
        ("boolq", {"question": ""}, None),
        ("record", {"answers": ["Nobody"]}, "cannot be put in words: ValueError"),
        ("record", {"answers": []}, "label None names none"),
        ("squad", {"answers": {"text": []}}, "rows without an answer cannot be used"),
        ("squad", {"answers": {}}, "cannot be put in words: KeyError"),
        ("drop", {"answers_spans": {"spans": [3]}}, "are not a list of one or more strings"),
    ],
)
def test_bad_rows_of_the_papers_tasks(name, change, message, tmp_path):
    line = (FIXTURES / name / "validation.jsonl").read_text().splitlines()[0]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**json.loads(line), **change}) + "\n")
    task = find_task(name, str(path))
    if message is None:
        assert task.rows(Sizes(0, 0, 1)).test[0].prompt.endswith(" ?\n")
    else:
        with pytest.raises(UserError, match=rf"task {name}, {path}:1: .*{message}"):
            task.rows(Sizes(0, 0, 1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "spans", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("name", WORDED)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_any_row_is_read_or_refused_in_words(name, data):
    task = TASKS[name]
    typed = {
        str: st.text(st.characters(), max_size=8),
        int: st.integers(-1, 3),
        bool: st.booleans(),
    }
    columns = {
        column: data.draw(typed.get(kind, JSON) if data.draw(st.booleans()) else JSON)
        for column, kind in task.columns.items()
        if data.draw(st.integers(0, 9))
    }
    try:
        row = task._read(SourceRow("file:7", columns))
        said = (row.prompt + row.answer) and row.origin
    except UserError as error:
        said = str(error)
    assert "file:7" in said


def test_half_a_surrogate_pair_is_refused():
    columns = {"sentence": "fine \ud800", "label": 1}
    with pytest.raises(UserError, match="file:7: the row cannot be put in words: UnicodeEncode"):
        TASKS["sst2"]._read(SourceRow("file:7", columns))


def test_columns_of_another_edition():
    """GLUE has RTE with other names than SuperGLUE."""
    (row,) = (r for o, r in fixture_rows("rte").items() if o.endswith("train.jsonl:2"))
    columns = json.loads((FIXTURES / "rte" / "train.jsonl").read_text().splitlines()[1])
    columns["sentence1"], columns["sentence2"] = columns.pop("premise"), columns.pop("hypothesis")
    task = TASKS["rte"]
    assert task._read(SourceRow(row.origin, columns)) == row


# ---- slips in a task of one's own ----------------------------------------------------------------


def slip(**more: Any) -> GenerationTask:
    rows = {"train": numbered("t", 4), "validation": numbered("v", 4)}
    options: dict[str, Any] = {
        "name": "own",
        "title": "Own",
        "source": lambda: rows,
        "columns": {"text": str},
        "prompt": lambda row: row["text"],
        "answers": lambda row: ["good"],
        "score": lambda text, answers: {"f1": float(text in answers)},
    }
    return GenerationTask(**(options | more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"answers": lambda row: "good"}, r"own, t \d: the answers 'good' are not a list"),
        ({"answers": lambda row: {"good", "well"}}, "are not a list of one or more strings"),
        ({"answers": lambda row: []}, r"own, t \d: the answers \[\] are not a list"),
        ({"columns": {"text": int | float}}, r"must be of type int \| float, and is str"),
        ({"columns": {"text": list[str]}}, r"column text has the type list\[str\], .*list in pl"),
        ({"source": lambda: numbered("t", 4)}, "must return splits by name, .* returned list"),
        ({"source": lambda: {"train": iter(())}}, "returned train: tuple_iterator"),
        ({"source": lambda: {"train": [{"text": ""}]}}, "returned train: a sequence of dict"),
        ({"source": lambda: 1 / 0}, "its source cannot be read: ZeroDivisionError"),
    ],
)
def test_a_slip_is_said(more, message):
    with pytest.raises(UserError, match=message):
        slip(**more).rows(Sizes(2, 1, 2))


def test_candidates_are_no_string():
    task = replace(toy({"train": numbered("t", 4)}), candidates=lambda row: "no")
    with pytest.raises(UserError, match="the candidates 'no' are not a list"):
        task.rows(Sizes(2, 1, 1))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"score": lambda text, _: {"f1": 1 / len(text)}}, r"score\(''.*fails: ZeroDivisionErr"),
        ({"score": lambda text, answers: {"accuracy": 1.0}}, "has no f1, .*; found accuracy"),
        ({"score": lambda text, answers: {"f1": "good"}}, "fails: ValueError"),
    ],
)
def test_a_score_that_would_end_the_run_is_found_before(more, message):
    task = slip(**more)
    with pytest.raises(UserError, match=message):
        task.check_score(task.rows(Sizes(2, 1, 2)).test)
    slip().check_score(task.rows(Sizes(2, 1, 2)).test)


def test_dev_rows_that_take_all_are_named_with_their_number():
    few = {"train": numbered("t", 60), "validation": numbered("v", 1)}
    message = "of 60 train rows and 1 validation rows none is left for train.* 500 for dev"
    with pytest.raises(UserError, match=message):
        slip(source=lambda: few).rows()
