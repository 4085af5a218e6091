"""What is kept of gradients between their reduction and the update."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from addax_ds.optim.addax import Addax
from addax_ds.optim.attach import attach
from addax_ds.optim.gradients import FirstOrder, SquaredNorms, Use
from addax_ds.sharding.base import Shard


class Counted(TorchDispatchMode):
    """Counts operators."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_squared_norms_of_many_gradients_take_few_operators():
    """Of every type and group, against float64; bf16 ones reach beyond what bf16 can count."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(120):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        gradient = torch.randn(number * 7 + 1, generator=generator).mul_(100).to(dtype)
        pairs.append((Shard(gradient, number, 0, group=number % 3), gradient))
    squares = SquaredNorms()
    with Counted() as operators:
        squares.add(pairs[:70])
        squares.add(pairs[70:])
        found = squares.take(4, torch.device("cpu"))
    expected = [0.0] * 4
    for shard, gradient in pairs:
        expected[shard.group] += gradient.double().square().sum().item()
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert operators.calls < len(pairs) / 2
    assert squares.take(1, torch.device("cpu")).tolist() == [0.0]


@pytest.mark.parametrize("use", [Use.ACCUMULATE, Use.TAKE_NORM])
def test_what_still_arrives_of_a_step_that_was_given_up_is_not_applied(use):
    model = torch.nn.Linear(3, 1)
    sharding = attach(Addax(model.parameters(), lr=0.1), model)
    first_order = FirstOrder(sharding, loss_scale=1.0, max_grad_norm=0.0, track_norm=False)
    shards = list(sharding.shards())
    gradients = [torch.ones_like(shard.data) for shard in shards]
    with pytest.raises(KeyError), first_order.used_to(use):
        raise KeyError
    assert first_order.take(shards, gradients) == []
    with first_order.used_to(use):
        assert first_order.take(shards, gradients) == []
    assert [shard for shard, _ in first_order.take(shards, gradients)] == shards
