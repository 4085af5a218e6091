"""Rows as others publish them are the messages and prompts that are written by hand here."""

import logging
from typing import Any

import pytest

from addax_ds.data.datasets import as_examples
from addax_ds.data.encoding import encode
from addax_ds.reading.records import Record, chat, prompt_completion, read_records
from addax_ds.reading.sources import open_rows
from addax_ds.utils.errors import UserError
from tests.reading.test_chat import TOOL, TOOLS
from tests.reading.test_records import CHATML, DIALOGUE, learnt, tokenizer_with
from tests.support.tiny import byte_tokenizer, write_rows

# As in train.py of Stanford Alpaca.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add {a}.\n\n### Input:\n1, 2\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nHi\n\n### Response:"
)
ALPACA = [
    {"instruction": "Add {a}.", "input": "1, 2", "output": "3"},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "input": None, "output": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
]


@pytest.fixture
def read(tmp_path):
    def read(rows: list[dict[str, Any]], template: str | None) -> list[Record]:
        path = write_rows(tmp_path / "rows", rows)
        return read_records(open_rows([str(path)]), tokenizer_with(template))

    return read


def test_alpaca_without_a_chat_template(read, caplog):
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        found = read([{**row, "id": 1} for row in ALPACA], None)
    prompts = [(WITH_INPUT, "3"), *[(WITHOUT_INPUT, "Hello")] * 3]
    wanted = [
        prompt_completion(*pair, row.origin) for pair, row in zip(prompts, found, strict=True)
    ]
    assert found == wanted
    (said, unused) = caplog.messages
    assert said.endswith(
        "written into Stanford Alpaca's prompt, as the tokenizer has no chat template"
    )
    assert unused.endswith("not used: id")


def test_alpaca_with_a_chat_template(read, caplog):
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        found = read(ALPACA, CHATML)
    asked = [("Add {a}.\n\n1, 2", "3"), *[("Hi", "Hello")] * 3]
    for record, (question, answer) in zip(found, asked, strict=True):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        assert record == chat(messages, tokenizer_with(CHATML), record.origin)
    (said,) = caplog.messages
    assert said.endswith("the user's message, in the tokenizer's chat template")


SPEAKERS = {"system": ["system"], "user": ["human", "user"], "tool": ["tool", "observation"]}
SPEAKERS["assistant"] = ["gpt", "assistant", "chatgpt", "bing", "bard"]


@pytest.mark.parametrize("shift", range(5))
def test_sharegpt_is_messages(read, shift):
    messages = [*DIALOGUE, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]
    turns = [
        {"from": (names := SPEAKERS[m["role"]])[shift % len(names)], "value": m["content"]}
        for m in messages
    ]
    turns[2]["weight"] = 0
    (found,) = read([{"conversations": turns, "tools": [TOOL]}], TOOLS)
    wanted = [m | ({"weight": 0} if i == 2 else {}) for i, m in enumerate(messages)]
    assert found == chat(wanted, tokenizer_with(TOOLS), found.origin, tools=[TOOL])
    assert len(learnt(found)) == 2
    assert read([{"conversations": wanted, "tools": [TOOL]}], TOOLS) == [found]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"conversations": [{"from": "gtp", "value": "a"}]}, r"\[0\]\.from is 'gtp'; expected one"),
        ({"conversations": [{"from": "GPT", "value": "a"}]}, r"Did you mean 'gpt'\?"),
        ({"conversations": [{"from": None, "value": "a"}]}, r"conversations\[0\]\.from is None;"),
        (
            {"conversations": [{"from": ["a"], "value": "a"}]},
            r"conversations\[0\]\.from is \['a'\]",
        ),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.content must be a string"),
        ({"conversations": ["a"]}, r"conversations\[0\] must be an object"),
        ({"conversations": "a"}, "conversations must be a non-empty list"),
        ({"instruction": "a", "output": ""}, "the output is empty"),
        ({"instruction": 1, "output": "a"}, "instruction must be a string, got a int"),
        ({"instruction": "a", "output": "a", "input": 2}, "input must be a string, got a int"),
        ({"instruction": "a", "output": ["a"]}, "output must be a string, got a list"),
        ({"prompt": [], "completion": DIALOGUE}, "prompt must be a non-empty list"),
        ({"prompt": DIALOGUE[:2], "completion": "a"}, "completion must be a non-empty list"),
        ({"prompt": "a", "completion": DIALOGUE}, "completion must be a string, got a list"),
    ],
)
def test_what_is_neither(read, row, says):
    with pytest.raises(UserError, match=rf"rows:1: .*{says}"):
        read([row], CHATML)


def test_a_conversation_and_its_continuation(read):
    rows = [{"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:], "tools": [TOOL]}]
    (found,) = read(rows, TOOLS)
    whole = chat(DIALOGUE, tokenizer_with(TOOLS), found.origin, tools=[TOOL])
    assert found.text == whole.text
    assert found.targets == whole.targets[1:]


def test_a_trainers_rows_have_the_same_shapes():
    """As lists of rows, and as the data set of Arrow that has a null for every missing key."""
    import datasets

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOLS
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        [{"prompt": DIALOGUE[:3], "completion": DIALOGUE[3:]}],
        [{"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]}],
        ALPACA[:2],
        [{"messages": [*DIALOGUE[:2], called, DIALOGUE[2]]}],
    ]
    records = [
        [chat(DIALOGUE, tokenizer, "")],
        [
            chat(
                [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
                tokenizer,
                "",
            )
        ],
        [
            chat(
                [{"role": "user", "content": a}, {"role": "assistant", "content": b}], tokenizer, ""
            )
            for a, b in (("Add {a}.\n\n1, 2", "3"), ("Hi", "Hello"))
        ],
        [chat(rows[3][0]["messages"], tokenizer, "")],
    ]
    for own, wanted in zip(rows, records, strict=True):
        examples, _ = encode(wanted, tokenizer, max_length=None, model_positions=None)
        for dataset in (own, datasets.Dataset.from_list(own)):
            found = as_examples(dataset, "train_dataset", tokenizer)
            assert [e.input_ids.tolist() for e in found] == [e.input_ids.tolist() for e in examples]
            assert found[0].origin == "train_dataset: row 0"
