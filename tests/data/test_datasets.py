"""Rows of tokens as examples: which of them carry loss, and what is not used."""

import logging

import datasets
import pytest

from addax_ds.data.datasets import as_examples

IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({}, [5, 6, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, [-100, -100, 7, 8]),
        ({"assistant_masks": [0, 1, 0, 1]}, [-100, 6, -100, 8]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 0, 1]}, [-100, -100, -100, 8]),
        ({"completion_mask": [False, True, False, False]}, [-100, 6, -100, -100]),
        # Labels have been made of the masks, and maybe more.
        ({"completion_mask": [0, 0, 1, 1], "labels": [5, 6, 7, -100]}, [5, 6, 7, -100]),
        ({"completion_mask": [0, 0, 1, 1], "labels": None}, [-100, -100, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1], "attention_mask": [0, 1, 1, 1]}, [-100, 7, 8]),
    ],
)
def test_what_of_a_token_row_is_learnt(columns, labels):
    rows = [{"input_ids": IDS, **columns}] * 2
    for dataset in (rows, datasets.Dataset.from_list(rows).with_format("numpy")):
        for example in as_examples(dataset, "train_dataset", None):
            assert example.labels.tolist() == labels
            assert example.input_ids.tolist() == IDS[-len(labels) :]


def test_columns_of_token_rows_that_are_not_used_are_named_once(caplog):
    row = {"input_ids": IDS, "attention_mask": [1] * 4, "labels": IDS, "completion_mask": None}
    others = {"label": [-100, 6, 7, 8], "prompt": "w5", "assistant_masks": [1] * 4}
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        as_examples([row] * 3, "train_dataset", None)
        assert not caplog.text
        as_examples([row, row | others, row | others], "train_dataset", None)
    (record,) = caplog.records
    said = "train_dataset: columns that are not used: assistant_masks, label, prompt"
    assert record.getMessage() == said
