"""Time and memory of a rank until it has its training data, over rows and ranks.

    python benchmarks/data.py --output benchmarks/results

Rows of English-like words are written as JSON Lines, and read as a training does: tokens by the
demo's tokenizer, lengths, streams, the first step's batches. Ranks are processes of their own that
begin at once, with an empty cache and then with the one that was filled. CPU seconds and seconds
are counted after the imports; CPU seconds have those of the processes that tokenise. Memory is that
of the process with the libraries: anonymous memory, and the resident set, which has mapped pages
besides. With ``--in_memory`` the rows are tokenised by every rank into lists, without a cache.

Prints a table and writes data.json (or data-in-memory.json), in which the results of other cases
stay: ``--rows 300000 --ranks 2`` measures one again.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run as a script, for ranks too

from addax_ds.config.arguments import DataArguments, ModelArguments
from addax_ds.data.batches import StepBatches, StepSchedule
from addax_ds.data.encoding import encode
from addax_ds.data.examples import Example, data_digest, lengths_of
from addax_ds.data.partition import partition
from addax_ds.data.train_rows import EncodedRows
from addax_ds.models.source import ModelSource
from addax_ds.reading.records import read_records
from addax_ds.reading.sources import open_rows
from benchmarks.common import collect_provenance, one_thread_each

CASES = {3_000: 980, 30_000: 980, 300_000: 980, 3_000_000: 60}
"""Bytes of a row, about, by the number of rows."""

MIB = 2**20
_WORDS = 5_000
_BATCH = 8


def write_rows(path: Path, rows: int, row_bytes: int) -> None:
    """Write rows of a prompt and a completion; lengths vary by a factor of four and more."""
    generator = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 9))) for _ in range(_WORDS)]
    mean = row_bytes / 6.5
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            count = max(1, int(generator.uniform(0.3, 1.7) * mean - 8))
            prompt = " ".join(generator.choices(words, k=count))
            row = {"prompt": prompt, "completion": f" {generator.choice(words)}"}
            file.write(json.dumps(row) + "\n")


# ---- one rank ------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def held() -> dict[str, float]:
    """Memory of this process by kind, in MiB."""
    keys = {"RssAnon": "anonymous", "VmRSS": "resident", "VmHWM": "most resident"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in keys:
            found[keys[key]] = round(int(rest.split()[0]) * 1024 / MIB, 1)
    return found


def measure(file: str, in_memory: bool) -> dict[str, Any]:
    """Prepare data as a rank does; what it took."""
    from addax_ds.cli.data import load_data

    source = ModelSource.find(ModelArguments())
    tokenizer = source.load_tokenizer()
    arguments = DataArguments(train_file=[file], max_length=source.positions)
    before, began, cpu = held(), time.perf_counter(), cpu_seconds()
    examples: Sequence[Example]
    if in_memory:
        records = read_records(open_rows([file]), tokenizer)
        limits = {"max_length": source.positions, "model_positions": source.positions}
        examples, _ = encode(records, tokenizer, **limits, vocabulary_size=source.vocabulary_size)
        del records
    else:
        examples = load_data(arguments, tokenizer, source, datetime(2026, 1, 1)).train
    digest = data_digest(examples)
    streams = partition(lengths_of(examples), "addax", "median")
    schedule = StepSchedule(streams.zeroth_order, streams.first_order, _BATCH, _BATCH, seed=0)
    batch = StepBatches(EncodedRows(examples, 0), schedule, rank=0, world_size=1)[0]
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(cpu_seconds() - cpu, 2),
        "before": before,
        "after": held(),
        "digest": digest,
        "first_step": {name: batch[f"{name}_targets"] for name in ("zeroth_order", "first_order")},
    }


# ---- the table -----------------------------------------------------------------------------------


def start(file: Path, ranks: int, cache: Path, in_memory: bool) -> list[dict[str, Any]]:
    """Measure on ranks that begin at once."""
    words = [sys.executable, __file__, "--rank", str(file), *["--in_memory"] * in_memory]
    environment = {**one_thread_each(), "HF_DATASETS_CACHE": str(cache)}
    environment.pop("RANK", None)
    started = [
        subprocess.Popen(
            words,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = []
    for process in started:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)} failed:\n{output}\n{errors}")
        found.append(json.loads(output.splitlines()[-1]))
    assert len({rank["digest"] for rank in found}) == 1
    return found


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def row_of(result: dict[str, Any]) -> str:
    """Return a line of the table: the slowest rank, all CPU seconds, the rank that holds most."""
    ranks = result["by_rank"]
    seconds = max(rank["seconds"] for rank in ranks)
    cpu = sum(rank["cpu_seconds"] for rank in ranks)
    kinds = ("anonymous", "resident")
    memory = [max(rank["after"][kind] for rank in ranks) for kind in kinds]
    cells = [result["rows"], len(ranks), result["start"], f"{seconds:.1f}", f"{cpu:.1f}"]
    return f"| {' | '.join(map(str, [*cells, *(f'{size:.0f}' for size in memory)]))} |"


def keep(path: Path, results: list[dict[str, Any]]) -> None:
    """Write results, and those of other cases that the file has; each has its circumstances."""
    before = json.loads(path.read_text()) if path.exists() else []

    def case(result: dict[str, Any]) -> tuple[int, int, str]:
        return result["rows"], result["ranks"], result["start"]

    found = {case(result): result for result in [*before, *results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([found[key] for key in sorted(found)], indent=1) + "\n")


def main() -> None:
    """Measure as a rank, or all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--in_memory", action="store_true")
    parser.add_argument("--output", type=Path, help="folder")
    parser.add_argument("--rank", help="measure this file as a rank")
    arguments = parser.parse_args()
    if arguments.rank:
        print(json.dumps(measure(arguments.rank, arguments.in_memory)))
        return
    name = "data-in-memory.json" if arguments.in_memory else "data.json"
    circumstances = {**collect_provenance(), "cores": os.cpu_count()}
    results = []
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, rows, CASES[rows])
            for ranks in arguments.ranks:
                cache = Path(folder) / f"cache{ranks}"
                for which in ("first",) if arguments.in_memory else ("first", "second"):
                    by_rank = start(file, ranks, cache, arguments.in_memory)
                    sizes = {"file": file.stat().st_size, "cache": size_of(cache)}
                    results.append(
                        {
                            "rows": rows,
                            "ranks": ranks,
                            "start": which,
                            "bytes": sizes,
                            "by_rank": by_rank,
                            "circumstances": circumstances,
                        }
                    )
                    print(row_of(results[-1]), flush=True)
                for path in cache.rglob("*.arrow"):
                    path.unlink()
                if arguments.output:
                    keep(arguments.output / name, results)


if __name__ == "__main__":
    main()
