"""Measures what the ring model asks of the network, between the ranks of one launch.

``python -m studies.scaling.link FOLDER`` under a launcher; rank 0 writes ``FOLDER/measured.json``.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from addax_ds.distributed.collectives import all_gather_object, shutdown
from addax_ds.distributed.startup import init_deepspeed
from studies.collectives import ring_bytes
from studies.provenance import collect_provenance
from studies.scaling.measure import MEASURED

GATHERED_BYTES = 1 << 24
_TURNS = 15
_WARM_UP = 3


def measure_link(device: torch.device) -> dict[str, float]:
    """Return what the slowest rank finds, medians over some turns.

    Returns:
        ``latency_s``: of one hop: an all-reduce of 8 bytes over its 2 (n - 1) hops.
        ``bandwidth``: bytes a second that a rank sends in an all-gather of 16 MiB, latency left
        out.
    """
    ranks = dist.get_world_size()
    small = torch.zeros(1, dtype=torch.float64, device=device)
    latency = _seconds(lambda: dist.all_reduce(small), device) / (2 * (ranks - 1))
    part = torch.zeros(GATHERED_BYTES // ranks, dtype=torch.uint8, device=device)
    whole = torch.empty(part.numel() * ranks, dtype=torch.uint8, device=device)
    seconds = _seconds(lambda: dist.all_gather_into_tensor(whole, part), device)
    # On a busy machine the small collective may take as long as the large one.
    transfer = max(seconds - (ranks - 1) * latency, seconds / 2)
    return {"latency_s": latency, "bandwidth": ring_bytes(1, whole.numel(), ranks) / transfer}


def _seconds(collective: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_WARM_UP + _TURNS):
        dist.barrier()
        before = time.perf_counter()
        collective()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - before)
    return max(all_gather_object(statistics.median(times[_WARM_UP:])))


def main() -> None:
    """Measure the links of a launch."""
    folder = Path(sys.argv[1])
    os.environ.pop("LOCAL_SIZE", None)  # see `studies.scaling.measure`
    init_deepspeed()
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    load_before = os.getloadavg()
    found = {
        **measure_link(device),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "circumstances": collect_provenance(),
    }
    if dist.get_rank() == 0:
        (folder / MEASURED).write_text(json.dumps(found, indent=1) + "\n")
    shutdown()


if __name__ == "__main__":
    main()
