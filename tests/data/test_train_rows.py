"""Rows of a data set of any kind, which a collator makes batches of."""

from typing import Any

import datasets
import pandas
import pytest

from addax_ds.data.train_rows import CollatedRows, check_map_style, row_length
from addax_ds.utils.errors import UserError
from tests.support.tiny import tiny_tokenizer


def digest(rows: list[Any]) -> str:
    return CollatedRows(rows, list, row_length).digest


def test_rows_as_a_tokenizer_returns_them_have_a_digest_of_their_tokens():
    tokenizer = tiny_tokenizer()
    some, others = ([tokenizer(text) for text in texts] for texts in (("w1", "w2"), ("w1", "w3")))
    assert digest(some) == digest([dict(row) for row in some])
    assert digest(some) != digest(others)
    assert digest(some) != digest(some[::-1])


COLUMNS = {"prompt": ["w1", "w2"], "completion": ["w3", "w4"]}


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (pandas.DataFrame(COLUMNS), r"a DataFrame of pandas; .* give datasets.Dataset.from_pandas"),
        (COLUMNS, r"a dict of \[completion, prompt\]; .* give datasets.Dataset.from_dict"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS)),
            r"a DatasetDict of \[train\]; .* if splits, one of them",
        ),
        (iter([]), "a list_iterator, whose rows come one after the other; streams need a data set"),
    ],
)
def test_what_is_not_map_style_is_told_how_to_become_so(dataset, said):
    with pytest.raises(UserError, match=f"the data is {said}"):
        check_map_style(dataset, "the data", "streams need")


def test_map_style_rows_of_any_kind():
    rows = [{"text": "w1"}, {"text": "w2"}]
    for dataset in (rows, dict(enumerate(rows)), datasets.Dataset.from_list(rows)):
        check_map_style(dataset, "the data", "streams need")
