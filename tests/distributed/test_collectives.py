"""Limits on waiting reach every process group; the private names of torch that this takes."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from addax_ds.distributed import collectives
from addax_ds.distributed.collectives import (
    check_same_on_all_ranks,
    collectives_begun,
    limit_waiting,
    patient,
    side_group,
)
from addax_ds.distributed.startup import raise_on_all_ranks_at_start
from addax_ds.utils.errors import UserError
from tests.support.ranks import free_port


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


def test_ranks_agree_aside_while_others_wait_less_and_wait_longer_for_data(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("gloo")

    def limit() -> timedelta:
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout

    try:
        (begun,) = collectives_begun()
        dist.all_reduce(torch.zeros(1))
        assert collectives_begun() == [begun + 1]
        with side_group(3, 11) as agree:
            assert limit() == timedelta(seconds=3)
            begun = collectives_begun()[0]
            assert agree("word") == ["word"]
            assert collectives_begun()[0] == begun
        assert limit() == timedelta(seconds=11)
        with patient(13):
            assert limit() >= timedelta(days=1)
        assert limit() == timedelta(seconds=13)
        assert len(distributed_c10d._world.pg_map) == 1
    finally:
        dist.destroy_process_group()


def test_a_port_that_is_taken_is_said_so(monkeypatch):
    """The commonest mistake: two trainings on the launcher's default port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        values = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        with (
            pytest.raises(UserError, match=rf"port {port}.*--master_port"),
            raise_on_all_ranks_at_start(),
        ):
            pass


@pytest.mark.parametrize("own", [0, 1])
def test_a_rank_that_lacks_what_others_have_is_told_as_they_are(monkeypatch, own):
    by_rank = [{"test data": "1", "seed": "0"}, {"seed": "0"}]
    monkeypatch.setattr(collectives, "all_gather_object", lambda _: by_rank)
    with pytest.raises(UserError, match=r"test data: rank 0: 1, rank 1: None$"):
        check_same_on_all_ranks(by_rank[own])
