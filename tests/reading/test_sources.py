"""The same rows out of every format, and a sentence for everything that has no rows."""

import csv
import gzip
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from addax_ds.data.encoding import encode
from addax_ds.reading.records import read_records
from addax_ds.reading.sources import find_files, open_rows
from addax_ds.utils.errors import UserError
from tests.reading.test_chat import CALL, TOOL, TOOLS
from tests.support.tiny import byte_tokenizer, write_rows

# What readers of tables take for something else: nothing, numbers, the end of a row or a field.
ANSWERS = (
    "NA",
    "null",
    "None",
    "",
    "007",
    "1.50",
    "true",
    'a "b", c',
    "two\nlines\r\n",
    "é\u2028\U0001f600",
)
PAIRS = [{"prompt": ANSWERS[i % 10], "completion": ANSWERS[i % 9 - 1] or "x"} for i in range(20)]
ASKED = {"role": "user", "content": "one?"}
CHATS = [
    {
        "messages": [
            ASKED,
            {"role": "assistant", "content": str(i)}
            if i % 3
            else {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ],
        **({"tools": [TOOL]} if i % 3 == 0 else {}),
    }
    for i in range(20)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_table(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    """The columns of all rows, which `from_list` takes from the first."""
    return Dataset.from_list([dict.fromkeys({k: 0 for r in rows for k in r}) | r for r in rows])


def zipped(path: Path) -> None:
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def written(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the rows in every format that can hold them; return what each is named to `open_rows`.

    ``datasets`` writes its own; ``json`` and ``csv`` the others.
    """
    write_rows(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (folder / "flat.json").write_text("\ufeff" + json.dumps(rows, ensure_ascii=False))
    write_rows(folder / "lines.json", rows)
    write_rows(folder / "lines", rows)
    write_rows(folder / "rows.ndjson", rows)
    for name in ("packed.jsonl", "packed.json"):
        (folder / name).write_bytes((folder / "rows").with_suffix(name[6:]).read_bytes())
        zipped(folder / name)
    names = ["rows.json", "flat.json", "lines.json", "lines", "rows.ndjson"]
    names += ["packed.jsonl.gz", "packed.json.gz"]
    data = as_dataset(rows)
    data.to_parquet(str(folder / "rows.parquet"))
    data.save_to_disk(str(folder / "saved"))
    (arrow,) = (folder / "saved").glob("*.arrow")
    (folder / "rows.arrow").write_bytes(arrow.read_bytes())
    names += ["rows.parquet", "rows.arrow", "saved"]
    if "prompt" in rows[0]:
        write_table(folder / "rows.csv", rows)
        write_table(folder / "rows.tsv", rows, "\t")
        write_table(folder / "packed.csv", rows)
        zipped(folder / "packed.csv")
        names += ["rows.csv", "rows.tsv", "packed.csv.gz"]
    sources: dict[str, Any] = {name: {"files": [str(folder / name)]} for name in names}
    half = len(rows) // 2
    for part, of in (("00", rows[:half]), ("01", rows[half:])):
        (folder / "shards" / part).mkdir(parents=True)
        write_rows(folder / "shards" / part / "part.jsonl", of)
        as_dataset(of).to_parquet(str(folder / "shards" / f"{part}.parquet"))
    sources["pattern"] = {"files": [str(folder / "shards" / "*.parquet")]}
    sources["several"] = {"files": [str(folder / "shards" / p) for p in ("00", "01.parquet")]}
    sources["any depth"] = {"files": [str(folder / "shards" / "**" / "*.jsonl")]}
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(folder / "splits"))
    (folder / "[0]").mkdir()
    data.to_parquet(str(folder / "[0]" / "a*b.parquet"))
    sources["magic"] = {"files": [str(folder / "[0]" / "a*b.parquet")]}
    (folder / "repository").mkdir()
    data.to_parquet(str(folder / "repository" / "train.parquet"))
    data.select([0]).to_parquet(str(folder / "repository" / "test.parquet"))
    for name in ("splits", "repository"):
        sources[name] = {"dataset": str(folder / name)}
        sources[f"{name} sliced"] = {
            "dataset": str(folder / name),
            "split": "train[:25%]+train[5:]",
        }
    return sources


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["prompts", "conversations"])
def test_every_format_gives_the_tokens_of_json_lines(rows, tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = TOOLS

    def tokens(**source: Any) -> list[list[int]]:
        records = read_records(open_rows(**source), tokenizer)
        examples, _ = encode(records, tokenizer, max_length=None, model_positions=None)
        return [[*example.input_ids, *example.labels] for example in examples]

    sources = written(tmp_path, rows)
    expected = tokens(files=[str(tmp_path / "rows.jsonl")])
    assert len(expected) == 20
    assert {name for name, source in sources.items() if tokens(**source) != expected} == set()


def test_the_places_of_rows(tmp_path):
    """Lines of a file that has some, counted from 1, else rows as a list has them, from 0."""
    sources = written(tmp_path, PAIRS)
    line_ends = sum(value.count("\n") for row in PAIRS[:10] for value in row.values())
    wanted = {
        "lines": f"{tmp_path}/lines:11",
        "packed.jsonl.gz": f"{tmp_path}/packed.jsonl.gz:11",
        "rows.csv": f"{tmp_path}/rows.csv:{12 + line_ends}",
        "rows.json": f"{tmp_path}/rows.json: row 10",
        "rows.parquet": f"{tmp_path}/rows.parquet: row 10",
        "saved": f"{tmp_path}/saved: row 10",
        "splits": f"{tmp_path}/splits, train: row 10",
        "repository sliced": f"{tmp_path}/repository, train[:25%]+train[5:]: row 10",
        "several": f"{tmp_path}/shards/01.parquet: row 0",
    }
    for name, origin in wanted.items():
        ((found, row),) = open_rows(**sources[name]).read(10, 11)
        assert (found, row) == (origin, PAIRS[10])


def test_rows_from_anywhere_also_in_another_process(tmp_path):
    """Of a copy, too, and of a gzip'd file that is read to and fro by two readers at once."""
    for source in written(tmp_path, PAIRS).values():
        rows = open_rows(**source)
        copies = [rows, pickle.loads(pickle.dumps(open_rows(**source)))]
        assert len(rows) == 20
        copies.append(pickle.loads(pickle.dumps(rows)))
        for copy in copies:
            assert copy.identity == rows.identity
            assert [row for _, row in copy.read(15, 99)] == PAIRS[15:]
            one, other = copy.read(3, 8), copy.read(7, 12)
            mixed = [next(one), next(other), next(one), *other, *one]
            assert [row for _, row in mixed] == [
                *(PAIRS[i] for i in (3, 7, 4)),
                *PAIRS[8:12],
                *PAIRS[5:8],
            ]
            assert list(copy.read(20, 30)) == []


@pytest.mark.slow
def test_a_forked_process_does_not_move_the_place_in_a_gzipped_file(tmp_path):
    """Its parent has read of it, and goes on."""
    texts = [os.urandom(5000).hex() for _ in range(200)]  # more than what is read ahead
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    zipped(tmp_path / "rows.jsonl")
    rows = open_rows([str(tmp_path / "rows.jsonl.gz")])
    assert [row["text"] for _, row in rows.read(0, 3)] == texts[:3]
    child = multiprocessing.get_context("fork").Process(target=lambda: list(rows.read(0, 200)))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert [row["text"] for _, row in rows.read(3, 200)] == texts[3:]


def test_what_a_cache_is_keyed_by(tmp_path):
    """It changes with the file, and costs no reading of it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("no rows\n")
    before = open_rows([str(path)]).identity
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert open_rows([str(link)]).identity == before
    assert open_rows([str(path)], columns={"text": "a"}).identity != before
    os.utime(path, ns=(1, 1))
    assert open_rows([str(path)]).identity != before
    data = Dataset.from_list(PAIRS)
    for index, rows in enumerate((data, data.select(range(3)))):
        rows.save_to_disk(str(tmp_path / f"saved{index}"))
        DatasetDict(train=rows).save_to_disk(str(tmp_path / f"splits{index}"))
    names = [{"files": [str(tmp_path / f"saved{i}")]} for i in (0, 1)]
    names += [{"dataset": str(tmp_path / f"splits{i}")} for i in (0, 1)]
    names += [{"dataset": str(tmp_path / "splits0"), "split": "train[:3]"}]
    found = [open_rows(**name).identity for name in names]
    assert found == [open_rows(**name).identity for name in names]
    assert len(set(found)) == 5
    for saved in (tmp_path / "saved0", tmp_path / "splits0" / "train"):
        (arrow,) = saved.glob("*.arrow")
        os.utime(arrow, ns=(1, 1))  # by a program of the same fingerprint
    again = [open_rows(**name).identity for name in names]
    assert [a == b for a, b in zip(again, found, strict=True)] == [False, True, False, True, False]


# ---- names of files ------------------------------------------------------------------------------


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_files_come_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, "b/2.jsonl", "b/10.jsonl", "b/c/1.jsonl.gz", "b/README.md", "b/.x.jsonl")
    touched(tmp_path, "b/_x/y.jsonl", "a[1].jsonl", "latest/contest.csv", "latest/z.csv")
    in_b = ["b/10.jsonl", "b/2.jsonl", "b/c/1.jsonl.gz"]
    assert [str(path) for path in find_files(["b"])] == in_b[:2]
    assert [str(path) for path in find_files(["b/*.jsonl", "b/**/1*.gz"])] == in_b
    assert [str(p) for p in find_files(["b/2.jsonl", "a[1].jsonl"])] == ["b/2.jsonl", "a[1].jsonl"]
    touched(tmp_path, "x[y]/train.parquet")
    assert [str(path) for path in find_files(["x[y]/train.parquet"])] == ["x[y]/train.parquet"]
    assert len(find_files(["latest"])) == 2  # neither is of a split named test


@pytest.mark.parametrize(
    ("files", "word", "says"),
    [
        ([], "nowhere.jsonl", "nowhere.jsonl: there is no such file"),
        (
            [],
            "*.jsonl",
            r"\*.jsonl: no files of rows there .*; known are files that end in .jsonl,",
        ),
        (["f/a.txt"], "f", "f: no files of rows there .*; known are"),
        (["a.jsonl", "a.parquet"], "a.*", r"a.\*: files of several formats there \(.jsonl, .parq"),
        (["a.csv", "a.csv.gz"], "*", r"files of several formats there \(.csv, .csv.gz\)"),
        (["f/train.csv", "f/dev.csv"], "f", r"f: files of several splits there \(dev, train\);"),
        (["train-1.csv", "valid-1.csv"], "*.csv", "of several splits there"),
        (["train/1.csv", "test/1.csv"], "t*/*.csv", "or give the folder as --dataset_name"),
        (
            ["s/dataset_dict.json"],
            "s",
            "several splits that save_to_disk wrote; .* --dataset_name s",
        ),
    ],
)
def test_names_that_stand_for_no_rows(files, word, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, *files)
    with pytest.raises(UserError, match=says):
        find_files([word])


def test_a_file_that_is_named_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, "a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl is named twice"):
        find_files(["*.jsonl", str(tmp_path / "a.jsonl")])


# ---- damage --------------------------------------------------------------------------------------


def parquet(folder: Path) -> bytes:
    path = folder / "whole.parquet"
    Dataset.from_list(PAIRS * 500).to_parquet(str(path), batch_size=1000)
    return path.read_bytes()


HEAD = b"prompt,completion\n"
DAMAGED = {
    "cut.parquet": (lambda folder: parquet(folder)[:-9], "cannot be read: .*Parquet"),
    "empty.parquet": (lambda _: b"", "cannot be read: .*"),
    "torn.parquet": (
        lambda folder: (whole := parquet(folder))[:200] + bytes(400) + whole[600:],
        "cannot be read: ",
    ),
    "text.arrow": (lambda _: b"prompt", "cannot be read: "),
    "empty.csv": (lambda _: b"", "there are no rows"),
    "header.csv": (lambda _: HEAD, "there are no rows"),
    "short.csv": (
        lambda _: HEAD + b'a,"b\nc"\na\n',
        "4: 1 fields, and the first row names 2 columns",
    ),
    "long.csv": (lambda _: HEAD + b"\na,b,c\n", "3: 3 fields, and the first row names 2 columns"),
    "quote.csv": (lambda _: HEAD + b'a,b\n"a,b\n', r"3: not valid CSV \(unexpected end of data\)"),
    "latin.csv": (lambda _: HEAD + b"a,\xe9\n", r"2: not UTF-8 \(byte 3 of the line\)"),
    "wide.csv": (lambda _: HEAD.decode().encode("utf-16"), "1: not UTF-8"),
    "twice.csv": (lambda _: b"prompt,prompt\na,b\n", "1: the column 'prompt' is named twice"),
    "mac.csv": (lambda _: HEAD + b"a,b\rc,d\r", "2: not valid CSV"),
    "cut.json": (lambda _: b'[{"text": "a"},\n {"text"', r"2: not valid JSON \(column "),
    "comma.json": (
        lambda _: b'[{"text": "a"},]',
        r"1: not valid JSON \(column 16: Expecting value",
    ),
    "gap.json": (lambda _: b'[{"text": "a"} {"text": "b"}]', "1: not valid JSON .*Expecting ','"),
    "more.json": (lambda _: b'[{"text": "a"}] 1', "1: not valid JSON .*Extra data"),
    "deep.json": (lambda _: b"[" * 100_000, "row 0: not valid JSON"),
    "nothing.json": (lambda _: b"[]", "there are no rows"),
    "number.json": (lambda _: b'[{"text": "a"}, 2]', " row 1: expected a JSON object, got a int"),
    "twice.json": (lambda _: b'[{"text": "a", "text": "b"}]', " row 0: .*duplicate keys: text"),
    "latin.json": (lambda _: b'[{"text": "\xe9"}]', r" not UTF-8 \(byte 12\)"),
    "empty.json": (lambda _: b"", "there are no rows"),
    "object.json": (lambda _: b'{\n"data": [{"text": "a"}]}', "1: not valid JSON"),
    "cut.jsonl.gz": (
        lambda _: gzip.compress(b'{"text": "a"}\n' * 9000)[:-30],
        r"\d+: the file cannot be read: Compressed file ended",
    ),
    "text.jsonl.gz": (lambda _: b'{"text": "a"}', "1: the file cannot be read: Not a gzipped file"),
    "sum.csv.gz": (
        lambda _: gzip.compress(HEAD + b"a,b\n")[:-8] + bytes(8),
        r"\d: the file cannot be read: CRC check failed",
    ),
    "flipped.json.gz": (
        lambda _: gzip.compress(b"[1]")[:10] + b"\xff" * 9,
        "the file cannot be read",
    ),
    "picture.png": (lambda _: b"\x89PNG", "neither of a known ending nor JSON Lines; known are"),
    "text.txt": (lambda _: b"Once upon a time", "neither of a known ending nor JSON Lines"),
    "empty.txt": (lambda _: b"", "there are no rows"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name, tmp_path):
    content, says = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(content(tmp_path))
    with pytest.raises(UserError, match=f"{name}:.*{says}") as raised:
        read_records(open_rows([str(path)]), byte_tokenizer())
    assert str(raised.value).startswith(f"{path}:")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 700


def test_an_empty_file_among_others_is_named(tmp_path):
    write_rows(tmp_path / "a.jsonl", PAIRS)
    touched(tmp_path, "b.jsonl")
    with pytest.raises(UserError, match=r"b.jsonl: there are no rows"):
        len(open_rows([str(tmp_path / "*.jsonl")]))


@pytest.mark.timeout(10)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ""])
def test_a_pipe_is_not_waited_for(ending, tmp_path):
    os.mkfifo(path := tmp_path / f"pipe{ending}")
    with pytest.raises(UserError, match=f"pipe{ending}: .*not a regular file"):
        len(open_rows([str(path)]))


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("nobody/nothing", "train", "^nobody/nothing, train: cannot be read: .*Hub"),
        ("splits", "dev", "splits, dev: cannot be read: Unknown split .dev."),
        ("splits", "train[x]", "cannot be read: Unrecognized instruction format: train"),
        ("splits", "train[5:5]", "there are no rows"),
        ("repository", "dev", "repository, dev: cannot be read: Unknown split"),
        (
            "saved",
            "train",
            "saved is one data set that save_to_disk wrote; give it as --train_file",
        ),
        ("rows.jsonl", "train", "rows.jsonl is a file; give it as --train_file"),
        ("script", "train", "script, train: cannot be read: "),
    ],
)
def test_data_sets_that_are_not_there(name, split, says, tmp_path, monkeypatch):
    written(tmp_path, PAIRS)
    touched(tmp_path, "script/script.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        read_records(open_rows(dataset=name, split=split), byte_tokenizer())
