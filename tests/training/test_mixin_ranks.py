"""Addax in a plain Trainer: the global batch decides, however ranks and micro-batches divide it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rank_group import RankGroup
from tests.workers import mixin_cases

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("program_alone")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixin")
    mixin_cases.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, Any]:
    """One rank with one micro-batch, whose loss is a mean over the global batch."""
    return mixin_cases.run(folder, "none", 1)


@pytest.fixture(scope="module", params=["none", "fsdp2", "zero3"])
def of_two_ranks(request, folder) -> Iterator[Callable[..., list[Any]]]:
    """Runs a function for a back end; a process that has once used DeepSpeed keeps to it."""
    (folder / request.param).mkdir()
    group = RankGroup("mixin_cases", 2, folder / request.param)
    yield lambda *more: group.call("run", folder, request.param, 2, *more)
    group.close()


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    # Losses are near ln 3, and a wrong factor is at least 2.
    assert found["losses"] == [pytest.approx(losses, rel=1e-3) for losses in expected["losses"]]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_a_loss_that_is_a_mean(micro_batches, folder, whole):
    assert_same_steps(mixin_cases.run(folder, "none", 1, micro_batches), whole)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_of_a_loss_that_is_a_mean(micro_batches, whole, of_two_ranks):
    for found in of_two_ranks(micro_batches):
        assert_same_steps(found, whole)


def test_a_plain_trainer_may_have_the_model_afterwards(folder):
    """On two ranks it wraps the model, without which each rank would train its own."""
    logs = folder / "afterwards"
    logs.mkdir()
    group = RankGroup("mixin_cases", 2, logs)
    try:
        (is_wrapped, weights), (_, of_the_other) = group.call("run_plain_afterwards", folder)
    finally:
        group.close()
    assert is_wrapped
    for name, weight in weights.items():
        assert torch.equal(weight, of_the_other[name]), name
