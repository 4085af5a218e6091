"""Counts live model state and live gradients under ZeRO-3, for Addax beside SGD and AdamW."""

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.comm import coalesced_collectives
from torch import Tensor

import addax_ds  # noqa: F401  (registers the optimizer)
from tests.models import tiny_opt, token_batches
from tests.workers.teardown import shut_down

BUCKET_ELEMENTS = 100_000

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "addax": {"type": "Addax", "params": {"lr": 1e-3, "alpha": 1e-3}},
    "sgd": {"type": "SGD", "params": {"lr": 1e-3}},
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind tensors."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def all_live_tensors() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, Tensor)]


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
        coalesced_collectives._torch_reduce_scatter_fn = self._reduce


def examine(name: str) -> dict[str, int]:
    model = tiny_opt(dtype=torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": OPTIMIZERS[name],
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 0,
        },
    }
    other = live_bytes(all_live_tensors()) - live_bytes(model.parameters())
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    watch = GradientWatch(model, optimizer)
    for long, short in token_batches(3, rows=2):
        if name == "addax":
            optimizer.zeroth_order(lambda x=long: engine(input_ids=x, labels=x).loss)
        engine.backward(engine(input_ids=short, labels=short).loss)
        engine.step()
        del long, short
    watch.close()
    state = live_bytes(all_live_tensors()) - other
    result = {
        "state_bytes": state,
        "peak_gradient_bytes": watch.peak,
        "parameters": sum(p.ds_numel for p in model.parameters()),
        "largest_parameter": max(p.ds_numel for p in model.parameters()),
    }
    engine.destroy()
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {}
    for name in OPTIMIZERS:
        results[name] = examine(name)
        gc.collect()
    rank, world_size = comm.get_rank(), comm.get_world_size()
    (folder / f"memory{world_size}-{rank}.json").write_text(json.dumps(results))
    shut_down()


if __name__ == "__main__":
    main()
