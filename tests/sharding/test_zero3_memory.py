"""Model state is the weights: measured on live tensors, beside ZeRO-3 with SGD and AdamW."""

import json

import pytest

from tests.support.ranks import run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2])
def measured(request, tmp_path_factory) -> tuple[int, list[dict]]:
    world_size = request.param
    folder = tmp_path_factory.mktemp(f"memory{world_size}")
    run_module("benchmarks.memory", world_size, folder, "--output", str(folder))
    paths = [folder / f"memory-{rank}-of-{world_size}.json" for rank in range(world_size)]
    return world_size, [json.loads(path.read_text())["optimizers"] for path in paths]


def test_state_is_the_weights_and_one_bucket(measured):
    world_size, ranks = measured
    for rank in ranks:
        addax = rank["addax"]
        weights = 2.05 * addax["parameters"] / world_size
        assert addax["state_bytes"] <= weights + addax["bucket_bytes"]
        # fp32 master weights and gradient partition, and Adam's two moments on top
        assert rank["sgd"]["state_bytes"] >= (2 + 4) * addax["parameters"] / world_size
        assert rank["adamw"]["state_bytes"] >= (2 + 4 + 8) * addax["parameters"] / world_size


def test_live_gradients_are_two_buckets_and_the_largest_one(measured):
    world_size, ranks = measured
    for rank in ranks:
        addax = rank["addax"]
        copies = 2 if addax["largest_parameter"] % world_size else 1  # padding needs a copy
        limit = 2 * addax["bucket_bytes"] + copies * 2 * addax["largest_parameter"]
        assert 0 < addax["peak_gradient_bytes"] <= limit
        assert addax["peak_gradient_bytes"] < rank["sgd"]["peak_gradient_bytes"]
