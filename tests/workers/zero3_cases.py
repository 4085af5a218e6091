"""Trains cases under ZeRO-3; as a program, writes weights and g0 of each to the folder."""

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm

import addax_ds
from tests.support.cases import CASES, Case, batches, mean_loss
from tests.support.passes import measured_g0
from tests.workers.teardown import shut_down


def zero3_config(case: Case) -> dict:
    h = case.hyperparameters
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {
            "type": "Addax",
            "params": {
                "lr": h.lr,
                "alpha": h.alpha,
                "zo_eps": h.zo_eps,
                "weight_decay": h.weight_decay,
                "seed": h.seed,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 150_000,
            "stage3_prefetch_bucket_size": 100_000,
            "log_trace_cache_warnings": True,
            **case.zero_optimization,
        },
    }


def train(case: Case) -> dict:
    model = case.build()
    engine, optimizer, _, _ = deepspeed.initialize(model=model, config=zero3_config(case))
    rank, world_size = comm.get_rank(), comm.get_world_size()
    calls = {"forward": 0}
    engine.module.register_forward_pre_hook(
        lambda *_: calls.__setitem__("forward", calls["forward"] + 1)
    )
    history = []
    alpha = case.hyperparameters.alpha
    for index, (long, short) in enumerate(batches()):
        long, short = (x.chunk(world_size)[rank].to(engine.device) for x in (long, short))
        if comm.get_rank() == 0:
            print("step", index, flush=True)
        history.append(measured_g0(optimizer, lambda x=long: mean_loss(engine, x)))
        if alpha < 1:
            engine.backward(mean_loss(engine, short))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    engine.destroy()
    return {"g0": history, "weights": weights, "forwards": calls["forward"]}


def set_up() -> None:
    deepspeed.init_distributed()


def run_case(name: str) -> dict:
    assert addax_ds.Addax is torch.optim.Addax
    return train(CASES[name])


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    set_up()
    for name in names:
        torch.save(run_case(name), folder / f"{name}-rank{comm.get_rank()}.pt")
    shut_down()


if __name__ == "__main__":
    main()
