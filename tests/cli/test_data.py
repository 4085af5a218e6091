"""What a run reads, by its arguments."""

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from addax_ds.cli.data import Data, load_data
from addax_ds.config.arguments import DataArguments
from addax_ds.data.examples import Example
from tests.support.tiny import byte_tokenizer, write_rows

ROWS = [{"question": f"{i}?", "answer": f" {i}!", "text": "no"} for i in range(10)]
COLUMNS = ["prompt=question", "completion=answer"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def loaded(**values: Any) -> Data:
    model: Any = SimpleNamespace(positions=64, vocabulary_size=None)
    return load_data(DataArguments(columns=COLUMNS, **values), byte_tokenizer(), model)


def texts(examples: Any) -> list[str]:
    def text(example: Example) -> str:
        return byte_tokenizer().decode(example.input_ids.tolist())

    return [text(examples[index]) for index in range(len(examples))]


def wanted(*indices: int) -> list[str]:
    return [f"{i}? {i}!<eos>" for i in indices]


def test_splits_of_a_data_set(tmp_path):
    path = str(tmp_path / "splits")
    splits = {"train": Dataset.from_list(ROWS), "dev": Dataset.from_list(ROWS[7:])}
    DatasetDict(splits).save_to_disk(path)
    data = loaded(dataset_name=path, validation_split="dev[:1]", test_split="dev")
    assert data.description == f"{path}, train"
    assert texts(data.train) == wanted(*range(10))
    assert texts(data.validation.examples) == wanted(7)
    assert texts(data.test.examples) == wanted(7, 8, 9)
    assert loaded(dataset_name=path, validation_split="dev").test is None
    own = write_rows(tmp_path / "own.jsonl", ROWS[:1])
    data = loaded(dataset_name=path, train_split="train[3:5]", validation_file=[str(own)])
    assert texts(data.train) == wanted(3, 4)
    assert texts(data.validation.examples) == wanted(0)


def test_several_files(tmp_path):
    for index, row in enumerate(ROWS):
        write_rows(tmp_path / f"{index}.jsonl", [row])
    Dataset.from_list(ROWS[:2]).to_csv(str(tmp_path / "some.csv"), index=False)
    data = loaded(
        train_file=[str(tmp_path / "[89].jsonl"), str(tmp_path / "3.jsonl")],
        validation_file=[str(tmp_path / "some.csv")],
        test_file=[str(tmp_path / "4.jsonl")],
    )
    assert texts(data.train) == wanted(8, 9, 3)
    assert texts(data.validation.examples) == wanted(0, 1)
    assert texts(data.test.examples) == wanted(4)


def test_a_test_set_that_is_to_be_left_is_not_even_opened(tmp_path):
    train = [str(write_rows(tmp_path / "train.jsonl", ROWS))]
    data = loaded(train_file=train, test_file=[str(tmp_path / "nowhere")], skip_test=True)
    assert data.test is None
    assert len(data.train) == 10
