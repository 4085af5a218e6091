"""Tokens on the disk are those of `encode`, made once, and made again if anything is not right."""

import importlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from addax_ds.data import cache, encoding
from addax_ds.data.arrow import ArrowExamples
from addax_ds.data.batches import StepBatches, StepSchedule, train_dataloader
from addax_ds.data.cache import Encoder, encoded
from addax_ds.data.encoding import encode, learnt_ends
from addax_ds.data.examples import data_digest
from addax_ds.data.train_rows import EncodedRows
from addax_ds.reading.clock import moments_read
from addax_ds.reading.records import read_records
from addax_ds.reading.sources import Rows, open_rows
from addax_ds.utils.errors import UserError
from tests.faults.disk import disk_is_full, fault
from tests.reading.test_chat import DATED
from tests.reading.test_records import CHATML
from tests.support.ranks import require_permission
from tests.support.tiny import byte_tokenizer, row, tiny_tokenizer, words, write_rows

NOW = datetime(2025, 12, 31, 23, 59)
COUNT = 60  # rows, in shards of 7
PROMPTS = [row(2 + i % 9, 1 + i % 5, i) for i in range(COUNT)]
TEXTS = [{"text": words(3 + 5 * (i % 4), i)} for i in range(COUNT)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "yes" * (1 + i % 3)},
        ],
        "id": i,
    }
    for i in range(COUNT)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, of small shards, which this process makes unless a test asks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)
    monkeypatch.setattr(cache, "_SHARD_ROWS", 7)
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 100)
    return tmp_path / "cache" / "addax_ds"


def encoder(**more: Any) -> Encoder:
    return Encoder(**{"tokenizer": tiny_tokenizer(), "now": NOW, **more})


def chat_encoder(template: str = CHATML, **more: Any) -> Encoder:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return encoder(tokenizer=tokenizer, **more)


def plain(rows: Rows, how: Encoder) -> Any:
    """What `encode` makes of all rows at once, in memory."""
    records = read_records(rows, how.tokenizer, append_eos=how.append_eos, now=how.now)
    limits = {"max_length": how.max_length, "model_positions": how.model_positions}
    return encode(records, how.tokenizer, **limits)


def assert_equal(found: ArrowExamples, expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()
        assert one.origin == other.origin
    assert found.lengths.tolist() == [example.length for example in expected]
    assert found.target_counts.tolist() == [example.target_count for example in expected]
    assert found.digest == data_digest(found) == data_digest(expected)
    assert found.lengths.dtype == found.target_counts.dtype == np.int32


@pytest.mark.parametrize(
    "processes", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["one process", "three"]
)
@pytest.mark.parametrize(
    ("content", "how"),
    [
        (PROMPTS, encoder()),
        (PROMPTS, encoder(append_eos=False, max_length=9)),
        (TEXTS, encoder(max_length=8, model_positions=8)),
        (CHATS, chat_encoder()),
    ],
    ids=["prompts", "cut", "split", "chats"],
)
def test_rows_are_those_of_encode(content, how, processes, tmp_path, caplog):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", content))])
    with caplog.at_level(logging.INFO, logger="addax_ds"):
        expected, cuts = plain(rows, how)
        cuts.log(rows.name, how.max_length)
        said = caplog.messages.copy()
        for _ in range(2):  # as they are made, and as they are found
            caplog.clear()
            found = encoded(rows, how, processes=processes)
            assert_equal(found, expected)
            assert found.turn_ends == (learnt_ends(expected) if content is CHATS else set())
            assert caplog.messages[1:] == said
            assert rows.name in caplog.messages[0]
    assert "from the cache" in caplog.messages[0]


def test_examples_are_a_sequence_that_holds_no_file_open(tmp_path):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))])
    open_before = len(os.listdir("/proc/self/fd"))
    found = encoded(rows, encoder())
    assert_equal(pickle.loads(pickle.dumps(found)), list(found))
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert found[-1].origin == found[COUNT - 1].origin
    assert [example.origin for example in found[57:80]] == [found[i].origin for i in (57, 58, 59)]
    with pytest.raises(IndexError):
        found[COUNT]
    with pytest.raises(ValueError, match="read-only"):
        found[0].input_ids[0] = 1


def test_datasets_reads_a_shard(tmp_path, folder):
    found = encoded(open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))]), encoder())
    shard = datasets.Dataset.from_file(str(next(folder.glob("*/00001.arrow"))))
    assert shard["input_ids"][:] == [example.input_ids.tolist() for example in found[7:14]]
    assert shard["labels"][:] == [example.labels.tolist() for example in found[7:14]]


class Unread:
    """Rows of which only the name and the identity are to be looked at."""

    def __init__(self, rows: Rows) -> None:
        self.name = rows.name
        self.identity = rows.identity

    def __len__(self) -> int:
        raise AssertionError("counted")

    def read(self, start: int, stop: int) -> Iterator[Any]:
        raise AssertionError("read")


@pytest.mark.parametrize(("content", "how"), [(PROMPTS, encoder()), (CHATS, chat_encoder())])
def test_a_second_start_reads_no_rows(content, how, tmp_path):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", content))])
    made = list(encoded(rows, how))
    assert_equal(encoded(Unread(rows), how), made)


def test_what_tokens_depend_on_makes_others(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", PROMPTS)
    rows = open_rows([str(path)])
    base = chat_encoder()
    other_words, other_end = tiny_tokenizer(), byte_tokenizer()
    other_end.eos_token = "<unk>"
    variants = [
        base,
        chat_encoder(append_eos=False),
        chat_encoder(max_length=40),
        chat_encoder(model_positions=40),
        chat_encoder(vocabulary_size=400),
        chat_encoder(CHATML + " "),
        encoder(tokenizer=byte_tokenizer(bos=True)),
        encoder(tokenizer=other_words),
        encoder(tokenizer=other_end),
    ]
    found = [how.fingerprint(rows, True) for how in variants]
    os.utime(path, ns=(1, 1))
    found += [base.fingerprint(open_rows([str(path)]), True), base.fingerprint(rows, False)]
    assert len(set(found)) == len(found)
    assert chat_encoder().fingerprint(rows, True) == found[0]


def test_the_program_is_part_of_the_fingerprint(tmp_path, monkeypatch):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))])
    before = encoder().fingerprint(rows, False)
    monkeypatch.setattr(cache, "_program", lambda: ["another version"])
    assert encoder().fingerprint(rows, False) != before


@pytest.mark.parametrize("room", ["data", "reading"])
def test_the_program_is_all_code_that_makes_tokens(room, tmp_path, monkeypatch):
    before = cache._program()
    for name in ("data", "reading"):
        package = importlib.import_module(f"addax_ds.{name}")
        shutil.copytree(Path(package.__file__).parent, tmp_path / name)
    with (tmp_path / room / "a_new_module.py").open("w") as file:
        file.write("CHANGED = True\n")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "data" / "cache.py"))
    monkeypatch.setattr(cache.reading, "__file__", str(tmp_path / "reading" / "__init__.py"))
    cache._program.cache_clear()
    try:
        assert cache._program() != before
        (tmp_path / room / "a_new_module.py").unlink()
        cache._program.cache_clear()
        assert cache._program() == before
    finally:
        cache._program.cache_clear()


DAY = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}" + CHATML
ALIAS = "{% set clock = strftime_now %}{{ clock('%d %b %Y') }}" + CHATML
CHOSEN = "{{ strftime_now('%d' if messages else '%H') }}" + CHATML


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        (CHATML, []),
        (DAY, ["31 Dec 2025"]),
        (DATED, ["Wednesday, 31 December 2025, 23:59 "]),
        (ALIAS, [NOW.isoformat()]),
        (CHOSEN, [NOW.isoformat()]),
        ("{% for", []),
    ],
)
def test_what_a_template_reads_of_a_moment(template, reads):
    assert moments_read(chat_encoder(template).tokenizer, NOW) == reads


def test_another_moment_counts_only_as_far_as_it_is_read(tmp_path):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", CHATS))])
    earlier, later = NOW - timedelta(minutes=3), NOW + timedelta(minutes=3)

    def prints(template: str, is_chat: bool = True) -> list[str]:
        moments = (NOW, earlier, later)
        return [chat_encoder(template, now=m).fingerprint(rows, is_chat) for m in moments]

    assert len(set(prints(CHATML))) == 1
    assert len(set(prints(DATED, is_chat=False))) == 1
    same, same_day, next_day = prints(DAY)
    assert same == same_day != next_day
    assert len(set(prints(ALIAS))) == 3


# ---- what can go wrong -------------------------------------------------------------------------


def only_folder(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"\x00" * 100)


DAMAGES = [
    ("00003.arrow", cut_off),
    ("00003.arrow", alter),
    ("00003.arrow", Path.unlink),
    ("lengths.npy", alter),
    ("index.jsonl", cut_off),
    ("index.jsonl", garble),
    ("index.jsonl", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_what_is_damaged_is_made_again_and_said(name, damage, tmp_path, folder, caplog):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))])
    expected, _ = plain(rows, encoder())
    encoded(rows, encoder())
    path = only_folder(folder) / name
    kept = only_folder(folder) / "00000.arrow"
    made = kept.stat().st_ino
    damage(path)
    assert_equal(encoded(rows, encoder()), expected)
    if name != "index.jsonl":
        assert f"{path} of the cache: " in caplog.text
        assert kept.stat().st_ino == made  # what is intact is not made again
    caplog.clear()
    assert_equal(encoded(rows, encoder()), expected)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing_that_is_taken_for_whole(
    tmp_path, monkeypatch, caplog
):
    """At each thing that changes the disk, in turn; the lock alone can be done without."""
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS[:9]))])
    expected, _ = plain(rows, encoder())
    unsaid = []
    for at in range(40):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache{at}")
        said = ""
        with fault(at, disk_is_full) as changes:
            try:
                encoded(rows, encoder())
            except UserError as error:
                said = str(error)
            count = changes()
        assert not list(tmp_path.rglob("*.unfinished"))
        assert_equal(encoded(rows, encoder()), expected)
        if count <= at:
            break
        if "No space left on device. Set HF_DATASETS_CACHE" not in said:
            unsaid.append(at)
    assert 10 < at < 39
    assert caplog.text.count("cannot be locked") == 1
    assert len(unsaid) == 2  # and of a folder that is there


def test_a_cache_that_is_no_folder_is_a_sentence(tmp_path):
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))])
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept there: .* Set HF_DATASETS_CACHE"):
        encoded(rows, encoder())


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_first_bad_row_is_named_and_a_mended_file_is_read(processes, tmp_path, folder):
    path = tmp_path / "rows.jsonl"
    bad = [dict(row) for row in PROMPTS]
    for index in (24, 40, 55):
        bad[index]["completion"] = ""
    rows = open_rows([str(write_rows(path, bad))])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{path}:25: the completion is empty"):
            encoded(rows, encoder(), processes=processes)
    mended = open_rows([str(write_rows(path, PROMPTS))])
    assert_equal(encoded(mended, encoder(), processes=processes), plain(mended, encoder())[0])


# ---- several processes -------------------------------------------------------------------------


def fork(target: Any, *arguments: Any) -> Any:
    require_permission()
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def noting(note: Path, die_at: int | None = None) -> None:
    """Let each shard that is begun here be noted, and one of them kill the process."""
    write = cache._Maker._write_shard

    def noted(self: Any, shard: int) -> Any:
        if shard == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with note.open("a") as file:
            file.write(f"{shard}\n")
        return write(self, shard)

    cache._Maker._write_shard = noted  # type: ignore[method-assign]  # a fork's own


def start(path: Path, note: Path, out: Any, processes: int = 1, die_at: int | None = None) -> None:
    noting(note, die_at)
    try:
        out.put(encoded(open_rows([str(path)]), encoder(), processes=processes).digest)
    except UserError as error:
        out.put(str(error))


@pytest.mark.slow
def test_a_killed_run_is_gone_on_from(tmp_path, folder, monkeypatch):
    path, note = write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "note"
    results = multiprocessing.get_context("fork").SimpleQueue()
    process = fork(start, path, note, results, 1, 5)
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    (only_folder(folder) / "00005.arrow.elsewhere-1.unfinished").write_bytes(b"half")
    process = fork(start, path, note, results)
    process.join(60.0)
    assert process.exitcode == 0
    assert list(map(int, note.read_text().split())) == list(range(9))
    rows = open_rows([str(path)])
    assert_equal(encoded(Unread(rows), encoder()), plain(rows, encoder())[0])
    assert not list(folder.glob("*/*.unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_several_at_once_make_it_once(processes, bad, tmp_path):
    content = [*PROMPTS[:-1], {"prompt": "a", "completion": ""}] if bad else PROMPTS
    path, note = write_rows(tmp_path / "rows.jsonl", content), tmp_path / "note"
    note.touch()
    results = multiprocessing.get_context("fork").SimpleQueue()
    started = [fork(start, path, note, results, processes) for _ in range(3)]
    for process in started:
        process.join(60.0)
    found = {results.get() for _ in started}
    assert len(found) == 1
    if bad:
        assert found.pop().startswith(f"{path}:{COUNT}: the completion is empty")
    else:
        assert found == {data_digest(plain(open_rows([str(path)]), encoder())[0])}
    made = sorted(map(int, note.read_text().split()))
    assert made[:9] == list(range(9))
    assert set(made[9:]) <= ({8} if bad else set())  # who comes later looks at a bad row anew


@pytest.mark.slow
def test_workers_of_a_loader_read_the_same(tmp_path):
    require_permission()
    rows = open_rows([str(write_rows(tmp_path / "rows.jsonl", PROMPTS))])
    expected = EncodedRows(plain(rows, encoder())[0], 0)
    indices = np.arange(COUNT, dtype=np.int32)
    schedule = StepSchedule(indices[:20], indices[20:], 3, 4, 0)
    batches = StepBatches(EncodedRows(encoded(rows, encoder()), 0), schedule, 0, 1)
    for step, item in enumerate(train_dataloader(batches, num_workers=2)):
        reference = StepBatches(expected, schedule, 0, 1)[step]
        assert item["first_order_targets"] == reference["first_order_targets"]
        for stream in ("zeroth_order", "first_order"):
            for name, tensor in reference[stream][0].items():
                assert torch.equal(item[stream][0][name], tensor)
    assert step == 9


def test_the_index_has_no_line_that_json_does_not_read(tmp_path, folder):
    encoded(open_rows([str(write_rows(tmp_path / "rows.jsonl", CHATS))]), chat_encoder())
    lines = (only_folder(folder) / "index.jsonl").read_text().splitlines()
    *shards, whole = map(json.loads, lines)
    assert [entry["shard"] for entry in shards] == list(range(9))
    assert {column for entry in shards for column in entry["unused"]} == {"id"}
    assert whole["examples"] == COUNT
