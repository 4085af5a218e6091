"""Limits on waiting reach every process group; the private names of torch that this takes."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from addax_ds.agreement import limit_waiting
from tests.ranks import free_port


def test_every_group_gets_the_limit(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo", timeout=timedelta(seconds=1000))
    try:
        other = dist.new_group([0])
        limit_waiting(7)
        for group in (dist.group.WORLD, other):
            options = group._get_backend(torch.device("cpu")).options
            assert options._timeout == timedelta(seconds=7)
        assert len(distributed_c10d._world.pg_map) == 2
    finally:
        dist.destroy_process_group()
