"""Cost of an Addax step under ZeRO-3 beside the sum of its parts, SGD, AdamW, MeZO and LOMO.

    deepspeed --num_gpus 2 benchmarks/step.py --shape opt-125m --output benchmarks/results

`contenders` says what each of them does. They take turns, round after round, in the opposite order
in every other round, so that a busy spell of the machine meets them all; medians and quartiles over
the rounds are reported. Ratios of Addax to its parts are taken within a round. Then, not timed:

- communication: collectives of one step, and the bytes a rank sends in it if they run in a ring;
- memory: each contender takes three steps in processes of its own. The peaks are of these steps;
  RSS includes interpreter and libraries, and is given before the model was made, too. Model state
  is what is alive after the steps, summed over ranks. The parts are left out, since they do
  without what they need not time.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the launcher runs this file as a script

from addax_ds.distributed.collectives import shutdown
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.utils.bf16_matmul import multiply_in_fp32
from benchmarks.common import (
    SHAPES,
    all_live_tensors,
    collect_provenance,
    live_bytes,
    parameter_count,
)
from benchmarks.contenders import CONTENDERS, USUAL, Contender, zero_configuration
from studies.collectives import CollectiveCounter, ring_bytes
from studies.jobs import free_port

LENGTHS = {"tiny": (32, 16), "opt-1.3b": (1024, 256)}
USUAL_LENGTHS = (256, 64)  # of the zeroth-order (long) and the first-order (short) batch
WARM_UP_ROUNDS = 3  # DeepSpeed follows its recorded order of modules from the third step on
STEPS_ALONE = 3


@dataclass(frozen=True)
class Workload:
    """Work of every contender: a shape, and each rank's rows a step."""

    shape: str
    long_rows: int
    short_rows: int

    def batches(self) -> tuple[Tensor, Tensor]:
        """Random tokens, the same in every step and others on every rank."""
        long, short = LENGTHS.get(self.shape, USUAL_LENGTHS)
        words = SHAPES[self.shape].get("vocab_size", 50272)
        generator = torch.Generator().manual_seed(dist.get_rank())
        sizes = ((self.long_rows, long), (self.short_rows, short))
        device = get_accelerator().current_device_name()
        first, second = (
            torch.randint(words, size, generator=generator).to(device) for size in sizes
        )
        return first, second

    def build(self, name: str) -> Contender:
        """Make a contender."""
        return CONTENDERS[name](self.shape, *self.batches())


@dataclass(frozen=True)
class Sample:
    """One step of one contender on this rank."""

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    losses: dict[str, float]


# ---- time --------------------------------------------------------------------------------------


def take_turns(contenders: dict[str, Contender], rounds: int) -> dict[str, list[Sample]]:
    """Let every contender take a step in every round; the first rounds do not count."""
    samples: dict[str, list[Sample]] = {name: [] for name in contenders}
    for turn in range(WARM_UP_ROUNDS + rounds):
        names = list(contenders)
        for name in names if turn % 2 else reversed(names):
            sample = timed_step(contenders[name])
            if turn >= WARM_UP_ROUNDS:
                samples[name].append(sample)
    return samples


def timed_step(contender: Contender) -> Sample:
    """Time one step, from when all ranks are ready to when all are done."""
    phases, losses = {}, {}
    _wait_for_all()
    cpu_before, before = time.process_time(), time.perf_counter()
    last = before
    for phase, run in contender.phases.items():
        losses[phase] = run()
        get_accelerator().synchronize()
        now = time.perf_counter()
        phases[phase] = now - last
        last = now
    cpu_seconds = time.process_time() - cpu_before
    _wait_for_all()
    return Sample(time.perf_counter() - before, cpu_seconds, phases, losses)


def summarise(by_rank: list[list[Sample]]) -> dict[str, Any]:
    """Summarise a contender's samples: wall-clock of rank 0, CPU seconds of all ranks together."""
    first = by_rank[0]
    losses = {
        phase: [statistics.fmean(samples[i].losses[phase] for samples in by_rank) for i in (0, -1)]
        for phase in first[0].losses
    }
    return {
        "seconds": spread([sample.seconds for sample in first]),
        "cpu_seconds": spread(cpu_seconds(by_rank)),
        "phase_seconds": {
            phase: spread([sample.phases[phase] for sample in first]) for phase in first[0].phases
        },
        "first_and_last_loss": losses,
    }


def cpu_seconds(by_rank: list[list[Sample]]) -> list[float]:
    """CPU seconds of each step, all ranks together."""
    return [sum(s.cpu_seconds for s in samples) for samples in zip(*by_rank, strict=True)]


def ratios(addax: list[list[Sample]], parts: list[list[Sample]]) -> dict[str, Any]:
    """Addax over its parts, each round by itself."""

    def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
        return spread([a / b for a, b in zip(ours, theirs, strict=True)])

    ours, theirs = addax[0], parts[0]
    return {
        "seconds": paired([s.seconds for s in ours], [s.seconds for s in theirs]),
        "cpu_seconds": paired(cpu_seconds(addax), cpu_seconds(parts)),
        "phase_seconds": {
            phase: paired([s.phases[phase] for s in ours], [s.phases[phase] for s in theirs])
            for phase in ours[0].phases
        },
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartiles": [low, high]}


# ---- communication and memory ------------------------------------------------------------------


def communication(contender: Contender) -> dict[str, Any]:
    """Count the collectives of one step: calls, and bytes of the whole tensors, by kind."""
    with CollectiveCounter() as counter:
        for run in contender.phases.values():
            run()
    calls, sizes = Counter[str](), Counter[str]()
    for kind, size in counter.calls:
        calls[kind] += 1
        sizes[kind] += size
    # In a ring a tensor goes round once for a gather or a reduce-scatter, twice for an all-reduce.
    payload = sum((2 if "allreduce" in kind else 1) * sizes[kind] for kind in sizes)
    ranks = dist.get_world_size()
    return {
        "collectives": {kind: {"calls": calls[kind], "bytes": sizes[kind]} for kind in calls},
        "sent_bytes_per_rank": int(ring_bytes(1, payload, ranks)),
    }


def memory(workload: Workload, name: str) -> dict[str, Any] | None:
    """Run a contender in fresh processes, one a rank, and return what it needs."""
    if name == "parts":
        return None
    # The fork server has imported everything and done nothing else; CUDA does not survive a fork.
    method = "forkserver" if _on_cpu() else "spawn"
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        mine = pool.submit(_memory_alone, workload, name, _common_port()).result()
    by_rank = gather(mine)
    state = sum(values.pop("state_bytes") for values in by_rank)
    return {
        "by_rank": by_rank,
        "state_bytes_per_parameter": state / parameter_count(workload.shape),
    }


def _memory_alone(workload: Workload, name: str, port: int) -> dict[str, int | None]:
    os.environ["MASTER_PORT"] = str(port)
    _start()
    rss_before, live_before = _status_bytes("VmRSS"), live_bytes(all_live_tensors())
    contender = workload.build(name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    get_accelerator().reset_peak_memory_stats()
    for _ in range(STEPS_ALONE):
        for run in contender.phases.values():
            run()
    result = {
        "peak_rss_bytes": _status_bytes("VmHWM"),
        "rss_before_model_bytes": rss_before,
        "peak_device_bytes": None if _on_cpu() else get_accelerator().max_memory_allocated(),
    }
    gc.collect()  # of the last step
    result["state_bytes"] = live_bytes(all_live_tensors()) - live_before
    shutdown()
    return result


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _common_port() -> int:
    return gather(free_port())[0]


# ---- all ranks ---------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """Collect a value of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def _wait_for_all() -> None:
    get_accelerator().synchronize()
    dist.barrier()


def _start() -> None:
    # With it, DeepSpeed sets up 69 MB of shared memory a rank for inference and never removes it.
    os.environ.pop("LOCAL_SIZE", None)
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    multiply_in_fp32()
    init_deepspeed()


def run(workload: Workload, names: list[str], rounds: int, with_memory: bool) -> dict[str, Any]:
    """Measure contenders by name."""
    memories = {name: memory(workload, name) if with_memory else None for name in names}
    contenders = {name: workload.build(name) for name in names}
    samples = {k: gather(v) for k, v in take_turns(contenders, rounds).items()}
    results = {
        name: {
            **summarise(samples[name]),
            "communication": communication(contender),
            "memory": memories[name],
        }
        for name, contender in contenders.items()
    }
    both = {"addax", "parts"} <= set(names)
    return {
        "addax_over_parts": ratios(samples["addax"], samples["parts"]) if both else None,
        "contenders": results,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = "contender, s/step, quartiles, CPU s, MB sent/rank, peak MB/rank, state B/parameter"
    columns = head.split(", ")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, result in results["contenders"].items():
        low, high = result["seconds"]["quartiles"]
        needs, peak, state = result["memory"], "", ""
        if needs:
            peaks = (r["peak_device_bytes"] or r["peak_rss_bytes"] for r in needs["by_rank"])
            peak = f"{max(peaks) / 1e6:.0f}"
            state = f"{needs['state_bytes_per_parameter']:.2f}"
        lines.append(
            f"| {name} | {result['seconds']['median']:.3f} | {low:.3f} to {high:.3f} "
            f"| {result['cpu_seconds']['median']:.2f} "
            f"| {result['communication']['sent_bytes_per_rank'] / 1e6:.0f} "
            f"| {peak} | {state} |"
        )
    ratio = results["addax_over_parts"]
    if ratio:
        median, (low, high) = ratio["seconds"]["median"], ratio["seconds"]["quartiles"]
        lines += ["", f"addax over parts: {median:.3f} ({low:.3f} to {high:.3f})"]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, at least 2")
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", default=list(USUAL))
    parser.add_argument("--long_rows", type=int, default=3, help="zeroth-order rows a rank")
    parser.add_argument("--short_rows", type=int, default=2, help="first-order rows a rank")
    parser.add_argument("--no_memory", action="store_true", help="leave the fresh processes out")
    parser.add_argument("--output", type=Path, help="folder for step.json")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)

    _start()
    load_before = os.getloadavg()
    workload = Workload(arguments.shape, arguments.long_rows, arguments.short_rows)
    results = run(workload, arguments.contenders, arguments.rounds, not arguments.no_memory)
    document = {
        "configuration": {
            **{k: v for k, v in vars(arguments).items() if k not in ("output", "local_rank")},
            "lengths": LENGTHS.get(arguments.shape, USUAL_LENGTHS),
            "ranks": dist.get_world_size(),
            "parameters": parameter_count(arguments.shape),
            "zero_optimization": zero_configuration(arguments.shape),
        },
        "circumstances": collect_provenance(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        **results,
    }
    if dist.get_rank() == 0:
        print(table(results))
        if arguments.output:
            text = json.dumps(document, indent=2)
            (arguments.output / "step.json").write_text(text + "\n")
    shutdown()


if __name__ == "__main__":
    main()
