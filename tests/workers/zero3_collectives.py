"""Counts the collectives of one Addax step under ZeRO-3, calls and bytes, at the dispatcher."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor

import addax_ds  # noqa: F401  (registers the optimizer)
from addax_ds.sharding.modules import blocks
from studies.collectives import CollectiveCounter
from tests.support.cases import mean_loss
from tests.support.models import tiny_opt, token_batches
from tests.workers.teardown import shut_down

CASES: dict[str, dict[str, Any]] = {
    "persistence-0": {"stage3_param_persistence_threshold": 0},
    "default": {"stage3_param_persistence_threshold": 1000},
    # Room for two blocks, which the others have not.
    "by block": {"stage3_param_persistence_threshold": 1000, "stage3_max_live_parameters": 500_000},
}
SETTLED = 3  # the step from which DeepSpeed follows its recorded traces


def examine(zero: dict[str, Any]) -> dict[str, Any]:
    model = tiny_opt(tied=False, dtype=torch.bfloat16)  # a tied weight is gathered for each use
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Addax", "params": {"lr": 1e-3, "alpha": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 1000,
            # Small enough that backward has to gather again.
            "stage3_prefetch_bucket_size": 50_000,
            "stage3_max_live_parameters": 100_000,
            "stage3_max_reuse_distance": 0,
            **zero,
        },
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    for long, short in token_batches(SETTLED + 1):
        with CollectiveCounter() as counter:
            ends: list[int] = []
            loss = optimizer.measure(
                partial(_counted_loss, engine, long, counter, ends),
                partial(_counted_loss, engine, short, counter, ends),
            )
            ends.append(len(counter.calls))
            engine.backward(loss)
            ends.append(len(counter.calls))
            engine.step()
        ends.append(len(counter.calls))
        names = ("zeroth_order", "zeroth_order", "forward", "agree", "backward", "step")
        parts = {name: [] for name in names}
        for name, begin, end in zip(names, [0, *ends], ends, strict=False):
            parts[name] += counter.calls[begin:end]
    world_size = comm.get_world_size()
    layers = list(blocks(model))
    inside = {module for layer in layers for module in layer.modules()}
    outside = [m for m in model.modules() if m not in inside and list(m.parameters(recurse=False))]
    result = {
        "parts": parts,
        "blocks": len(layers),
        "outside": len(outside),
        "persistent": sum(hasattr(p, "ds_persist") and p.ds_persist for p in model.parameters()),
        "model_bytes": sum(2 * world_size * p.ds_tensor.ds_numel for p in model.parameters()),
    }
    engine.destroy()
    return result


def _counted_loss(
    engine: Any, batch: Tensor, counter: CollectiveCounter, ends: list[int]
) -> Tensor:
    """Note how many collectives there were when a pass ended."""
    loss = mean_loss(engine, batch)
    ends.append(len(counter.calls))
    return loss


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    results = {name: examine(zero) for name, zero in CASES.items()}
    (folder / f"collectives-{comm.get_rank()}.json").write_text(json.dumps(results))
    shut_down()


if __name__ == "__main__":
    main()
