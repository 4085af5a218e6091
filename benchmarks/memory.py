"""Counts live model state and live gradients under ZeRO-3, for Addax beside SGD and AdamW.

    deepspeed --num_gpus 2 benchmarks/memory.py --shape opt-125m

Every live tensor of the process is counted after three steps (model state), and every gradient,
bucket and collective buffer while backward runs (peak gradient). Weights are bf16 and random;
nothing is persistent. SGD and AdamW are torch's own, in DeepSpeed's ZeRO-3 optimizer.
"""

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.comm import coalesced_collectives
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the launcher runs this file as a script

import addax_ds  # noqa: F401  (registers the optimizer)
from addax_ds.distributed.collectives import shutdown
from addax_ds.distributed.startup import init_deepspeed
from benchmarks.common import (
    all_live_tensors,
    collect_provenance,
    live_bytes,
    parameter_count,
    random_model,
)

BUCKETS = {"tiny": 100_000, "opt-125m": 5_000_000}
BYTES = 2  # bf16

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "addax": {"type": "Addax", "params": {"lr": 1e-3, "alpha": 1e-3}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-3}},
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


class GradientWatch:
    """Measures the gradients alive whenever a bucket is reduce-scattered and a gradient is born."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.peak = 0
        self._model = model
        self._optimizer = optimizer
        self._reduce = coalesced_collectives._torch_reduce_scatter_fn
        coalesced_collectives._torch_reduce_scatter_fn = self._reduce_and_measure
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self._measure())

    def _reduce_and_measure(self, full: Tensor, part: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._measure(full)
        return self._reduce(full, part, *args, **kwargs)

    def _measure(self, *more: Tensor) -> None:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        buckets = [b.buffer for b in self._optimizer.ipg_buckets.values() if b.buffer is not None]
        partitions = self._optimizer.grad_partitions_flat_buffer
        self.peak = max(self.peak, live_bytes([*gradients, *buckets, partitions, *more]))

    def close(self) -> None:
        """Stop watching collectives."""
        coalesced_collectives._torch_reduce_scatter_fn = self._reduce


def examine(name: str, shape: str) -> dict[str, int]:
    """Train three steps with one optimizer and return what was alive, in bytes on this rank."""
    model: Any = random_model(shape, torch.device("cpu"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": OPTIMIZERS[name],
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": BUCKETS[shape],
            "stage3_param_persistence_threshold": 0,
        },
    }
    other = live_bytes(all_live_tensors()) - live_bytes(model.parameters())
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    watch = GradientWatch(model, optimizer)
    tokens = torch.randint(0, 1000, (2, 32))  # words that every shape knows

    def loss() -> Tensor:
        return engine(input_ids=tokens, labels=tokens).loss

    for _ in range(3):
        if name == "addax":
            optimizer.measure(loss, None)
        engine.backward(loss())
        engine.step()
    watch.close()
    result = {
        "state_bytes": live_bytes(all_live_tensors()) - other - live_bytes([tokens]),
        "peak_gradient_bytes": watch.peak,
        "parameters": parameter_count(shape),
        "largest_parameter": max(p.ds_numel for p in model.parameters()),
        "bucket_bytes": BYTES * optimizer.reduce_bucket_size,
    }
    engine.destroy()
    return result


def report(results: dict[str, dict[str, int]], shape: str) -> dict[str, Any]:
    """Add what the figures depend on, and bytes a parameter over all ranks."""
    ranks = comm.get_world_size()
    for result in results.values():
        per_rank = result["parameters"] / ranks
        result["state_bytes_per_parameter"] = round(result["state_bytes"] / per_rank, 3)
    return {
        "shape": shape,
        "ranks": ranks,
        "circumstances": collect_provenance(),
        "optimizers": results,
    }


def main() -> None:
    """Measure all optimizers, and print or write the result on each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=BUCKETS, default="tiny")
    parser.add_argument("--output", type=Path, help="folder for one JSON file a rank")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    arguments = parser.parse_args()
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    init_deepspeed()
    results = {}
    for name in OPTIMIZERS:
        results[name] = examine(name, arguments.shape)
        gc.collect()
    text = json.dumps(report(results, arguments.shape), indent=2)
    if arguments.output:
        name = f"memory-{comm.get_rank()}-of-{comm.get_world_size()}.json"
        (arguments.output / name).write_text(text)
    elif comm.get_rank() == 0:
        print(text)
    shutdown()


if __name__ == "__main__":
    main()
