"""Thousands of data files, good and broken, against a reading of their bytes that is written here.

A good file gives the rows that this reading finds. A broken one is a `UserError` that starts with
the file and the first bad line, whatever is wrong with it; nothing else may happen.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from addax_ds.data.encoding import encode
from addax_ds.data.examples import NO_LOSS
from addax_ds.reading import text_files
from addax_ds.reading.records import prompt_completion
from addax_ds.utils.errors import UserError
from tests.data.test_encoding import word_level
from tests.reading.test_records import CHATML, INSTRUCT, NO_MARK, read_jsonl, tokenizer_with
from tests.support.fuzz import FINITE_JSON, JSON, TEXT, fuzzed, outcome

COLUMNS = ("prompt", "completion", "messages", "text")
SHAPES = (("prompt", "completion"), ("text",))


class Bad(Exception):
    """Raised by the reading below with the number of the first line that cannot be used."""


def parsed(line: bytes) -> dict[str, Any]:
    def pairs(found):
        assert len({key for key, _ in found}) == len(found)
        return dict(found)

    def constant(name):
        raise AssertionError(name)

    row = json.loads(line.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    assert type(row) is dict
    return row


def reading(content: bytes) -> list[tuple[int, str, str]]:
    """Line, prompt and completion ("" and text) of every row of a file without messages."""
    shape, rows = None, []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
            given = {key: row[key] for key in COLUMNS if row.get(key) is not None}
            fits = [s for s in SHAPES if set(s) <= given.keys()]
            fits += [("messages",)] if "messages" in given else []
            shape = shape or fits[0]
            assert fits == [shape]
            values = [given[key] for key in shape]
            assert all(type(value) is str for value in values)
            assert values[-1]
            "".join(values).encode("utf-8")
        except (AssertionError, ValueError, IndexError, RecursionError) as error:
            raise Bad(number) from error
        rows.append((number, *(values if len(values) == 2 else ["", values[0]])))
    return rows


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rows.jsonl"


def check(path: Path, content: bytes) -> None:
    """Compare what `read_jsonl` makes of a file with what `reading` finds in it."""
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_CHUNK", 5)  # so that lines go over the ends of reads
        compare(path, content)


def compare(path: Path, content: bytes) -> None:
    try:
        expected, first_bad = reading(content), None
    except Bad as bad:
        expected, first_bad = [], int(str(bad))
    if not expected:
        with pytest.raises(UserError) as raised:
            read_jsonl(path, tokenizer_with(CHATML))
        message = str(raised.value)
        place = "there are no rows" if first_bad is None else ""
        assert message.startswith(f"{path}: {place}" if place else f"{path}:{first_bad}: ")
        assert len(message) < 2000
        assert message.isprintable()
        return
    records = read_jsonl(path, tokenizer_with(CHATML))
    assert len(records) == len(expected)
    for record, (number, prompt, completion) in zip(records, expected, strict=True):
        assert record.text == prompt + completion
        assert [record.text[a:b] for a, b in record.targets] == [completion]
        assert record.origin == f"{path}:{number}"


LEARNT = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())
EXTRA = st.dictionaries(TEXT.filter(lambda key: key not in COLUMNS), FINITE_JSON, max_size=2)
ROWS = {
    "prompt + completion": st.fixed_dictionaries(
        {"prompt": LEARNT, "completion": LEARNT.filter(bool)}
    ),
    "text": st.fixed_dictionaries({"text": LEARNT.filter(bool)}),
}


@st.composite
def written(draw: Any, rows: Any = None, least: int = 1) -> list[bytes]:
    """Lines of a good file, in the spellings that JSON has for the same rows; some are blank."""
    if rows is None:
        rows = ROWS[draw(st.sampled_from(sorted(ROWS)))]
    lines = []
    for row in draw(st.lists(st.tuples(EXTRA, rows), min_size=least, max_size=4)):
        text = json.dumps(
            {**row[0], **row[1]},
            ensure_ascii=draw(st.booleans()) or bool(re.search("[\ud800-\udfff]", repr(row))),
            separators=draw(st.sampled_from([(",", ":"), (" , ", " :\t")])),
            sort_keys=draw(st.booleans()),
        )
        lines.append(
            text.encode("utf-8", "surrogatepass") + draw(st.sampled_from([b"", b"\r", b" "]))
        )
        lines += draw(st.lists(st.sampled_from([b"", b"  ", b"\r"]), max_size=1))
    return lines


@fuzzed(150)
@given(written(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.sampled_from([b"", b"\n", b"\n\n"]))
def test_good_files_give_their_rows(path, lines, mark, end):
    content = mark + b"\n".join(lines) + end
    try:
        reading(content)
    except Bad:  # an extra column with half a surrogate pair that was not escaped, say
        assume(False)
    check(path, content)


@fuzzed(200)
@given(written(least=2), st.data())
@pytest.mark.slow
def test_files_with_changed_bytes(path, lines, data):
    """A few bytes are removed, put in or replaced anywhere."""
    content = bytearray(b"\n".join(lines))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.integers(0, 3))
        content[start:end] = data.draw(
            st.binary(max_size=3)
            | st.sampled_from(
                [b'"', b"{", b"}", b"\n", b"\r", b",", b"NaN", b"\xed\xa0\x80", b"\0"]
            )
        )
    check(path, bytes(content))


def cut(line: bytes, at: float) -> bytes:
    return line[: 1 + int(at * (len(line.rstrip()) - 2))]


BAD_LINES = {
    "cut": st.floats(0, 1).map(lambda at: cut(b'{"prompt": "abc", "completion": "d"}', at)),
    "any JSON": JSON.map(lambda value: json.dumps(value).encode()),
    "any columns": st.dictionaries(st.sampled_from(COLUMNS), JSON).map(
        lambda row: json.dumps(row).encode()
    ),
    "bytes": st.binary(min_size=1, max_size=20),
    "a column twice": st.sampled_from(COLUMNS).map(
        lambda name: f'{{"prompt": "a", "completion": "b", "{name}": "c", "{name}": "c"}}'.encode()
    ),
    "another value": st.tuples(st.sampled_from(["prompt", "completion"]), JSON).map(
        lambda change: json.dumps({"prompt": "a", "completion": "b", change[0]: change[1]}).encode()
    ),
    "nothing to learn": TEXT.map(
        lambda text: json.dumps({"prompt": text, "completion": ""}).encode()
    ),
    "one shape more": st.tuples(st.sampled_from(["text", "messages"]), JSON).map(
        lambda more: json.dumps({"prompt": "a", "completion": "b", more[0]: more[1]}).encode()
    ),
    "brackets": st.integers(1, 5000).map(lambda n: b'{"x": ' + b"[" * n + b"]" * n + b"}"),
    "digits": st.integers(1, 6000).map(
        lambda n: b'{"prompt": "", "completion": ' + b"1" * n + b"}"
    ),
    "not a number": st.sampled_from([b"NaN", b"Infinity", b"-Infinity"]).map(
        lambda name: b'{"prompt": "a", "completion": "b", "x": ' + name + b"}"
    ),
    "half a pair": st.sampled_from([b"\\ud800", b"\\udfff", b"\xed\xa0\x80", b"\\ud83d x"]).map(
        lambda half: b'{"prompt": "' + half + b'", "completion": "b"}'
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
@fuzzed(60)
@given(lines=written(ROWS["prompt + completion"], least=2), data=st.data())
@pytest.mark.slow
def test_one_bad_line_among_good_ones(path, kind, lines, data):
    lines.insert(data.draw(st.integers(1, len(lines))), data.draw(BAD_LINES[kind]))
    check(path, b"\n".join(lines))


# ---- chat ----------------------------------------------------------------------------------------

ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "function"])
WORDS = st.text("ab \u00e9", min_size=1, max_size=5).map(lambda text: f"x{text}")
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": WORDS})
ANY_MESSAGE = st.one_of(
    MESSAGE,
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLES
            | st.sampled_from(["Assistant", "asistant", "assistant ", "users", "", " "])
            | JSON,
            "content": WORDS | JSON,
            "tool_calls": JSON,
        },
    ),
    JSON,
)


@fuzzed(150)
@given(st.lists(MESSAGE, max_size=6))
def test_conversations_learn_what_the_assistant_says(path, messages):
    path.write_text(json.dumps({"messages": messages}) + "\n")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles or roles[0] == "assistant":
        with pytest.raises(UserError, match=re.escape(f"{path}:1: messages")):
            read_jsonl(path, tokenizer_with(CHATML))
        return
    (record,) = read_jsonl(path, tokenizer_with(CHATML))
    parts = [(f"<|im_start|>{m['role']}\n", f"{m['content']}<|im_end|>", "\n") for m in messages]
    assert record.text == "".join(map("".join, parts))
    expected = [parts[i][1] for i, role in enumerate(roles) if role == "assistant"]
    assert [record.text[a:b] for a, b in record.targets] == expected


@pytest.mark.parametrize("template", [CHATML, INSTRUCT, NO_MARK, "{{ messages|tojson }}"])
@fuzzed(100)
@given(messages=st.lists(ANY_MESSAGE, max_size=4) | JSON)
def test_any_messages(path, template, messages):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text(f"{json.dumps(good)}\n{json.dumps({'messages': messages})}\n")
    tokenizer = tokenizer_with(template)
    record, refusal = outcome(lambda: read_jsonl(path, tokenizer)[-1])
    if record is None:
        line = 1 if "tojson" in template else 2  # this one has no prefixes
        assert refusal.startswith(f"{path}:{line}: ")
        return
    for message in messages:
        assert type(message["role"]) is type(message["content"]) is str
        assert message["role"].strip().lower() in ("assistant", "user", "system", "tool") or (
            "assist" not in message["role"].lower()
        )
        assert message["role"] == message["role"].strip() or "assist" not in message["role"]
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(record.targets) == len(said) > 0
    for (start, end), content in zip(record.targets, said, strict=True):
        assert content.strip() in record.text[start:end]


# ---- tokens --------------------------------------------------------------------------------------

TOKENIZERS = {"plain": word_level(), "bos": word_level("<s> $A")}


@fuzzed(300)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(0, 12),
    st.integers(1, 6),
    st.booleans(),
    st.none() | st.integers(-1, 20),
    st.none() | st.integers(1, 20),
)
def test_truncation(kind, prompt, completion, eos, max_length, positions):
    """Against the same arithmetic on lists of words."""
    words = [f"{['a', 'great', 'film', 'It', 'was'][i % 5]} " for i in range(prompt + completion)]
    record = prompt_completion("".join(words[:prompt]), "".join(words[prompt:]), "f:7", eos)
    tokenizer = TOKENIZERS[kind]
    head = ["<s>"] if kind == "bos" else []
    body = [word.strip() for word in words[:prompt]]
    tail = [word.strip() for word in words[prompt:]] + ["</s>"] * eos
    limit = positions if max_length is None else max_length
    asked = max_length is not None
    kept = body if limit is None or not asked else body[max(len(head + body + tail) - limit, 0) :]
    length = len(head + kept + tail)
    good = limit is None or length <= limit
    good = good and not (
        asked and (max_length < 2 or (positions is not None and limit > positions))
    )
    good = good and len(head + kept + tail) > 1  # something comes before, and predicts
    if asked and not head and prompt and not kept:
        good = False  # a target would be left in front
    limits = {"max_length": max_length, "model_positions": positions}
    example, refusal = outcome(lambda: encode([record], tokenizer, **limits)[0][0])
    assert good == (example is not None), refusal
    if example is None:
        assert refusal.startswith(("f:7: ", "--max_length "))
        return
    expected = tokenizer.convert_tokens_to_ids(head + kept + tail)
    assert example.input_ids.tolist() == expected
    first = len(head + kept)
    assert example.labels.tolist() == [NO_LOSS] * first + expected[first:]


def test_tokens_that_the_model_lacks():
    record = prompt_completion("a great", " film", "f:7")
    tokenizer = TOKENIZERS["plain"]
    largest = max(tokenizer(record.text)["input_ids"])
    for size, good in ((largest + 1, True), (largest, False)):
        if good:
            encode([record], tokenizer, max_length=None, model_positions=9, vocabulary_size=size)
        else:
            with pytest.raises(UserError, match=rf"^f:7: .* token {largest} .* for {size}"):
                encode(
                    [record], tokenizer, max_length=None, model_positions=9, vocabulary_size=size
                )


def test_a_tokenizer_that_fails_names_the_row():
    class Failing:
        is_fast, eos_token_id, bos_token_id = True, 2, None

        def __call__(self, texts, **options):
            if any("boom" in text for text in texts):
                raise Exception("no such piece")
            return TOKENIZERS["plain"](texts, **options)

    records = [prompt_completion("a", f" {word}", f"f:{i}") for i, word in enumerate("abc")]
    assert len(encode(records, Failing(), max_length=None, model_positions=9)[0]) == 3
    records.append(prompt_completion("a", " boom", "f:9"))
    with pytest.raises(UserError, match=r"^f:9: the tokenizer fails: no such piece"):
        encode(records, Failing(), max_length=None, model_positions=9)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_long_lines(path):
    """Ten megabytes in one string, one name, many names, no object: no hang, and short messages."""
    good = b'{"text": "a"}\n'
    ten = 10_000_000
    long = b'{"text": "' + (b"w" * 999 + b" ") * (ten // 1000) + b'"}'
    path.write_bytes(good + long)
    records = read_jsonl(path, tokenizer_with(None))
    assert len(records[1].text) == ten
    with pytest.raises(UserError, match=re.escape(f"{path}:2: 10001 tokens, more than")):
        encode(records[1:], TOKENIZERS["plain"], max_length=None, model_positions=2048)
    names = b", ".join(b'"%d": 0' % i for i in range(ten // 100))
    for line, says in (
        (b'{"' + b"k" * ten + b'": 1}', "no text"),
        (b'{"text": "a", ' + names + b', "7": 1}', "duplicate keys: 7"),
        (b"{" + names + b"}", "no text"),
        (long[:-2], "not valid JSON"),
        (b"\xff" * ten, "not UTF-8"),
        (b"[" * ten, "not valid JSON"),
        (b'{"text": "' + b"\0" * ten, "not valid JSON"),
        (b'{"text": "' + b"a" * (64 << 20) + b'"}', "longer than 64 MiB"),
    ):
        path.write_bytes(good + line)
        with pytest.raises(UserError, match=says) as raised:
            read_jsonl(path, tokenizer_with(None))
        assert str(raised.value).startswith(f"{path}:2: ")
        assert len(str(raised.value)) < 2000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["pipe", "device", "null byte", "long name", "not to be read"])
def test_what_is_not_a_file(kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "null byte":
        path = tmp_path / "a\0b"
    elif kind == "long name":
        path = tmp_path / ("a" * 5000)
    else:
        path.write_text('{"text": "a"}')
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read it")
    with pytest.raises(UserError, match=r"regular file|no such file|cannot be opened") as raised:
        read_jsonl(path, tokenizer_with(None))
    assert len(str(raised.value)) < 1000


def test_reading_that_fails_on_the_way():
    with pytest.raises(UserError, match=r"/proc/self/mem:1: the file cannot be read"):
        read_jsonl("/proc/self/mem", tokenizer_with(None))
