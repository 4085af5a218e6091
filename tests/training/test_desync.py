"""Ranks that come apart are found, and named, on all of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from addax_ds.training.desync import checksum
from tests.support.layouts import LAYOUTS, on_layouts
from tests.support.rank_group import Lazy
from tests.workers.desync import CASES, PARAMETER

PAIRS = [name for name, layout in LAYOUTS.items() if layout.world_size == 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_an_altered_bit_of_any_element_alters_the_checksum(dtype, count):
    weights = torch.randn(count).to(dtype)
    bits = weights.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    before = checksum(weights)
    for element in range(count):
        for bit in range(8 * dtype.itemsize - 1):
            bits[element] ^= 1 << bit
            assert checksum(weights) != before
            bits[element] ^= 1 << bit
    assert checksum(weights) == before


def test_the_checksum_does_not_depend_on_where_a_shard_lies():
    buffer = torch.empty(20, dtype=torch.bfloat16)
    weights = torch.randn(11).bfloat16()
    sums = {int(checksum(buffer[start : start + 11].copy_(weights))) for start in range(9)}
    assert sums == {int(checksum(weights))}


def test_the_checksum_of_a_large_shard_takes_two_sums_and_no_memory():
    weights = torch.ones(5_000_003, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        checksum(weights)
    events = profiled.events()
    assert [event.name for event in events].count("aten::sum") == 2
    assert max(event.self_cpu_memory_usage for event in events) < 100


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> Iterator[Any]:
    """What both ranks are told in a case, by layout."""
    with on_layouts("desync", tmp_path_factory.mktemp, CASES, PAIRS) as found:

        def of_case(layout: str, name: str) -> str | None:
            first, second = (rank[name] for rank in found[layout])
            assert first == second
            return first

        yield Lazy(PAIRS, lambda layout: Lazy(CASES, lambda name: of_case(layout, name)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", PAIRS)
def test_nothing_is_said_of_ranks_that_agree(said, layout):
    assert said[layout]["nothing 2"] is None


@pytest.mark.slow
@pytest.mark.parametrize("layout", PAIRS)
def test_a_weight_written_between_two_steps(said, layout):
    message = said[layout]["one_weight_of_one_rank 2"]
    assert message.startswith("2: the weights changed between steps 1 and 2: rank 1: " + PARAMETER)
    assert "Go on from a checkpoint" in message


@pytest.mark.slow
def test_replicas_that_differ(said):
    """Unnoticed when it happens; the next comparison finds it."""
    message = said["unsharded x2"]["one_weight_of_one_rank 3"]
    assert message.startswith("3: after step 3 rank 1 has other weights than rank 0, in ")


@pytest.mark.slow
@pytest.mark.parametrize("layout", PAIRS)
def test_a_step_with_other_values(said, layout):
    for step in (2, 3):
        message = said[layout][f"learning_rate_of_one_rank {step}"]
        assert message.startswith("3: ")
        assert "took step 3 with different values" in message or "has other weights" in message
