"""Speed of the kernels on a CPU, beside torch.normal + add_ and a plain copy.

The contenders take turns, round after round, so that a busy spell of the machine meets them all;
medians and quartiles over the rounds are reported, and how busy the machine was. Column "x" is the
speed relative to torch.normal + add_ on bf16 weights with one thread, by wall-clock time and, for a
machine that others use too, by the CPU time of the one thread.

    OMP_NUM_THREADS=2 python benchmarks/noise.py --output noise.json
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run as a script

from addax_ds.kernels import cpu, reference
from addax_ds.kernels.operation import Draw, Operation, Slice
from benchmarks.common import collect_provenance

DRAW = Draw(seed=1, step=2, parameter_id=3)
START = 5  # not at the border of a tile
C = 1e-9  # small, since the weights are updated over and over
ZO_EPS = 1e-3
# What training computes for bf16 weights.
PERTURB = Operation(DRAW, c2=(C,))
UPDATE = Operation(DRAW, c1=C, c2=(C / (2 * ZO_EPS),), zo_eps=ZO_EPS, stochastic=True)

# By operation and implementation.
Contenders = dict[tuple[str, str], Callable[[], object]]
# Wall seconds, and CPU seconds of the calling thread, of each round, by operation, implementation
# and number of threads.
Timings = dict[tuple[str, str, int], list[tuple[float, float]]]


def contenders(elements: int) -> tuple[Contenders, dict[str, int]]:
    """Return calls by (operation, implementation), and bytes moved per element by operation."""
    weight = torch.randn(elements).mul_(0.02).bfloat16()
    out = torch.empty_like(weight)
    gradient = torch.randn(elements)
    narrow_gradient = gradient.bfloat16()
    z = torch.empty(elements)

    def torch_perturb() -> None:
        noise = torch.normal(0.0, 1.0, size=weight.shape, dtype=weight.dtype)
        weight.add_(noise, alpha=C)

    def torch_update() -> None:
        weight.add_(narrow_gradient, alpha=C)
        torch_perturb()

    calls: Contenders = {
        ("copy bf16", "torch"): lambda: out.copy_(weight),
        ("gaussian fp32", "torch"): lambda: torch.normal(0.0, 1.0, size=(elements,), out=z),
        ("perturb bf16", "torch"): torch_perturb,
        ("update bf16", "torch"): torch_update,
    }
    slices = [Slice(weight, DRAW.parameter_id, START)]
    for name, kernels in (("reference", reference), ("cpp", cpu)):
        calls |= {
            ("gaussian fp32", name): partial(kernels.gaussian, z, DRAW, START),
            ("perturb bf16", name): partial(kernels.fused, slices, PERTURB, out),
            ("update bf16", name): partial(kernels.fused, slices, UPDATE, None, [narrow_gradient]),
            ("update bf16, fp32 gradient", name): partial(
                kernels.fused, slices, UPDATE, None, [gradient]
            ),
        }
    moved = {
        "copy bf16": 4,
        "gaussian fp32": 4,
        "perturb bf16": 4,
        "update bf16": 6,
        "update bf16, fp32 gradient": 8,
    }
    return calls, moved


def measure(calls: Contenders, threads: list[int], rounds: int) -> Timings:
    """Time every call in every round, the reference on one thread only."""
    seconds: Timings = {}
    for turn in range(rounds + 1):
        for (operation, name), call in calls.items():
            for number in threads:
                if name == "reference" and number > 1:
                    continue
                torch.set_num_threads(number)
                cpu_before, before = time.thread_time(), time.perf_counter()
                call()
                wall, cpu_seconds = time.perf_counter() - before, time.thread_time() - cpu_before
                if turn > 0:  # the first one warms up
                    timings = seconds.setdefault((operation, name, number), [])
                    timings.append((wall, cpu_seconds))
    return seconds


def summarise(seconds: Timings, elements: int, moved: dict[str, int]) -> list[dict]:
    """One row a contender, compared with torch.normal + add_ on one thread."""
    rows: list[dict] = []
    for (operation, name, number), timings in seconds.items():
        wall = [w for w, _ in timings]
        low, median, high = statistics.quantiles(wall, n=4)
        cpu_median = statistics.median(c for _, c in timings)
        rows.append(
            {
                "operation": operation,
                "implementation": name,
                "threads": number,
                "seconds": {"median": median, "quartiles": [low, high], "best": min(wall)},
                "thread_seconds_median": cpu_median,
                "elements_per_second": elements / median,
                "gigabytes_per_second": elements * moved[operation] / median / 1e9,
            }
        )
    baseline = next(
        row
        for row in rows
        if (row["operation"], row["implementation"], row["threads"]) == ("perturb bf16", "torch", 1)
    )
    for row in rows:
        row["times_normal_and_add"] = baseline["seconds"]["median"] / row["seconds"]["median"]
        if row["threads"] == 1:
            row["times_normal_and_add_by_cpu_time"] = (
                baseline["thread_seconds_median"] / row["thread_seconds_median"]
            )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = "operation, implementation, threads, G elements/s, quartiles, GB/s, x, x by CPU time"
    columns = head.split(", ")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        elements = row["elements_per_second"] * row["seconds"]["median"]
        low, high = (elements / t / 1e9 for t in reversed(row["seconds"]["quartiles"]))
        by_cpu_time = row.get("times_normal_and_add_by_cpu_time")
        lines.append(
            f"| {row['operation']} | {row['implementation']} | {row['threads']} "
            f"| {row['elements_per_second'] / 1e9:.2f} | {low:.2f} to {high:.2f} "
            f"| {row['gigabytes_per_second']:.1f} | {row['times_normal_and_add']:.1f} "
            f"| {'' if by_cpu_time is None else f'{by_cpu_time:.1f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--elements",
        type=int,
        default=1 << 24,
        help="length of every tensor; in a shorter one than by default, caches are measured",
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at least 2")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="must include 1")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.rounds < 2 or 1 not in arguments.threads:
        parser.error("--rounds must be 2 or more, and --threads must include 1")

    load_before = os.getloadavg()
    calls, moved = contenders(arguments.elements)
    seconds = measure(calls, arguments.threads, arguments.rounds)
    rows = summarise(seconds, arguments.elements, moved)
    result = {
        "configuration": {k: v for k, v in vars(arguments).items() if k != "output"},
        "circumstances": {
            **collect_provenance(),
            "lanes": cpu.load().addax_lanes(),
            "compiler": cpu.compiler_version().splitlines()[0],
            "flags": list(cpu.FLAGS),
        },
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "results": rows,
    }
    print(table(rows))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
