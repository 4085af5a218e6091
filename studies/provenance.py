"""Circumstances of a measurement besides the configuration: code, versions and machine."""

import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from addax_ds.utils.versions import versions


def collect_provenance() -> dict[str, Any]:
    """Return them for a record; ``commit`` is None outside of a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changes.stdout.strip()),
    }


def distinct(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those that differ: numbers may have been measured at different times and places."""
    found: list[dict[str, Any]] = []
    for record in records:
        if record not in found:
            found.append(record)
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
