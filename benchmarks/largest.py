"""The largest OPT that each method trains on two ZeRO-3 ranks within a given host memory.

    python benchmarks/largest.py --memory 20 --output benchmarks/results

Random bf16 weights in the published shapes, two whole steps: a zeroth-order batch of one row of 128
tokens a rank, a first-order batch of one row of 64 (methods without one of the two train on the
other). From the largest shape whose planned total is below the memory, each method goes up until
ranks together hold more (their proportional set sizes, so shared pages count once; they are then
killed) or, if that one fails, down until one trains. Writes largest.json and prints a table.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from transformers import OPTConfig
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # the launcher runs this file as a script

from addax_ds.distributed.collectives import shutdown
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.optim.methods import ZEROTH_ORDER, Method
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import OPT_FAMILY, shape_of
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings, automatic_sizes
from benchmarks.common import collect_provenance, one_thread_each
from benchmarks.live import ALPHAS, OPTIMIZERS, batch_of, closure
from studies.jobs import script
from studies.scaling.model import random_model

RANKS = 2
STEPS = 2
ROWS, LONG, SHORT = 1, 128, 64
METHODS = tuple(OPTIMIZERS)
_POLL_S = 0.25
_LIMIT_S = 3600.0  # of one attempt
# glibc keeps freed blocks of up to 32 MB, several GB of shards and copies, if it is not told.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}

# ---- one rank ------------------------------------------------------------------------------------


def train(name: str, method: Method) -> dict[str, Any]:
    """Train random weights for two steps; return the seconds of each."""
    config = _config(name, method)
    shape = OPTConfig(**OPT_FAMILY[name], use_cache=False)
    live = HfDeepSpeedConfig(config)  # random_model looks for it
    model = random_model(shape, "zero3", torch.bfloat16, torch.device("cpu"))
    del live
    engine, optimizer, _, _ = deepspeed.initialize(model=model.train(), config=config)
    long, short = (closure(engine, batch_of(ROWS, n, n - 1)) for n in (LONG, SHORT))
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        first = optimizer.measure(long, short) if method in ALPHAS else short()
        if first is not None:
            engine.backward(first)
        engine.step()
        seconds.append(round(time.perf_counter() - began, 2))
    return {"step_seconds": seconds}


def _config(name: str, method: Method) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "bf16": {"enabled": True},
        "optimizer": OPTIMIZERS[method],
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(name),
    }


def _zero(name: str) -> dict[str, Any]:
    """Return the sizes that Trainer puts for "auto", and no parameter kept for its next use."""
    hidden = OPT_FAMILY[name]["hidden_size"]
    return {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        **automatic_sizes(hidden),
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 12 * hidden**2,
    }


# ---- all ranks -----------------------------------------------------------------------------------


def planned(name: str, method: Method) -> int:
    """Return the planner's total of all ranks, in bytes."""
    shape = shape_of(OPTConfig(**OPT_FAMILY[name]), name)
    spec = StepSpec(
        shape,
        method,
        "zero3",
        RANKS,
        Batch(ROWS, LONG, LONG - 1) if method in ZEROTH_ORDER else None,
        Batch(ROWS, SHORT, SHORT - 1) if method != "mezo" else None,
        zero3=Zero3Settings.from_json(_zero(name), shape.hidden),
        cuda=False,
    )
    return RANKS * step_memory(spec).total


def attempt(name: str, method: Method, memory: float) -> dict[str, Any]:
    """Train on ranks of their own, killed when together they hold more than ``memory``."""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        words = [script("deepspeed"), "--num_gpus", str(RANKS), __file__]
        words += ["--model", name, "--method", method, "--output", str(result)]
        print(f"{name} {method}: {shlex.join(words)}", flush=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                words,
                env={**one_thread_each(), **_MALLOC},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        peak = _watch(process, memory)
        found = json.loads(result.read_text()) if result.exists() else {}
        trained = process.returncode == 0 and bool(found)
        if not trained and peak <= memory:
            raise RuntimeError(f"{name} {method} failed:\n{log.read_text(errors='replace')}")
    planned_bytes = planned(name, method)
    return {
        "model": name,
        "method": method,
        "trained": trained,
        "peak": peak,
        "planned": planned_bytes,
        **found,
    }


def _watch(process: subprocess.Popen[bytes], memory: float) -> int:
    """Return the most that the process tree has held; end it if that is too much."""
    peak, deadline = 0, time.monotonic() + _LIMIT_S
    while process.poll() is None:
        peak = max(peak, _held(process.pid))
        if peak > memory or time.monotonic() > deadline:
            ranks = psutil.Process(process.pid).children(recursive=True)  # in their own sessions
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
            break
        time.sleep(_POLL_S)
    return peak


def _held(pid: int) -> int:
    total = 0
    try:
        for process in psutil.Process(pid).children(recursive=True):
            if "--local_rank" in " ".join(process.cmdline()):
                total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it has just ended
    return total


def search(method: Method, memory: float) -> list[dict[str, Any]]:
    """Return attempts around the largest model that trains."""
    names = list(OPT_FAMILY)
    fits = [name for name in names if planned(name, method) <= memory]
    start = names.index(fits[-1]) if fits else 0
    attempts = [attempt(names[start], method, memory)]
    step = 1 if attempts[-1]["trained"] else -1
    number = start + step
    while 0 <= number < len(names) and attempts[-1]["trained"] == (step > 0):
        weights = 2 * shape_of(OPTConfig(**OPT_FAMILY[names[number]]), names[number]).parameters
        if weights > memory:
            break  # nothing to be tried
        attempts.append(attempt(names[number], method, memory))
        number += step
    return attempts


def row(result: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = (
        result["method"],
        result["model"],
        "yes" if result["trained"] else "no, killed",
        f"{result['planned'] / 1e9:.1f}",
        f"{result['peak'] / 1e9:.1f}",
        ", ".join(map(str, result.get("step_seconds", []))),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train as a rank, or search with every method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=float, default=20.0, help="of all ranks together, GB")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output", type=Path, required=True, help="folder; of a rank, a file")
    parser.add_argument("--model", choices=OPT_FAMILY, help="train this one as a rank")
    parser.add_argument("--method", choices=METHODS, help="likewise")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    if arguments.model:
        torch.set_num_threads(1)
        init_deepspeed()
        result = train(arguments.model, arguments.method)
        if dist.get_rank() == 0:
            arguments.output.write_text(json.dumps(result))
        shutdown()
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = []
    print("| method | model | trains | planned GB | peak GB | seconds of the steps |")
    print("|---|---|---|---|---|---|", flush=True)
    for method in arguments.methods:
        results += search(method, arguments.memory * 1e9)
        report = {"memory_gb": arguments.memory, "circumstances": collect_provenance()}
        path = arguments.output / "largest.json"
        path.write_text(json.dumps({**report, "results": results}, indent=1) + "\n")
    print("\n".join(map(row, results)))


if __name__ == "__main__":
    main()
