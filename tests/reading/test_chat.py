"""What of a row of messages reaches the template and the loss; what is refused otherwise."""

import json
import locale
from datetime import datetime
from typing import Any

import pytest

from addax_ds.reading.records import chat
from addax_ds.utils.errors import UserError
from tests.reading.test_records import CHATML, DIALOGUE, learnt, read_jsonl, tokenizer_with
from tests.support.tiny import write_rows

# Writes tools, calls of them, and reasoning, as templates of models that have been taught them do.
TOOLS = (
    "{% if tools %}[TOOLS] {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEP = "{% if deep %}think hard\n{% endif %}" + CHATML
# Writes two roles only, and no other.
TWO_ROLES = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
)
DATED = "{{ strftime_now('%A, %d %B %Y, %H:%M %Z') }}\n" + CHATML
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKED = {"role": "user", "content": "one?"}
CALLED = [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


def record(messages: Any, template: str = TOOLS, **row: Any) -> Any:
    return chat(messages, tokenizer_with(template), "here", **row)


def weighted(*weights: Any) -> list[dict[str, Any]]:
    """The dialogue, its assistant's turns with these weights."""
    messages = [dict(message) for message in DIALOGUE]
    for index, weight in zip((2, 4), weights, strict=True):
        messages[index]["weight"] = weight
    return messages


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0, 1), ["2 \U0001f600<|im_end|>"]),
        ((1, 0), ["1<|im_end|>"]),
        ((0.0, None), ["2 \U0001f600<|im_end|>"]),
        ((None, 1.0), ["1<|im_end|>", "2 \U0001f600<|im_end|>"]),
    ],
)
def test_a_turn_of_weight_0_is_read_and_not_learnt(weights, expected):
    found = record(weighted(*weights))
    assert learnt(found) == expected
    assert found.text == record(DIALOGUE).text


def test_a_turn_of_weight_0_may_be_written_otherwise_later_and_come_first():
    """Only what is learnt has to be told apart."""
    forgets = TOOLS.replace("{% if m.reasoning_content", "{% if loop.last and m.reasoning_content")
    thought = {"role": "assistant", "content": "1", "reasoning_content": "hm", "weight": 0}
    last = [ASKED, {"role": "assistant", "content": "2", "reasoning_content": "well"}]
    found = record([thought, *last], forgets)
    assert learnt(found) == ["<think>well</think>2<|im_end|>"]
    assert "hm" not in found.text


def test_tools_and_calls_reach_the_template(tmp_path):
    answered = [*CALLED, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]
    tokenizer = tokenizer_with(TOOLS)
    expected = tokenizer.apply_chat_template(answered, tools=[TOOL], tokenize=False)
    assert expected.startswith('[TOOLS] [{"type": "function", "function": {"name": "add"')
    rows = [{"messages": answered, "tools": tools} for tools in ([TOOL], json.dumps([TOOL]))]
    for found in read_jsonl(write_rows(tmp_path / "rows.jsonl", rows), tokenizer):
        assert found.text == expected
        call = json.dumps(CALL["function"])
        assert learnt(found) == [f"<call>{call}</call><|im_end|>", "3<|im_end|>"]


@pytest.mark.parametrize("tools", [None, [], "[]", "null"])
def test_a_row_without_tools(tools):
    assert record(DIALOGUE, tools=tools) == record(DIALOGUE)


def test_variables_of_the_template_reach_it(tmp_path, caplog):
    row = {"messages": DIALOGUE, "chat_template_kwargs": {"deep": True}, "id": 3}
    with caplog.at_level("INFO", logger="addax_ds"):
        (found,) = read_jsonl(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer_with(DEEP))
    assert found.text.startswith("think hard\n<|im_start|>system")
    documents = {"chat_template_kwargs": {"documents": [{"title": "a"}]}, "messages": DIALOGUE}
    template = "{{ documents[0].title }}\n" + CHATML
    path = write_rows(tmp_path / "more.jsonl", [documents])
    assert next(iter(read_jsonl(path, tokenizer_with(template)))).text.startswith("a\n<|im_start|>")
    assert learnt(found) == learnt(record(DIALOGUE))
    (message,) = caplog.messages
    assert message.endswith("not used: id")


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        # What the template leaves out.
        (CHATML, {"messages": CALLED}, r"writes nothing of messages\[1\]\.tool_calls;"),
        (
            CHATML,
            {"messages": [ASKED, {**CALLED[1], "content": "wait"}]},
            r"writes nothing of messages\[1\]\.tool_calls; use a model whose template does",
        ),
        (
            CHATML,
            {"messages": [ASKED, {"role": "assistant", "content": "1", "thinking": "hm"}]},
            r"nothing of messages\[1\]\.thinking;",
        ),
        (CHATML, {"messages": DIALOGUE, "tools": [TOOL]}, "writes nothing of tools;"),
        (TWO_ROLES, {"messages": DIALOGUE}, r"writes nothing of messages\[0\]\.content;"),
        # What is not what it should be.
        (TOOLS, {"messages": DIALOGUE, "tools": {"a": 1}}, "tools must be a list of objects"),
        (TOOLS, {"messages": DIALOGUE, "tools": ["add"]}, "tools must be a list of objects"),
        (TOOLS, {"messages": DIALOGUE, "tools": "[add"}, "tools is a string that is not JSON"),
        (DEEP, {"messages": DIALOGUE, "chat_template_kwargs": [1]}, "must be an object, got a l"),
        (
            DEEP,
            {"messages": DIALOGUE, "chat_template_kwargs": {"tokenize": True}},
            r"chat_template_kwargs\.tokenize is no variable of the chat template",
        ),
        (TOOLS, {"messages": weighted(0, 0)}, "no turn of the role 'assistant' to learn from"),
        (TOOLS, {"messages": weighted(1, 0.5)}, r"messages\[4\]\.weight must be 0 or 1, got 0.5"),
        (TOOLS, {"messages": weighted(1, "0")}, r"messages\[4\]\.weight must be .*, got \"0\""),
        (
            TOOLS,
            {"messages": [{**ASKED, "weight": 1}, *DIALOGUE]},
            r"messages\[0\]\.weight is 1, but only the assistant's turns are learnt",
        ),
        (
            TOOLS,
            {"messages": [ASKED, {"role": "assistant", "content": "1", "train": False}]},
            r'messages\[1\]\.train is not known here: a turn .* has "weight": 0',
        ),
        (
            TOOLS,
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            r"messages\[1\]\.content must be a string, got a NoneType",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(template, row, says, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": DIALOGUE[1:]}, row])
    with pytest.raises(UserError, match=says) as raised:
        read_jsonl(path, tokenizer_with(template))
    assert str(raised.value).startswith(f"{path}:2: ")


def test_a_template_reads_the_moment_that_it_is_given(monkeypatch):
    """Wherever and whenever it is rendered, and however the program spells the days."""
    monkeypatch.setattr(locale, "setlocale", spelling := Spelling())
    moment = datetime(2024, 2, 29, 23, 59)
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    found = record(DIALOGUE, DATED, now=moment)
    assert found.text.startswith("Thursday, 29 February 2024, 23:59 \n<|im_start|>")
    assert spelling.set == ["C", "de_DE"]
    today = record(DIALOGUE, DATED).text.partition("\n")[0]
    assert str(datetime.now().year) in today


def test_the_clock_stands_still_within_a_conversation():
    """Or a turn would not be found in a text of a microsecond later."""
    found = record(DIALOGUE, "{{ strftime_now('%f') }}\n" + CHATML)
    assert learnt(found) == learnt(record(DIALOGUE))


class Spelling:
    """A program's locale, which need not be installed."""

    def __init__(self) -> None:
        self.set: list[str] = []

    def __call__(self, category: int, value: str | None = None) -> str:
        assert category == locale.LC_TIME
        if value is None:
            return "de_DE"
        self.set.append(value)
        return value


def test_a_role_that_the_template_spells_reaches_it():
    """And no other name of it, nor one that is a part of a word there."""
    seen = [{"role": "observation", "content": "3"}, *DIALOGUE]
    spelling = CHATML.replace("{{ m.role }}", "{{ m.role if m.role != 'observation' else 'seen' }}")
    found = record(seen, spelling)
    assert found.text == f"<|im_start|>seen\n3<|im_end|>\n{record(DIALOGUE, CHATML).text}"
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": spelling, "tool_use": CHATML}
    assert chat(seen, tokenizer, "here").text == found.text
    for role in ("observations", "serve"):
        with pytest.raises(UserError, match=rf"here: messages\[0\]\.role is '{role}', which"):
            record([{**seen[0], "role": role}, *DIALOGUE], spelling)


def test_messages_before_are_read_and_not_learnt():
    found = record(DIALOGUE[3:], column="completion", before={"prompt": DIALOGUE[:3]})
    assert found.text == record(DIALOGUE).text
    assert learnt(found) == ["2 \U0001f600<|im_end|>"]
    with pytest.raises(UserError, match=r"here: completion: no turn of the role 'assistant'"):
        record(DIALOGUE[3:4], column="completion", before={"prompt": DIALOGUE[:3]})
    with pytest.raises(UserError, match=r"here: completion\[1\]\.content must be a string"):
        record(
            [DIALOGUE[3], {"role": "assistant", "content": 1}],
            column="completion",
            before={"prompt": DIALOGUE[:3]},
        )
