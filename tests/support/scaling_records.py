"""What a launch of the scaling study would have measured."""

from typing import Any

from studies.collectives import ALL_GATHER
from studies.scaling.phases import PHASES


def outcome(seconds: list[float], ranks: int, scale: float = 1.0) -> dict[str, Any]:
    """Return a record of steps of so many seconds, whose phases are powers of two."""
    phases = dict(zip(PHASES, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0), strict=True))
    phases = {name: value * scale for name, value in phases.items()}
    gathers = [{"kind": ALL_GATHER, "ranks": ranks, "calls": 3, "payload": 600, "sent": 300.0}]
    return {
        "parameters": 10,
        "device": "cpu",
        "tokens": 100 * ranks,
        "seconds": seconds,
        "phase_seconds": phases,
        "watched_seconds": sum(phases.values()),
        "collectives": gathers if ranks > 1 else [],
        "peak_memory_bytes": [7, 9],
        "memory_before_model_bytes": [5, 4],
        "load_average": {"before": [1.0, 0, 0], "after": [2.0, 0, 0]},
    }
