"""Rows of a data set of any kind, which a collator makes batches of."""

from typing import Any

from addax_ds.data.train_rows import CollatedRows, row_length
from tests.support.tiny import tiny_tokenizer


def digest(rows: list[Any]) -> str:
    return CollatedRows(rows, list, row_length).digest


def test_rows_as_a_tokenizer_returns_them_have_a_digest_of_their_tokens():
    tokenizer = tiny_tokenizer()
    some, others = ([tokenizer(text) for text in texts] for texts in (("w1", "w2"), ("w1", "w3")))
    assert digest(some) == digest([dict(row) for row in some])
    assert digest(some) != digest(others)
    assert digest(some) != digest(some[::-1])
