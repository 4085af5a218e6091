"""What a folder of the cache holds, by its journal, and whether it is as it was written."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addax_ds.data.encoding import Cuts
from addax_ds.reading.records import log_unused
from addax_ds.utils.files import appearing, sha256_of

logger = logging.getLogger(__name__)

_NAME = "index.jsonl"


@dataclass
class Index:
    """What a folder holds, by its journal.

    Attributes:
        folder: where it is.
        shards: entry of each finished shard, by its number.
        whole: entry of the whole, once all shards are finished.
    """

    folder: Path
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)
    whole: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the journal as far as it is one; a line that a killed run has torn ends it."""
        index = cls(folder)
        with suppress(FileNotFoundError, NotADirectoryError), (folder / _NAME).open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    index._add(entry)
                except (ValueError, KeyError, TypeError):
                    break
        return index

    def _add(self, entry: dict[str, Any]) -> None:
        if "shard" in entry:
            self.shards[entry["shard"]] = entry
        elif entry["shards"] == len(self.shards):
            self.whole = entry

    def write(self, entry: dict[str, Any]) -> None:
        """Append an entry."""
        with (self.folder / _NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._add(entry)

    def gathered(self, name: str) -> list[Any]:
        """Return all that the shards have found under a name, sorted."""
        return sorted({value for entry in self.shards.values() for value in entry[name]})

    def log(self, name: str, max_length: int | None) -> None:
        """Say what has been made of the rows, as it was said when it was."""
        assert self.whole is not None
        for note in self.whole["notes"]:
            logger.info("%s", note)
        log_unused(name, self.gathered("unused"))
        cuts = (Cuts(**entry["cuts"]) for entry in self.shards.values())
        sum(cuts, start=Cuts()).log(name, max_length)

    def is_intact(self) -> bool:
        """Return whether all files are as they were written; a warning names one that is not."""
        assert self.whole is not None
        return all(self._has(entry) for entry in (*self.shards.values(), self.whole))

    def keep_intact(self) -> None:
        """Forget what is not as it was written, and that the folder was whole."""
        self.shards = {k: entry for k, entry in self.shards.items() if self._has(entry)}
        self.whole = None
        lines = "".join(json.dumps(entry) + "\n" for entry in self.shards.values())
        with appearing(self.folder / _NAME) as file:
            file.write(lines.encode())

    def _has(self, entry: dict[str, Any]) -> bool:
        path = self.folder / entry["file"]
        try:
            if identity_of(path) == (entry["size"], entry["sha256"]):
                return True
            problem = "it is not as it was written"
        except OSError as error:
            problem = f"{error.strerror}"
        logger.warning("%s of the cache: %s; its rows are tokenised again", path, problem)
        return False


def identity_of(path: Path) -> tuple[int, str]:
    """Return the size of a file in bytes, and its SHA-256."""
    return path.stat().st_size, sha256_of(path)


def shard_name(shard: int) -> str:
    """Return the name of the file of a shard."""
    return f"{shard:05d}.arrow"
