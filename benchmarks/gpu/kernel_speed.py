"""Speed of the Triton kernels on a GPU, beside a copy on the same device.

    python benchmarks/gpu/kernel_speed.py --output kernels.json

Milliseconds are medians of 15 calls between two events of the stream. Large operations take the
largest weight of OPT-13B. Calls over one and over many small parameters, such as biases and gains,
show what a call costs the host.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # this file is run as a script

from addax_ds import kernels
from addax_ds.kernels.operation import Draw, Operation, Slice
from benchmarks.common import collect_provenance

LARGE = 5120 * 20480  # fc1 of OPT-13B
SMALL, PARAMETERS = 5120, (1, 16, 400)
DRAW = Draw(seed=0, step=3, parameter_id=4)
C, ZO_EPS = 1e-9, 1e-3
OPERATIONS = {
    "perturb": (Operation(DRAW, c2=(ZO_EPS,)), False),
    "update": (Operation(DRAW, 1.0, C, (C,), ZO_EPS, stochastic=True), True),
    "update of ip-sgd": (Operation(DRAW, 1.0, C, stochastic=True), True),
}
"""By name, what is computed of bf16 weights, and whether there is a gradient."""


def milliseconds(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the median time of a call on the stream."""
    taken = []
    for turn in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def large(elements: int) -> list[dict[str, Any]]:
    """Measure the operations over one large slice."""
    weight = torch.randn(elements, device="cuda").mul_(0.02).bfloat16()
    out, gradient = torch.empty_like(weight), torch.randn(elements, device="cuda").bfloat16()
    kept = torch.zeros(1, dtype=torch.int32, device="cuda")
    slices = [Slice(weight, 4, 0)]
    calls: dict[str, Callable[[], object]] = {"copy": partial(out.copy_, weight)}
    for name, (operation, has_gradient) in OPERATIONS.items():
        target, read = (None, [gradient]) if has_gradient else (out, None)
        calls[name] = partial(kernels.fused, slices, operation, target, read, kept)
    rows = []
    for name, call in calls.items():
        taken = milliseconds(call)
        speed = elements / taken / 1e6
        size = 6 if "update" in name else 4  # bytes read and written of an element
        row = {"operation": name, "ms": taken, "G elements/s": speed, "TB/s": speed * size / 1e3}
        rows.append(row)
    return rows


def small(parameters: int, calls: int = 200) -> dict[str, Any]:
    """Measure calls over many small parameters, for the host and until the device has done them."""
    weights = torch.zeros(parameters, SMALL, dtype=torch.bfloat16, device="cuda")
    slices = [Slice(weight, number, 0) for number, weight in enumerate(weights)]
    out, _ = kernels.room_for(slices)
    operation, _ = OPERATIONS["perturb"]

    def many() -> None:
        for _ in range(calls):
            kernels.fused(slices, operation, out)

    many()
    torch.cuda.synchronize()
    start = time.perf_counter()
    many()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()
    host, both = ((end - start) / calls * 1e6 for end in (issued, done))
    return {"parameters of 5120": parameters, "host us a call": host, "us a call": both}


def main() -> None:
    """Measure, print two tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "circumstances": {**collect_provenance(), "device": torch.cuda.get_device_name()},
        "implementation": kernels.implementation("cuda").__name__,
        "large": large(LARGE),
        "small": [small(number) for number in PARAMETERS],
    }
    for rows in (result["large"], result["small"]):
        for row in rows:
            print(
                "  ".join(
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                )
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
