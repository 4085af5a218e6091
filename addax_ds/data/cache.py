"""Tokens of rows on the disk: made once a machine, in parallel, and mapped by every rank.

Rows are encoded in shards, a fixed number of rows each. A shard is an Arrow stream, which
`datasets.Dataset.from_file` reads, too, with the columns ``input_ids``, ``labels``,
``target_count`` and ``origin``. The shards of one data set are in a folder of
``$HF_DATASETS_CACHE/addax_ds`` that is named by all that its tokens depend on.

``index.jsonl`` in that folder has a line a shard, with its size and SHA-256, written when the shard
is, and one more when all are. So a killed run is gone on from, and what is cut off or altered is
found, and made again. Whoever makes a folder holds a lock, which the kernel releases with its
process; other ranks and runs wait for it, and read what it has made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from addax_ds import reading
from addax_ds.data.arrow import SCHEMA, ArrowExamples, Shard, record_batch
from addax_ds.data.cache_index import Index, identity_of, shard_name
from addax_ds.data.encoding import Cuts, chunks, encode, learnt_ends
from addax_ds.data.examples import Example, add_to_digest
from addax_ds.data.workers import in_order, usable_cores
from addax_ds.reading.clock import moments_read
from addax_ds.reading.records import Record, Records
from addax_ds.utils.errors import UserError
from addax_ds.utils.files import UNFINISHED, appearing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from addax_ds.reading.sources import Rows

logger = logging.getLogger(__name__)

_FORMAT = 1  # of shards and index
_LENGTHS = "lengths.npy"  # and target counts
_FAILURE = "failure.json"
_SHARD_ROWS = 1000  # at least: less work than a fork is worth, and little to lose
_MOST_SHARDS = 1000  # a process may map 65530 files by default
_READ_ROWS = 100
_POLL_SECONDS = 0.5
_BAR_SECONDS = 1.0  # what is done sooner needs no bar


@dataclass(frozen=True)
class Encoder:
    """How rows become examples; see `Records` and `encode` for the fields."""

    tokenizer: PreTrainedTokenizerBase
    now: datetime
    append_eos: bool = True
    max_length: int | None = None
    model_positions: int | None = None
    vocabulary_size: int | None = None

    def records(self, rows: Rows) -> Records:
        """Return the rows as text."""
        return Records(rows, self.tokenizer, append_eos=self.append_eos, now=self.now)

    def examples(self, records: Sequence[Record]) -> tuple[list[Example], Cuts]:
        """Return the tokens of texts, and what was cut and split."""
        return encode(
            records,
            self.tokenizer,
            max_length=self.max_length,
            model_positions=self.model_positions,
            vocabulary_size=self.vocabulary_size,
        )

    def fingerprint(self, rows: Rows, is_chat: bool) -> str:
        """Return 32 hex digits for what the tokens of rows depend on.

        Args:
            rows: the rows, of which only the identity is read.
            is_chat: whether a chat template writes them. The others do not depend on it.
        """
        limits = self.append_eos, self.max_length, self.model_positions, self.vocabulary_size
        moments = moments_read(self.tokenizer, self.now) if is_chat else None
        parts = [_FORMAT, _program(), rows.identity, self._tokenizer, limits, is_chat, moments]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @cached_property
    def _tokenizer(self) -> str:
        """Digest, made once: the first call of a tokenizer may change how it is written."""
        tokenizer: Any = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = [
            f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            None if backend is None else backend.to_str(),
            tokenizer.chat_template,
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            [tokenizer.bos_token_id, tokenizer.eos_token_id],
        ]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


@cache
def _program() -> list[str]:
    """Return what makes tokens: versions of libraries, and a digest of the code up to them."""
    code = hashlib.sha256()
    for package in (Path(__file__).parent, Path(reading.__file__).parent):
        for path in sorted(package.glob("*.py")):
            code.update(path.read_bytes())
    return [*(version(name) for name in ("transformers", "tokenizers")), code.hexdigest()]


def encoded(
    rows: Rows, encoder: Encoder, *, processes: int | None = None, progress: bool = False
) -> ArrowExamples:
    """Return the examples of rows from the cache, into which one process of the machine puts them.

    Args:
        rows: the rows. Those that are in the cache are not read.
        encoder: what makes tokens of them.
        processes: that tokenise, at most; None for the cores that this process may use.
        progress: whether to show a bar.

    Raises:
        UserError: a row cannot be used, or the cache cannot be written.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "addax_ds"
    for is_chat in (False, True):
        folder = root / encoder.fingerprint(rows, is_chat)
        index = Index.read(folder)
        if index.whole is not None and index.is_intact():
            logger.info("%s: tokens from the cache, %s", rows.name, folder)
            break
    else:
        records = encoder.records(rows)
        folder = root / encoder.fingerprint(rows, records.is_chat)
        index = _Maker(folder, records, encoder, processes or usable_cores(), progress).index()
    index.log(rows.name, encoder.max_length)
    return _examples(folder, index)


def _examples(folder: Path, index: Index) -> ArrowExamples:
    assert index.whole is not None
    numbers = sorted(index.shards)
    return ArrowExamples(
        {folder / shard_name(number): index.shards[number]["examples"] for number in numbers},
        np.load(folder / _LENGTHS, allow_pickle=False),
        index.whole["digest"],
        frozenset(index.gathered("ends")),
    )


class _Maker:
    """Makes a folder, unless another process does; then waits until it has.

    Args:
        folder: of the shards.
        records: texts.
        encoder: what makes tokens of them.
        processes: at most so many.
        progress: whether to show a bar.
    """

    def __init__(
        self, folder: Path, records: Records, encoder: Encoder, processes: int, progress: bool
    ) -> None:
        self._folder = folder
        self._records = records
        self._encoder = encoder
        self._processes = processes
        self._name = records.rows.name
        self._size = max(_SHARD_ROWS, -(-len(records) // _MOST_SHARDS))
        self._count = -(-len(records) // self._size)
        self._bar = tqdm(
            total=len(records),
            desc=f"Tokenising {self._name}",
            unit=" rows",
            delay=_BAR_SECONDS,
            disable=not progress,
        )

    def index(self) -> Index:
        """Return the index of the folder when it is whole.

        Raises:
            UserError: see `encoded`.
        """
        began = time.time()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._bar, self._alone() as alone:
                index = Index.read(self._folder)
                if index.whole is None or not index.is_intact():
                    self._refuse_again(began)
                    self._clean(alone)
                    self._make(index)
        except OSError as error:
            raise UserError(
                f"{self._folder}: the tokens of {self._name} cannot be kept there: "
                f"{error.strerror or error}. Set HF_DATASETS_CACHE to a folder that can be "
                "written and has room"
            ) from error
        assert index.whole is not None
        logger.info(
            "%s: %d sequences of %d tokens, tokenised in %.0f s, are in the cache, %s",
            self._name,
            index.whole["examples"],
            index.whole["tokens"],
            time.time() - began,
            self._folder,
        )
        return index

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other processes from making the folder meanwhile, and yield whether that works.

        Where it does not, they do the same work, each in files of its own until these are finished.
        """
        lock = FileLock(self._folder.with_suffix(".lock"), fallback_to_soft=False)
        locked = self._acquire(lock)
        try:
            yield locked
        finally:
            lock.release()

    def _acquire(self, lock: FileLock) -> bool:
        while True:
            try:
                lock.acquire(timeout=_POLL_SECONDS)
                return True
            except Timeout:  # is an OSError
                self._show(len(Index.read(self._folder).shards))
            except (NotImplementedError, OSError) as error:
                logger.warning(
                    "%s cannot be locked (%s): every rank tokenises %s by itself",
                    lock.lock_file,
                    error,
                    self._name,
                )
                return False

    def _show(self, shards: int) -> None:
        self._bar.update(min(shards * self._size, len(self._records)) - self._bar.n)

    def _refuse_again(self, began: float) -> None:
        """Raise the error of the process that held the lock meanwhile: it has the same rows."""
        try:
            failure = json.loads((self._folder / _FAILURE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if failure["time"] >= began:
            raise UserError(failure["message"])

    def _clean(self, alone: bool) -> None:
        (self._folder / _FAILURE).unlink(missing_ok=True)
        if alone:  # they are those of killed processes
            for path in self._folder.glob(f"*{UNFINISHED}"):
                path.unlink(missing_ok=True)

    def _make(self, index: Index) -> None:
        index.keep_intact()
        missing = [shard for shard in range(self._count) if shard not in index.shards]
        try:
            with closing(in_order(self._write_shard, missing, self._processes)) as entries:
                self._finish(index, entries)
        except UserError as error:
            failure = {"time": time.time(), "message": str(error)}
            with suppress(OSError):
                (self._folder / _FAILURE).write_text(json.dumps(failure), encoding="utf-8")
            raise

    def _finish(self, index: Index, entries: Iterator[dict[str, Any]]) -> None:
        """Note each shard when it and those before it are there, and the whole at the end."""
        digest = hashlib.sha256()
        lengths, targets = [], []
        for shard in range(self._count):
            if shard not in index.shards:
                index.write(next(entries))
            for part in Shard(self._folder / shard_name(shard)).parts:
                add_to_digest(digest, part.examples())
                lengths.append(np.diff(part.offsets))
                targets.append(part.target_counts)
            self._show(shard + 1)
        columns = np.stack([np.concatenate(lengths), np.concatenate(targets)])
        path = self._folder / _LENGTHS
        with appearing(path) as file:
            np.save(file, columns)
        size, sha256 = identity_of(path)
        index.write(
            {
                "shards": self._count,
                "file": _LENGTHS,
                "size": size,
                "sha256": sha256,
                "notes": self._records.notes,
                "digest": digest.hexdigest()[:16],
                "examples": columns.shape[1],
                "tokens": int(columns[0].sum(dtype=np.int64)),
            }
        )

    def _write_shard(self, shard: int) -> dict[str, Any]:
        """Write a shard and return its entry; this may be a process of its own."""
        self._records.unused = set()
        path = self._folder / shard_name(shard)
        ends: set[int] = set()
        count, cuts = 0, Cuts()
        with appearing(path) as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for texts in chunks(self._records_of(shard)):
                examples, more = self._encoder.examples(texts)
                cuts += more
                if self._records.is_chat:
                    ends |= learnt_ends(examples)
                count += len(examples)
                writer.write_batch(record_batch(examples))
        size, sha256 = identity_of(path)
        return {
            "shard": shard,
            "file": path.name,
            "size": size,
            "sha256": sha256,
            "examples": count,
            "cuts": asdict(cuts),
            "ends": sorted(ends),
            "unused": sorted(self._records.unused),
        }

    def _records_of(self, shard: int) -> Iterator[Record]:
        """Yield the texts of a shard, of which not all have to fit into memory."""
        stop = min((shard + 1) * self._size, len(self._records))
        for start in range(shard * self._size, stop, _READ_ROWS):
            yield from self._records.read(start, min(start + _READ_ROWS, stop))
