"""Reading JSON Lines: what each shape of row yields, and a sentence for every bad input."""

import json
import logging

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from addax_ds.reading.records import Record, chat, plain_text, prompt_completion, read_records
from addax_ds.reading.sources import open_rows
from addax_ds.utils.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Refuses two turns of a role in a row, and closes only the assistant's turns.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_MARK = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
# Like templates of reasoning models: what an assistant's turn looks like depends on what follows.
FORGETS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think>"
    "{% endif %}{{ m.content }}\n{% endfor %}"
)
DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 \U0001f600"},
]


def tokenizer_with(template):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = template
    return tokenizer


def read_jsonl(path, tokenizer, **options):
    return read_records(open_rows([str(path)]), tokenizer, **options)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "train.jsonl"
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def learnt(record):
    return [record.text[start:end] for start, end in record.targets]


def test_prompt_completion_rows(write):
    path = write(
        '{"prompt": "a film It was", "completion": " great"}\n\n  \n'
        '{"completion": "x", "prompt": ""}'
    )
    first, second = read_jsonl(path, tokenizer_with(None))
    assert first == Record("a film It was great", ((13, 19),), f"{path}:1", True, True)
    assert second.text == "x"
    assert learnt(second) == ["x"]
    assert second.origin == f"{path}:4"  # blank lines are skipped but counted


def test_text_rows_carry_loss_everywhere(write):
    # A byte-order mark, Windows line ends and U+2028 (a line break to str.splitlines).
    path = write("\ufeff" + '{"text": "caf\u00e9 \u2028 \U0001f600"}\r\n{"text": "b"}\r\n')
    records = read_jsonl(path, tokenizer_with(None), append_eos=False)
    assert [record.text for record in records] == ["caf\u00e9 \u2028 \U0001f600", "b"]
    assert [learnt(record) for record in records] == [[record.text] for record in records]
    assert not any(record.append_eos for record in records)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["1<|im_end|>", "2 \U0001f600<|im_end|>"]),  # without the newline after the mark
        (NO_MARK, ["assistant: 1\n\n", "assistant: 2 \U0001f600\n\n"]),  # the newlines are the mark
    ],
)
def test_chat_learns_the_assistants_turns_only(write, template, expected):
    (record,) = read_jsonl(write([{"messages": DIALOGUE}]), tokenizer_with(template))
    assert learnt(record) == expected
    assert not record.add_special_tokens
    assert not record.append_eos


def test_chat_includes_the_end_of_turn_token_of_the_template():
    record = chat(DIALOGUE[1:], tokenizer_with(INSTRUCT), "here")
    assert record.text == "<s>[INST] one? [/INST] 1</s>[INST] two? [/INST] 2 \U0001f600</s>"
    assert learnt(record) == [" 1</s>", " 2 \U0001f600</s>"]


def test_extra_columns_are_ignored_and_named_once(write, caplog):
    rows = [
        {"text": "a", "id": 1, "prompt": None},
        {"text": "b", "label": [2]},
        {"text": "c", "id": 3},
    ]
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        assert len(read_jsonl(write(rows), tokenizer_with(None))) == 3
    (message,) = caplog.messages
    assert message.endswith("not used: id, label, prompt")


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("", None, "no rows"),
        ("\n \n", None, "no rows"),
        (GOOD.encode() + b'{"prompt": "\xff"}', 2, "not UTF-8"),
        (GOOD.encode("utf-16"), 1, "not UTF-8"),
        (GOOD + '{"prompt": "a", "compl', 2, "not valid JSON"),
        (GOOD + GOOD.strip() + GOOD, 2, "not valid JSON"),  # two objects on a line
        (GOOD + "9" * 5000, 2, "not valid JSON"),  # more digits than Python converts
        (GOOD + "[" * 100_000, 2, "not valid JSON"),  # deeper than Python recurses
        ("[\n" + GOOD + "]", 1, "one object a line"),
        (GOOD + '["a", "b"]', 2, "got a list"),
        (
            '{"sentence": "a", "label": 1}',
            1,
            r"\[label, sentence\].*prompt \+ completion.*messages",
        ),
        ('{"prompt": "a"}', 1, r"\[prompt\]"),
        ("{}", 1, "known shapes"),
        (GOOD + '{"prompt": "a", "answer": "b"}', 2, r"no completion.*\[answer, prompt\]"),
        (GOOD + '{"prompt": "a", "completion": null}', 2, "no completion"),
        (GOOD + '{"text": "a"}', 2, "no prompt and no completion"),
        ('{"prompt": "a", "completion": "b", "text": "c"}', 1, "several shapes"),
        (GOOD + '{"prompt": "a", "completion": "b", "text": "c"}', 2, "several shapes"),
        ('{"prompt": "a", "completion": 3}', 1, "completion must be a string, got a int"),
        ('{"prompt": ["a"], "completion": "b"}', 1, r"prompt\[0\] must be an object, got a str"),
        ('{"text": {"a": 1}}', 1, "text must be a string, got a dict"),
        ('{"prompt": "a", "completion": ""}', 1, "completion is empty"),
        ('{"text": ""}', 1, "text is empty"),
        ('{"text": "a", "text": "b"}', 1, "duplicate keys: text"),
        ('{"text": "a", "meta": {"k": 1, "k": 2}}', 1, "duplicate keys: k"),
        ('{"text": "half \\ud800"}', 1, "surrogate"),
        ('{"text": "a", "x": NaN}', 1, "NaN is not a JSON number"),
        (GOOD + '{"prompt": "a", "completion": "b\n"}', 2, r"not valid JSON \(column 33: "),
        ("\ufeff" + GOOD + "\ufeff" + GOOD, 2, "Unexpected UTF-8 BOM"),  # two files in one
        (GOOD.replace("\n", "\r") * 2, 1, "not valid JSON"),
    ],
)
def test_bad_input_names_file_line_and_fault(write, content, line, says):
    path = write(content)
    with pytest.raises(UserError, match=says) as raised:
        read_jsonl(path, tokenizer_with(CHATML))
    place = f"{path}:" if line is None else f"{path}:{line}: "
    assert str(raised.value).startswith(place)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hi", "non-empty list"),
        ([], "non-empty list"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "hi"}], r"messages\[0\].role must be a string"),
        ([{"role": "user", "content": [1]}], r"messages\[0\].content must be a string, got a list"),
        ([{"role": "user", "content": "hi"}], "no turn of the role 'assistant'"),
        ([{"role": "assistant", "content": "hi"}], r"messages\[0\] is the assistant's"),
        ([*DIALOGUE[:2], {"role": "assistant", "content": ""}], r"messages\[2\].*is empty"),
        # Turns that would be rendered, and never learnt.
        ([*DIALOGUE, {"role": "asistant", "content": "x"}], r"messages\[5\].role is 'asistant'"),
        ([*DIALOGUE, {"role": "Assistant", "content": "x"}], "Did you mean 'assistant'"),
        ([*DIALOGUE, {"role": "assistant ", "content": "x"}], "Did you mean 'assistant'"),
        ([*DIALOGUE, {"role": " ", "content": "x"}], r"messages\[5\].role is empty"),
        ([*DIALOGUE, {"role": "gpt", "content": "x"}], "is 'gpt'. Did you mean 'assistant'"),
        ([*DIALOGUE, {"role": "Model", "content": "x"}], "is 'Model'. Did you mean 'assistant'"),
        # A template may write any role; only a model that was trained on it knows it.
        (
            [{"role": "human", "content": "x"}, *DIALOGUE],
            r"messages\[0\].role is 'human', which the tokenizer's chat template does not know",
        ),
        ([*DIALOGUE, {"role": "critic", "content": "x"}], "is 'critic', .* expected one of assis"),
    ],
)
def test_bad_messages(write, messages, says):
    path = write([{"messages": DIALOGUE}, {"messages": messages}])
    with pytest.raises(UserError, match=says) as raised:
        read_jsonl(path, tokenizer_with(CHATML))
    assert str(raised.value).startswith(f"{path}:2: ")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl: there is no such file"):
        read_jsonl(tmp_path / "nothing.jsonl", tokenizer_with(None))
    with pytest.raises(UserError, match="no files of rows there"):
        read_jsonl(tmp_path, tokenizer_with(None))


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (None, DIALOGUE, "tokenizer has none"),
        (INSTRUCT, DIALOGUE, "roles must alternate"),
        (FORGETS, DIALOGUE, r"messages\[2\] differently when later text follows"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", DIALOGUE, "refuses the messages: Range too"),
        ("{{ 1 // 0 }}", DIALOGUE, "refuses the messages: integer division"),
        ("hello", DIALOGUE, r"writes nothing for messages\[2\]"),
    ],
)
def test_chat_templates_that_cannot_serve(write, template, messages, says):
    path = write([{"messages": messages}])
    with pytest.raises(UserError, match=says) as raised:
        read_jsonl(path, tokenizer_with(template))
    assert str(raised.value).startswith(f"{path}:1: ")


def test_records_made_by_a_task():
    record = prompt_completion("a film It was", " great", "sst2:7", append_eos=False)
    assert record == Record("a film It was great", ((13, 19),), "sst2:7", True, False)
    text = Record("abc", ((0, 3),), "here", True, True, may_split=True)
    assert plain_text("abc", "here") == text
    with pytest.raises(UserError, match="sst2:7: the completion is empty"):
        prompt_completion("a", "", "sst2:7")
