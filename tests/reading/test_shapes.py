"""Which shape rows have, and columns of other names."""

import logging
from typing import Any

import pytest

from addax_ds.reading.records import Record, plain_text, prompt_completion, read_records
from addax_ds.reading.shapes import parse_columns
from addax_ds.reading.sources import open_rows
from addax_ds.utils.errors import UserError
from tests.reading.test_records import CHATML, DIALOGUE, tokenizer_with
from tests.support.tiny import write_rows

SQUAD = {"question": "Who?", "answer": " You", "context": "c", "id": 1}


@pytest.fixture
def read(tmp_path):
    def read(row: dict[str, Any], *columns: str) -> list[Record]:
        path = write_rows(tmp_path / "rows", [row, row])
        return read_records(
            open_rows([str(path)], columns=parse_columns(columns)), tokenizer_with(CHATML)
        )

    return read


def test_columns_get_other_names(read, caplog):
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        found = read(SQUAD, "prompt=question", "completion=answer")
    assert found == [prompt_completion("Who?", " You", record.origin) for record in found]
    (message,) = caplog.messages
    assert message.endswith("not used: context, id")
    assert read({"q": "Who?", "completion": " You"}, "prompt=q")[0].text == "Who? You"
    # A name that is taken goes to the column that is asked for, also if two change their names.
    assert read({"prompt": "b", "completion": "a"}, "prompt=completion", "completion=prompt")[
        0
    ] == prompt_completion("a", "b", found[0].origin)
    assert read({"a": "b=c", "b=c": "d"}, "text=b=c")[0].text == "d"


MANY = {
    "text": "t",
    "prompt": "p",
    "completion": "c",
    "messages": DIALOGUE,
    "instruction": "i",
    "output": "o",
}


def test_a_column_chooses_among_shapes(read):
    with pytest.raises(UserError, match=r"rows:1: .* several shapes .*--columns \w+=\w+ does"):
        read(MANY)
    assert read(MANY, "text=text")[0] == plain_text("t", read(MANY, "text=text")[0].origin)
    assert read(MANY, "prompt=prompt")[0].text == "pc"
    assert read(MANY, "messages=messages") == read({"messages": DIALOGUE})
    assert read(MANY, "messages=messages", "tools=nothing") == read({"messages": DIALOGUE})
    assert read(MANY, "output=output")[0].text.endswith("<|im_start|>assistant\no<|im_end|>\n")


def test_a_refusal_names_a_choice_that_works(read):
    row = {"text": "t", "messages": DIALOGUE}
    with pytest.raises(UserError) as raised:
        read(row)
    (choice,) = (word for word in str(raised.value).split() if "=" in word)
    assert read(row, choice) == read({"messages": DIALOGUE})


def test_columns_beside_a_shape_do_not_make_another(read):
    """Very common on the hub: the first message again, as a prompt."""
    assert read({"prompt": "one?", "prompt_id": "1", "messages": DIALOGUE})
    assert read({"text": "t", "input": "i", "tools": [], "instruction": "i"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["prompt"], "prompt: expected name=column, as prompt=question"),
        (["prompt="], "prompt=: expected name=column"),
        (["=a"], "=a: '' is no name that a column can get"),
        (["promt=a"], "'promt' is no name that a column can get. Did you mean 'prompt'"),
        (["prompt=a", "prompt=b"], "prompt=b: prompt is given twice"),
        (["prompt=a", "messages=b"], r"several shapes \(prompt \+ completion \| messages\)"),
    ],
)
def test_columns_that_cannot_be(words, says):
    with pytest.raises(UserError, match=says):
        parse_columns(words)


def test_a_column_that_is_not_there(read):
    says = r"rows:1: no column 'questoin', which --columns names as the prompt; found columns "
    with pytest.raises(UserError, match=says + r"\[answer, .*\]. Did you mean 'question'"):
        read(SQUAD, "prompt=questoin", "completion=answer")
    with pytest.raises(UserError, match="which fit none of the known shapes"):
        read(SQUAD, "prompt=question")
