"""Where a task's rows come from: the hub's layout, local folders and files, packages."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from addax_ds.tasks import TASKS, Hub, Local, Sizes, find_task
from addax_ds.tasks.sources import installed_folder
from addax_ds.utils.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture(name: str) -> DatasetDict:
    return DatasetDict(
        {
            split: Dataset.from_json(str(FIXTURES / name / f"{split}.jsonl"))
            for split in ("train", "validation")
        }
    )


def texts(splits: Any) -> dict[str, list[Any]]:
    return {name: [row.columns for row in rows] for name, rows in splits.items()}


# ---- the hub -------------------------------------------------------------------------------------

HUB = {
    "sst2": ("nyu-mll/glue", "sst2", None),
    "boolq": ("google/boolq", None, None),
    "squad": ("rajpurkar/squad", None, None),
    "drop": ("ucinlp/drop", None, None),
    **{
        name: ("aps/super_glue", config, "refs/convert/parquet")
        for name, config in (
            *((name, name) for name in ("rte", "cb", "wic", "multirc", "copa", "record")),
            ("wsc", "wsc.fixed"),
        )
    },
}


def test_where_the_tasks_come_from():
    """The repositories whose main branch is a script are read at their Parquet revision."""
    found = {name: task.source for name, task in TASKS.items() if isinstance(task.source, Hub)}
    assert {name: (s.path, s.config, s.revision) for name, s in found.items()} == HUB
    assert all((s.files is None) == (s.revision is None) for s in found.values())


@pytest.mark.parametrize("name", HUB)
def test_both_splits_are_asked_of_datasets(name, monkeypatch):
    """And nothing else; rows are read when they are drawn."""
    asked = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Dataset:
        asked.append((path, name, options))
        return data[options["split"]]

    data = fixture(name)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = TASKS[name].rows(Sizes(6, 3, 2))
    assert (len(rows.train), len(rows.dev), len(rows.test)) == (6, 3, 2)
    path, config, revision = HUB[name]
    for (used, used_config, options), split in zip(asked, ("train", "validation"), strict=True):
        assert (used, options["revision"], options["split"]) == (path, revision, split)
        if revision is None:
            assert used_config == config
        else:
            assert options["data_files"] == {split: f"{config}/{split}/*.parquet"}
    label = " ".join(part for part in (path, config, "validation row ") if part)
    assert rows.test[0].origin.startswith(label)


def test_a_repository_of_parquet_files_is_read_by_its_layout(tmp_path):
    """A copy of the layout that the hub's Parquet revision has."""
    for config in ("rte", "cb"):
        for split, data in fixture(config).items():
            folder = tmp_path / config / split
            folder.mkdir(parents=True)
            data.to_parquet(str(folder / "0000.parquet"))
    splits = Hub(str(tmp_path), "rte", files="{config}/{split}/*.parquet")()
    assert texts(splits) == texts(Local(FIXTURES / "rte")())


def test_without_a_connection_the_way_out_is_named():
    with pytest.raises(UserError, match=r"cannot load aps/super_glue rte train from the hub") as e:
        TASKS["rte"].rows()
    assert "--task_data: a folder that save_to_disk wrote" in str(e.value)


# ---- local ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["boolq", "squad", "record"])
def test_what_save_to_disk_wrote(name, tmp_path):
    """All splits in one folder, or a folder a split, are the same as JSON Lines."""
    wanted = find_task(name, str(FIXTURES / name)).rows(Sizes(6, 3, 2))
    data = fixture(name)
    data.save_to_disk(str(tmp_path / "together"))
    for split in data:
        data[split].save_to_disk(str(tmp_path / "apart" / split))
    for folder in ("together", "apart"):
        found = find_task(name, str(tmp_path / folder)).rows(Sizes(6, 3, 2))
        for part in ("train", "dev", "test"):
            pairs = zip(getattr(found, part), getattr(wanted, part), strict=True)
            assert all({**vars(a), "origin": b.origin} == vars(b) for a, b in pairs)


def test_one_file_and_one_split():
    rows = find_task("cb", str(FIXTURES / "cb" / "train.jsonl")).rows(Sizes(6, 3, 3))
    assert rows.description.startswith("re-partitioned CB (")
    assert rows.description.endswith("train rows")
    assert (len(rows.train), len(rows.dev), len(rows.test)) == (6, 3, 3)


def test_origins_say_where_a_row_stands(tmp_path):
    fixture("cb").save_to_disk(str(tmp_path))
    assert Local(tmp_path)()["validation"][2].origin == f"{tmp_path} validation row 2"
    file = FIXTURES / "cb" / "train.jsonl"
    assert Local(file)()["train"][2].origin == f"{file}:3"


def test_nothing_that_can_be_read(tmp_path):
    with pytest.raises(UserError, match="no data set there; give a folder that save_to_disk wrote"):
        Local(tmp_path)()
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
        Local(tmp_path)()
    (tmp_path / "train.jsonl").write_text('{"premise": \n')
    with pytest.raises(UserError, match=r"train.jsonl:1: not valid JSON"):
        Local(tmp_path / "train.jsonl")()


def test_missing_data_package_names_the_remedy():
    with pytest.raises(UserError, match=r"no-such-data.*not installed.*make install"):
        installed_folder("no-such-data", "1.0", "rows")
    with pytest.raises(UserError, match=r"has no folder no/such/folder.*pip install"):
        installed_folder("pytest", "9.2.0", "no/such/folder")
