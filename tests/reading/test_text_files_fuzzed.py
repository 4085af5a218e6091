"""Tables and arrays, good and broken, against the rows that they were written from."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addax_ds.reading.sources import open_rows
from tests.support.fuzz import FINITE_JSON, TEXT, fuzzed, outcome

FIELD = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())
TABLE = st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=5)
OBJECTS = st.lists(st.dictionaries(TEXT, FINITE_JSON, max_size=3), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    path.write_bytes(content)
    rows = open_rows([str(path)])
    found = list(rows.read(0, len(rows)))
    assert [list(rows.read(i, i + 1)) for i in range(len(rows))] == [[row] for row in found]
    return found


def table(rows: list[tuple[str, str]], delimiter: str, line_end: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    return text.getvalue().encode()


@fuzzed(150)
@given(TABLE, st.sampled_from(["csv", "tsv"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_tables(folder, rows, ending, line_end, mark):
    path = folder / f"rows.{ending}"
    content = table(rows, "," if ending == "csv" else "\t", line_end)
    found = read(path, b"\xef\xbb\xbf" * mark + content)
    assert [row for _, row in found] == [{"a": a, "b": b} for a, b in rows]
    line = 2
    for (origin, _), fields in zip(found, rows, strict=True):
        assert origin == f"{path}:{line}"
        line += 1 + sum(field.count("\n") for field in fields)


@fuzzed(150)
@given(OBJECTS, st.sampled_from([None, 0, 1]), st.booleans(), st.booleans())
def test_arrays(folder, rows, indent, ascii_only, mark):
    path = folder / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    content = text.encode("utf-8", "replace")
    found = read(path, b"\xef\xbb\xbf" * mark + b" \n" + content + b"\n")
    assert found == [(f"{path}: row {i}", row) for i, row in enumerate(json.loads(content))]


@fuzzed(200)
@given(TABLE, OBJECTS, st.data())
def test_changed_bytes(folder, rows, objects, data):
    """Other rows come of them, or a sentence with the file; nothing else."""
    ending = data.draw(st.sampled_from(["csv", "json"]))
    whole = table(rows, ",", "\n") if ending == "csv" else json.dumps(objects).encode()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.integers(0, 3))
        content[start:end] = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b",", b"\r"]))
    path = folder / f"changed.{ending}"
    found, refusal = outcome(lambda: read(path, bytes(content)))
    if found is None:
        assert refusal.startswith(f"{path}:")
        assert refusal.isprintable()
