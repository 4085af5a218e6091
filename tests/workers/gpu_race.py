"""Trains with every write and read of a shard late, or with none: streams must not notice.

Arguments: the folder, then "sleep" (the kernels start some milliseconds late on their stream) or
"synchronize" (nothing on the device overlaps).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from torch import Tensor

from addax_ds import kernels
from tests.support.cases import mean_loss
from tests.support.models import tiny_opt, token_batches
from tests.support.passes import measured_g0
from tests.workers.teardown import shut_down

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "persistence-0": {"stage3_param_persistence_threshold": 0},
    "small-buckets": {"reduce_bucket_size": 20_000, "stage3_prefetch_bucket_size": 20_000},
}
CYCLES = 5_000_000  # some milliseconds
STEPS = 6


def slow_down(how: str) -> None:
    """Let every call of the kernels start late, or alone."""
    original: Callable[..., None] = kernels.fused

    def fused(*args: Any) -> None:
        if how == "sleep":
            torch.cuda._sleep(CYCLES)
            original(*args)
        else:
            torch.cuda.synchronize()
            original(*args)
            torch.cuda.synchronize()

    kernels.fused = fused  # type: ignore[assignment]


def train(zero: dict[str, Any], alpha: float) -> dict[str, Any]:
    model = tiny_opt(dtype=torch.bfloat16, unused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Addax", "params": {"lr": 1e-2, "alpha": alpha}},
        "zero_optimization": {"stage": 3, **zero},
    }
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=config)
    history = []
    for long, short in token_batches(STEPS):
        history.append(measured_g0(optimizer, lambda x=long: loss(engine, x)))
        if alpha < 1:
            engine.backward(loss(engine, short))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    engine.destroy()
    return {"g0": history, "weights": weights}


def loss(engine: Any, tokens: Tensor) -> Tensor:
    return mean_loss(engine, tokens.to(engine.device)).float()


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    deepspeed.init_distributed()
    torch.cuda.set_device(comm.get_local_rank())
    slow_down(how)
    results = {
        f"{name}, alpha {alpha}": train(zero, alpha)
        for name, zero in CASES.items()
        for alpha in (1e-3, 1.0)
    }
    torch.save(results, folder / f"{how}-rank{comm.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
