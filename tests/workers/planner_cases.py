"""Measures real steps of small shapes on the ranks of this process group, beside their plans.

Writes plan-RANKS.json.

python -m tests.workers.planner_cases <folder>
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from addax_ds.planner.shapes import opt_shape
from benchmarks.live import MODELS
from benchmarks.plan import examine, offloaded
from tests.workers.teardown import shut_down

LAYERS = {"model": "tiny", "zeroth": (8, 60, 59), "first": (8, 60, 20)}
MODELS["deep"] = opt_shape(64, 8, 2, vocab_size=1003)
MODELS["wide"] = opt_shape(96, 2, 2, vocab_size=8000)
DEEP = {"model": "deep", "zeroth": (2, 16, 15), "first": (2, 16, 4)}
_SIZES = {
    "reduce_bucket_size": 10**4,
    "stage3_prefetch_bucket_size": 10**4,
    "stage3_param_persistence_threshold": 1000,
}
LIMITS = (
    # A layer has 50,000 elements. Four stay between forward and backward; two live; modules alone.
    {**_SIZES, "stage3_max_reuse_distance": 400_000},
    {**_SIZES, "stage3_max_reuse_distance": 0},
    {**_SIZES, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 50_000},
)
VOCABULARY = {"model": "wide", "zeroth": (2, 64, 63), "first": (2, 32, 8)}
ON_ONE_RANK = [
    {**LAYERS, "sharding": "zero3", "method": "addax"},
    {**VOCABULARY, "sharding": "fsdp2", "method": "mezo", "cpu_offload": True},
]
ON_TWO_RANKS = [
    *({**LAYERS, "sharding": "zero3", "method": m} for m in ("addax", "sgd", "adamw")),
    *(
        {**LAYERS, "sharding": "zero3", "method": "ip-sgd", **more}
        for more in (
            {"checkpointing": True},
            {"attention": "eager"},
            {"zero_optimization": {"reduce_bucket_size": 10**6}},
        )
    ),
    *(
        {**DEEP, "sharding": "zero3", "method": "ip-sgd", "zero_optimization": limits}
        for limits in LIMITS
    ),
    *({**VOCABULARY, "sharding": "zero3", "method": m} for m in ("mezo", "ip-sgd")),
    *({**VOCABULARY, "sharding": "fsdp2", "method": m} for m in ("mezo", "ip-sgd")),
    {**LAYERS, "sharding": "fsdp2", "method": "addax"},
    {**LAYERS, "sharding": "fsdp2", "method": "ip-sgd", "checkpointing": True},
    *({**LAYERS, "sharding": s, "method": "addax", "dtype": "fp32"} for s in ("zero3", "fsdp2")),
    *(
        {**VOCABULARY, "sharding": s, "method": "addax", "accumulation": 2}
        for s in ("zero3", "fsdp2")
    ),
    {**LAYERS, "sharding": "fsdp2", "method": "ip-sgd", "accumulation": 2},
    {
        **VOCABULARY,
        "sharding": "zero3",
        "method": "addax",
        "zero_optimization": offloaded("wide"),
        "accumulation": 2,
    },
    {**VOCABULARY, "sharding": "fsdp2", "method": "addax", "cpu_offload": True},
]
ON_FOUR_RANKS = [
    {**LAYERS, "first": (1, 16, 4), "sharding": "fsdp2", "method": "ip-sgd", "replicas": 2}
]
CASES = {1: ON_ONE_RANK, 2: ON_TWO_RANKS, 4: ON_FOUR_RANKS}

if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    ranks = dist.get_world_size()
    results = examine(CASES[ranks])
    if dist.get_rank() == 0:
        Path(sys.argv[1], f"plan-{ranks}.json").write_text(json.dumps(results))
    shut_down()
