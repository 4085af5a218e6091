"""Steps of a real shape on one GPU: seconds, memory beside the plan, and what the device did.

    python benchmarks/gpu/steps.py --shape opt-13b --sharding zero3 --output steps.json

One rank, random bf16 weights, `TARGETS` predicted tokens a row. All methods take steps of one
model by one optimizer: Addax, MeZO (its alpha is 1) and in-place SGD (0), which takes the long rows
through backward, with checkpointing and without where that is planned to fit. "parts" is what a
step of Addax is made of, without an engine: two forwards of the long rows, forward and backward of
the short ones, and gradients that are dropped. Under ZeRO-3 ``benchmarks/step.py`` measures them.

A time is the median from an idle device to an idle device. Peaks are what tensors take
(``allocated``), and with them what waits for a stream until it is free again (``active``).
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import OPTConfig
from transformers.integrations import HfDeepSpeedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # this file is run as a script

import addax_ds
from addax_ds.config.deepspeed import load_ds_config
from addax_ds.distributed.startup import init_deepspeed
from addax_ds.optim.methods import Method
from addax_ds.planner.constants import GB
from addax_ds.planner.memory import StepSpec, step_memory
from addax_ds.planner.shapes import shape_of
from addax_ds.planner.trace import Batch
from addax_ds.planner.zero3 import Zero3Settings, automatic_sizes
from benchmarks.common import collect_provenance
from benchmarks.live import ALPHAS, MODELS, batch_of, closure
from studies.jobs import free_port
from studies.scaling.model import random_model

TARGETS = 8
WARM_UP_STEPS = 3  # DeepSpeed follows its recorded order of modules from the third step on

Step = Callable[[], None]


class Bench:
    """One model on one back end.

    Args:
        shape: name of an OPT.
        sharding: name of a back end.
    """

    def __init__(self, shape: str, sharding: str) -> None:
        self.shape, self.sharding = shape, sharding
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = OPTConfig(**MODELS[shape], dropout=0.0, use_cache=False)
        self.zero = _zero_optimization(self.config.hidden_size)
        began = time.perf_counter()
        if sharding == "zero3":
            self._with_deepspeed()
        else:
            self._attached()
        self._synchronize()
        self.seconds_to_start = time.perf_counter() - began

    def _with_deepspeed(self) -> None:
        import deepspeed

        init_deepspeed()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "timers": {"throughput": {"enabled": False}},
            "optimizer": {"type": "Addax", "params": {"lr": 1e-7}},
            "zero_optimization": self.zero,
        }
        alive = HfDeepSpeedConfig(config)
        self.model = random_model(self.config, "zero3", torch.bfloat16, self.device).train()
        del alive
        engine, wrapped, _, _ = deepspeed.initialize(model=self.model, config=config)
        self.called, self.backward, self.finish = engine, engine.backward, engine.step
        self.optimizer: Any = wrapped.optimizer

    def _attached(self) -> None:
        if self.sharding == "fsdp2":
            dist.init_process_group()
        self.model = random_model(self.config, self.sharding, torch.bfloat16, self.device).train()
        self.optimizer = addax_ds.Addax(self.model.parameters(), lr=1e-7)
        addax_ds.attach(self.optimizer, self.model)
        self.called, self.backward, self.finish = self.model, Tensor.backward, self.optimizer.step

    # ---- what is measured ------------------------------------------------------------------------

    def measure(
        self, method: Method, long: Batch, short: Batch, *, steps: int, checkpointing: bool
    ) -> dict[str, Any]:
        """Take steps of a method; return seconds and GB."""
        first = short if method == "addax" else long
        self._set_checkpointing(checkpointing)
        self.optimizer.alpha = ALPHAS[method]
        step = self.step(self.loss_of(long), self.loss_of(first))
        found = {
            "method": method + (" with checkpointing" if checkpointing else ""),
            "rows": f"{long.rows} x {long.length}"
            + (f", {first.rows} x {first.length}" if method == "addax" else ""),
            **self.timed(step, steps),
        }
        self._set_checkpointing(False)
        return found

    def step(self, zeroth: Callable[[], Tensor], first: Callable[[], Tensor]) -> Step:
        """Return what takes a step."""

        def run() -> None:
            loss = self.optimizer.measure(zeroth, first)
            if loss is not None:
                self.backward(loss)
            self.finish()

        return run

    def parts(self, long: Batch, short: Batch, *, steps: int) -> dict[str, Any]:
        """Time what a step of Addax is made of; the optimizer is gone after it."""
        self.optimizer.sharding.detach()
        zeroth, first = self.loss_of(long), self.loss_of(short)
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop)

        def run() -> None:
            with torch.no_grad():
                zeroth()
                zeroth()
            first().backward()
            for parameter in self.model.parameters():  # those of FSDP2, which calls no hook
                parameter.grad = None

        rows = f"{long.rows} x {long.length}, {short.rows} x {short.length}"
        return {"method": "parts", "rows": rows, **self.timed(run, steps)}

    def timed(self, step: Step, steps: int) -> dict[str, float]:
        """Return median seconds of steps, and their peaks."""
        gc.collect()
        for _ in range(WARM_UP_STEPS):
            step()
        self._synchronize()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        retries = torch.cuda.memory_stats()["num_alloc_retries"] if on_gpu else 0
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            self._synchronize()
            taken.append(time.perf_counter() - began)
        found = {"seconds": statistics.median(taken), "slowest": max(taken)}
        if on_gpu:
            memory = torch.cuda.memory_stats()
            for kind in ("allocated", "active", "reserved"):
                found[f"{kind} GB"] = memory[f"{kind}_bytes.all.peak"] / GB
            found["retries"] = memory["num_alloc_retries"] - retries
        return found

    def profiled(self, long: Batch, short: Batch) -> dict[str, Any]:
        """Return what the device does in a step of Addax: how long it is busy, and with what."""
        self.optimizer.alpha = ALPHAS["addax"]
        step = self.step(self.loss_of(long), self.loss_of(short))
        for _ in range(2):
            step()
        self._synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            step()
            self._synchronize()
        spans: list[tuple[float, float]] = []
        by_name: dict[str, list[float]] = {}
        for event in profiler.events():
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                start, end = event.time_range.start, event.time_range.end
                spans.append((start, end))
                by_name.setdefault(event.name[:100], []).append((end - start) / 1e3)
        if not spans:
            return {"kernels": 0}
        spans.sort()
        busy = last = 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, last))
            last = max(last, end)
        longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
        return {
            "kernels": len(spans),
            "busy ms": busy / 1e3,
            "from first to last ms": (last - spans[0][0]) / 1e3,
            "ms by kernel": {name: sum(times) for name, times in longest[:25]},
            "calls by kernel": {name: len(times) for name, times in longest[:25]},
        }

    # ---- parts of it -----------------------------------------------------------------------------

    def loss_of(self, batch: Batch) -> Callable[[], Tensor]:
        """Return a closure that computes the loss of random rows."""
        rows = batch_of(batch.rows, batch.length, batch.targets)
        return closure(self.called, rows, self.device)

    def plan(self, method: Method, long: Batch, short: Batch, *, checkpointing: bool) -> int:
        """Return the bytes that the planner says."""
        first = short if method == "addax" else long
        spec = StepSpec(
            shape_of(self.config, self.shape),
            method,
            self.sharding,
            1,
            long if method != "ip-sgd" else None,
            first if method != "mezo" else None,
            checkpointing=checkpointing,
            zero3=Zero3Settings.from_json(self.zero, self.config.hidden_size),
            cuda=self.device.type == "cuda",
        )
        return step_memory(spec).total

    def _set_checkpointing(self, wanted: bool) -> None:
        model: Any = self.model
        if wanted:
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _zero_optimization(hidden: int) -> dict[str, Any]:
    """Return what Trainer makes of ds_configs/zero3.json."""
    shipped = load_ds_config("zero3")[0]["zero_optimization"]
    automatic = automatic_sizes(hidden)
    return {key: automatic[key] if value == "auto" else value for key, value in shipped.items()}


def _drop(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _batches(text: str) -> tuple[Batch, Batch]:
    """Parse ``4x1024,2x256``."""
    long, short = (
        Batch(int(rows), int(length), TARGETS)
        for rows, length in (part.split("x") for part in text.split(","))
    )
    return long, short


def main() -> None:
    """Measure one shape on one back end, print a line a measurement, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="opt-1.3b")
    parser.add_argument("--sharding", choices=("zero3", "fsdp2", "none"), default="zero3")
    parser.add_argument("--batches", type=_batches, nargs="+", default=[_batches("4x1024,2x256")])
    parser.add_argument("--methods", choices=ALPHAS, nargs="+", default=list(ALPHAS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}

    bench = Bench(arguments.shape, arguments.sharding)
    on_gpu = bench.device.type == "cuda"
    document: dict[str, Any] = {
        "shape": arguments.shape,
        "sharding": arguments.sharding,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "steps": arguments.steps,
        "warm-up steps": WARM_UP_STEPS,
        "predicted tokens of a row": TARGETS,
        "seconds to start": bench.seconds_to_start,
        "zero_optimization": bench.zero if arguments.sharding == "zero3" else None,
        "circumstances": collect_provenance(),
        "measured": [],
    }

    def note(row: dict[str, Any]) -> None:
        document["measured"].append(row)
        cells = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{arguments.shape} {arguments.sharding}: {', '.join(cells)}", flush=True)
        if arguments.output:  # as far as it is, should there be no end
            arguments.output.write_text(json.dumps(document, indent=1) + "\n")

    print(f"{arguments.shape} {arguments.sharding}: ready in {bench.seconds_to_start:.1f} s")
    usual, *others = arguments.batches
    room = torch.cuda.mem_get_info()[1] * 0.9 if on_gpu else float("inf")
    jobs: list[tuple[Method, tuple[Batch, Batch], bool]] = [
        (method, usual, checkpointing)
        for method in arguments.methods
        for checkpointing in ((True, False) if method == "ip-sgd" else (False,))
    ]
    jobs += [("addax", batches, False) for batches in others]
    for method, batches, checkpointing in jobs:
        planned = bench.plan(method, *batches, checkpointing=checkpointing)
        if planned < room:
            more = {"steps": arguments.steps, "checkpointing": checkpointing}
            note({**bench.measure(method, *batches, **more), "planned GB": planned / GB})
    document["profile"] = bench.profiled(*usual)
    if arguments.sharding != "zero3":
        note(bench.parts(*usual, steps=arguments.steps))
    profile_found = {k: v for k, v in document["profile"].items() if "by kernel" not in k}
    print(f"{arguments.shape} {arguments.sharding}: profile {profile_found}")
    for name, spent in document["profile"].get("ms by kernel", {}).items():
        calls = document["profile"]["calls by kernel"][name]
        print(f"  {spent:9.2f} ms {calls:6} x {name[:90]}")
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
